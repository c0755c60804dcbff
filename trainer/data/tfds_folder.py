"""A dataset in TFDS's folder format while it is written, here or in a bucket: shards first, metadata last."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from trainer.errors import DataError
from trainer.storage.base import Place

MANIFEST = "kubetune_shards.json"
LABELS = "kubetune_labels.npz"  # int32 [records] of each shard, by its file name: what saves reading them
INFO = "dataset_info.json"  # what makes a folder a dataset: written last
METADATA = (INFO, "features.json", "label.labels.txt")


@dataclass(frozen=True)
class ShardEntry:
    """What one finished shard holds: a line of the manifest."""

    file: str
    count: int
    bytes: int
    crc32c: str  # hex, of the whole file
    made_of: str  # hash of the images (by name, size and time) and labels it was written from
    skipped: tuple[str, ...] = ()  # images that could not be decoded, with the reason
    missing: tuple[int, ...] = ()  # their places among the images that the shard was to hold

    @property
    def facts(self) -> str:
        """What a fingerprint says of the shard."""
        return f"{self.file} {self.bytes} {self.crc32c}"


class DatasetFolder:
    """Where shards become visible, each with a small record beside it until the manifest holds them all.

    Attributes:
        scratch: the local folder in which shards are written before they are there.
    """

    def __init__(self, folder: Place, scratch: Path | None) -> None:
        self.folder = folder
        self.scratch = Path(str(folder)) if folder.is_local else scratch or Path(tempfile.mkdtemp(prefix="kubetune-"))

    def make_room(self, expected: set[str]) -> None:
        """Create the folder.

        Raises:
            DataError: it holds anything but an earlier try at the same dataset, or cannot be written to.
        """
        known = {MANIFEST, LABELS, *METADATA} | expected
        ours = (f"{MANIFEST}.tmp", f".{MANIFEST}", *(f".{name}." for name in (*expected, LABELS, *METADATA)))
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            names = (
                [p.name for p in self.scratch.iterdir()]
                if self.folder.is_local
                else [entry.place.name for entry in self.folder.list(recursive=False)]
            )
        except OSError as error:
            raise DataError(f"{self.folder} cannot be written to: {error.strerror}; give an empty folder") from None
        strange = sorted(name for name in names if name not in known and not name.startswith(ours))
        if strange:
            raise DataError(
                f"{self.folder} holds other files ({', '.join(strange[:3])}{', ...' * (len(strange) > 3)}); "
                "give an empty folder, or one where the same dataset was begun"
            )

    def entries(self) -> dict[str, ShardEntry]:
        """What is known of shards that were written before, by file name."""
        found: list[dict[str, Any]] = []
        there = {entry.place.name: entry.place for entry in self.folder.list(recursive=False)}
        if MANIFEST in there:
            found += json.loads(there[MANIFEST].read_text())
        found += [json.loads(at.read_text()) for name, at in there.items() if _is_record(name)]
        return {entry.file: entry for entry in map(_entry, found)}

    def holds(self, entry: ShardEntry) -> bool:
        """Whether the shard is there, byte for byte as its record says."""
        there = (self.folder / entry.file).stat()
        if there is None or there.size != entry.bytes:
            return False
        crc = _crc_of(self.scratch / entry.file) if there.crc32c is None else there.crc32c
        return f"{crc:08x}" == entry.crc32c

    def commit(self, temporary: Path, entry: ShardEntry) -> None:
        """Make a written shard visible, then its record."""
        if self.folder.is_local:
            os.replace(temporary, self.scratch / entry.file)
        else:
            (self.folder / entry.file).upload(temporary)
            temporary.unlink()
        (self.folder / f".{entry.file}.json").write(json.dumps(asdict(entry), indent=1) + "\n")

    def forget_metadata(self) -> None:
        """As long as shards are missing, nobody must take the folder for a dataset."""
        (self.folder / INFO).delete()

    def finish(
        self,
        name: str,
        class_names: Sequence[str],
        splits: Mapping[str, Sequence[ShardEntry]],
        labels: Mapping[str, np.ndarray],
        text_field: str | None = None,
    ) -> None:
        """Write the manifest, the labels of each shard (by file name) and the metadata, which names `text_field` beside
        image and label. Several that do it at the same time write the same bytes.
        """
        manifest = [asdict(entry) for entries in splits.values() for entry in entries]
        (self.folder / MANIFEST).write(json.dumps(manifest, indent=1) + "\n")
        arrays = io.BytesIO()
        np.savez_compressed(arrays, **labels)  # type: ignore[arg-type]
        (self.folder / LABELS).write(arrays.getvalue())
        with tempfile.TemporaryDirectory() as beside:
            for entry in manifest:  # TFDS looks only whether shards of these names are there
                (Path(beside) / str(entry["file"])).touch()
            _write_metadata(Path(beside), name, class_names, splits, text_field)
            for file in sorted(Path(beside).iterdir(), key=lambda file: file.name == INFO):
                if file.stat().st_size:
                    (self.folder / file.name).write(file.read_bytes())
        for there in self.folder.list(recursive=False):
            if _is_record(there.place.name):
                there.place.delete()
        if self.folder.is_local:
            for left in self.scratch.glob(".*.tmp"):
                left.unlink()


def _entry(line: Mapping[str, Any]) -> ShardEntry:
    """From a line of the manifest, or a record."""
    return ShardEntry(**{**line, "skipped": tuple(line["skipped"]), "missing": tuple(line.get("missing", ()))})


def manifest_of(content: bytes | str) -> dict[str, ShardEntry]:
    """The shards of a manifest by file name; empty where it is no manifest."""
    try:
        return {entry.file: entry for entry in map(_entry, json.loads(content))}
    except (ValueError, KeyError, TypeError):
        return {}


def known_shards(folder: Path) -> tuple[dict[str, ShardEntry], dict[str, np.ndarray]]:
    """What a prepared folder says of its shards, without a look at them: entries and labels (int32 [records]) by file
    name. Empty where manifest or labels are absent or do not fit each other: the shards have to be read then.
    """
    try:
        entries = manifest_of((folder / MANIFEST).read_bytes())
        with np.load(folder / LABELS, allow_pickle=False) as arrays:
            labels = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}, {}
    fit = entries.keys() == labels.keys() and all(labels[n].shape == (e.count,) for n, e in entries.items())
    return (entries, labels) if fit else ({}, {})


def _is_record(name: str) -> bool:
    return name.startswith(".") and name.endswith(".json")


def _crc_of(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            crc = google_crc32c.extend(crc, piece)
    return crc


def _write_metadata(
    folder: Path,
    name: str,
    class_names: Sequence[str],
    splits: Mapping[str, Sequence[ShardEntry]],
    text_field: str | None,
) -> None:
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, filetype_suffix="tfrecord")
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[entry.count for entry in entries],
            num_bytes=sum(entry.bytes for entry in entries),
            filename_template=template.replace(split=split),
        )
        for split, entries in splits.items()
    ]
    features: dict[str, Any] = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=list(class_names)),
    }
    if text_field:
        features[text_field] = tfds.features.Text()
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        filename_template=template,
        version="1.0.0",
        check_data=False,
    )
