"""A dataset in TFDS's folder format while it is written, here or in a bucket: shards first, metadata last."""

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
from trainer.storage.base import StoragePath

MANIFEST = "kubetune_shards.json"
LABELS = "kubetune_labels.npz"  # int32 [records] of each shard, by its file name: what saves reading them
INFO = "dataset_info.json"  # what makes a folder a dataset: written last
METADATA = (INFO, "features.json", "label.labels.txt")


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard: a line of the manifest."""

    file: str
    count: int
    bytes: int
    crc32c: str  # hex, of the whole file
    made_of: str  # hash of the images (by name, size and time) and labels it was written from
    skipped: tuple[str, ...] = ()  # images that could not be decoded, with the reason
    missing: tuple[int, ...] = ()  # their positions among the images that the shard was to hold

    @property
    def facts(self) -> str:
        """Name, bytes and checksum, for the fingerprint of a dataset."""
        return f"{self.file} {self.bytes} {self.crc32c}"


class DatasetFolder:
    """A dataset in the making: shards become visible, each with a small record beside it until the manifest is there.

    Attributes:
        scratch: the local folder in which shards are written before they are there.
    """

    def __init__(self, folder: StoragePath, scratch: Path | None) -> None:
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
            if self.folder.is_local:
                names = [path.name for path in self.scratch.iterdir()]
            else:
                names = [entry.path.name for entry in self.folder.list(recursive=False)]
        except OSError as error:
            raise DataError(f"{self.folder} cannot be written to: {error.strerror}; give an empty folder") from None
        others = sorted(name for name in names if name not in known and not name.startswith(ours))
        if others:
            raise DataError(
                f"{self.folder} holds other files ({', '.join(others[:3])}{', ...' * (len(others) > 3)}); "
                "give an empty folder, or one where the same dataset was begun"
            )

    def entries(self) -> dict[str, ShardEntry]:
        """The shards that were written before, by file name."""
        there = {entry.path.name: entry.path for entry in self.folder.list(recursive=False)}
        lines = json.loads(there[MANIFEST].read_text()) if MANIFEST in there else []
        lines += [json.loads(path.read_text()) for name, path in there.items() if _is_record(name)]
        return {entry.file: entry for entry in map(_entry, lines)}

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
        import tensorflow_datasets as tfds

        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list(class_names)),
        }
        if text_field:
            features[text_field] = tfds.features.Text()
        manifest = [asdict(entry) for entries in splits.values() for entry in entries]
        (self.folder / MANIFEST).write(json.dumps(manifest, indent=1) + "\n")
        arrays = io.BytesIO()
        np.savez_compressed(arrays, **labels)  # type: ignore[arg-type]
        (self.folder / LABELS).write(arrays.getvalue())
        with tempfile.TemporaryDirectory() as beside:
            for entry in manifest:  # TFDS looks only whether shards of these names are there
                (Path(beside) / str(entry["file"])).touch()
            template = tfds.core.ShardedFileTemplate(data_dir=beside, dataset_name=name, filetype_suffix="tfrecord")
            infos = [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[entry.count for entry in entries],
                    num_bytes=sum(entry.bytes for entry in entries),
                    filename_template=template.replace(split=split),
                )
                for split, entries in splits.items()
            ]
            tfds.folder_dataset.write_metadata(
                data_dir=beside, features=features, split_infos=infos, filename_template=template, version="1.0.0",
                check_data=False,
            )  # fmt: skip
            for file in sorted(Path(beside).iterdir(), key=lambda file: file.name == INFO):
                if file.stat().st_size:
                    (self.folder / file.name).write(file.read_bytes())
        for there in self.folder.list(recursive=False):
            if _is_record(there.path.name):
                there.path.delete()
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
    """Entries and labels (int32 [records]) of the shards of a prepared folder, by file name, from manifest and labels
    file. Empty where those are absent or do not fit each other: the shards have to be read then.
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
    checksum = google_crc32c.Checksum()
    with open(path, "rb") as file:
        for _ in checksum.consume(file, 2**22):
            pass
    return int.from_bytes(checksum.digest(), "big")
