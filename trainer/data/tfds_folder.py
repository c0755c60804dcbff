"""Write a dataset folder in TFDS's format, local or in a bucket, metadata last. Read its manifest."""

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from trainer.errors import DataError
from trainer.names import escape_unprintable
from trainer.storage.arrays import unpack
from trainer.storage.base import ABANDONED_SECONDS, StoragePath, is_unfinished
from trainer.storage.disk import make_write_error
from trainer.storage.local import compute_file_crc32c, delete_abandoned, delete_unfinished
from trainer.storage.small_files import CONTENT_ERRORS

MANIFEST = "kubetune_shards.json"
LABELS = "kubetune_labels.npz"  # int32 [records] by shard file name, so that shards need not be read for labels
INFO = "dataset_info.json"  # marks a complete dataset, so it is written last
METADATA = (INFO, "features.json", "label.labels.txt")


@dataclass(frozen=True)
class ShardEntry:
    """The manifest entry of a finished shard. Until the manifest is written, it is the content of a sidecar file."""

    file: str
    count: int  # records
    bytes: int
    crc32c: str  # of the file, 8 hex digits
    made_of: str  # hash of class names, source images (name, size and time, or content), labels and texts
    skipped: tuple[str, ...] = ()  # images that could not be read or decoded, with the reason
    missing: tuple[int, ...] = ()  # their indices among the source images

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build an entry from a JSON object. Unknown or absent keys raise TypeError or KeyError."""
        lists = {"skipped": tuple(value["skipped"]), "missing": tuple(map(int, value.get("missing", ())))}
        return cls(**{**value, **lists, "count": int(value["count"]), "bytes": int(value["bytes"])})

    @property
    def identity(self) -> str:
        """Name, size and checksum, for the dataset fingerprint."""
        return f"{self.file} {self.bytes} {self.crc32c}"


class DatasetFolder:
    """A dataset that is being written.

    Until it is complete, each finished shard has a sidecar file `.NAME.json` with its `ShardEntry`.
    """

    def __init__(self, folder: StoragePath, scratch: Path | None) -> None:
        """`scratch` is where unfinished shards of a bucket are written, by default a new temporary folder."""
        local = Path(str(folder)) if folder.is_local else scratch or Path(tempfile.mkdtemp(prefix="kubetune-"))
        self.folder, self.scratch, self.alone = folder, local, False

    def create(self, shards: set[str], alone: bool) -> None:
        """Create the folder, and delete the temporary files of killed starts.

        Those of the last hour may be of other pods, unless this process is `alone` and the folder is local.

        Raises DataError if the folder is not writable, or has files of another dataset.
        """
        names = {MANIFEST, LABELS, *METADATA} | shards
        self.alone = alone and self.folder.is_local
        temporary = (f"{MANIFEST}.tmp", f".{MANIFEST}", *(f".{name}." for name in (*shards, LABELS, *METADATA)))
        fix = "set an empty folder, or the one of an interrupted start with the same data"
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._delete_abandoned(shards)
            files = self.scratch.iterdir() if self.folder.is_local else self._list_files()
            others = sorted({file.name for file in files} - names)
            others = [name for name in others if not (name.startswith(temporary) or is_unfinished(name))]
        except OSError as error:
            raise make_write_error(error, str(self.folder), "output", fix, DataError) from None
        if others:
            problem = f"has other files ({', '.join(map(escape_unprintable, others[:3]))}{', ...' * (len(others) > 3)})"
            raise DataError(problem, key="output", value=str(self.folder), fix=fix)

    def _delete_abandoned(self, shards: set[str]) -> None:
        self._delete_unfinished()
        for file in self.scratch.glob(".*.tmp"):
            with contextlib.suppress(OSError):  # deleted meanwhile
                own = any(file.name.startswith(f".{shard}.") for shard in shards)
                if own and time.time() - file.stat().st_mtime >= ABANDONED_SECONDS:
                    file.unlink()

    def _delete_unfinished(self) -> None:
        if self.alone:
            delete_abandoned(self.scratch)
        delete_unfinished(self.scratch, ABANDONED_SECONDS, recursive=False)

    def read_entries(self) -> dict[str, ShardEntry]:
        """Return the entries of the shards that earlier starts or other pods have written, by file name.

        A shard whose entry is corrupt is written again.
        """
        files = self._list_files()
        manifests = [parse_manifest(path.read()) for path in files if path.name == MANIFEST]
        sidecars = [parse_manifest(b"[%s]" % path.read()) for path in files if _is_sidecar(path.name)]
        return {file: entry for entries in (*manifests, *sidecars) for file, entry in entries.items()}

    def _list_files(self) -> list[StoragePath]:
        return [info.path for info in self.folder.list(recursive=False)]

    def has_intact(self, entry: ShardEntry) -> bool:
        """Return whether the shard exists with the size and checksum of its entry."""
        info = (self.folder / entry.file).stat()
        if info is None or info.size != entry.bytes:
            return False
        crc = compute_file_crc32c(self.scratch / entry.file) if info.crc32c is None else info.crc32c
        return f"{crc:08x}" == entry.crc32c

    def commit(self, temporary: Path, entry: ShardEntry) -> None:
        """Move a finished shard to its final name, then write its sidecar file."""
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
        text_fields: Sequence[str],
    ) -> None:
        """Write manifest, labels (int32 [records] by file name) and metadata. Then delete the sidecar files.

        Several pods can do so concurrently. `text_fields` are additional text features of the records.
        """
        import tensorflow_datasets as tfds

        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list(class_names)),
        } | {name: tfds.features.Text() for name in text_fields}
        manifest = [asdict(entry) for entries in splits.values() for entry in entries]
        (self.folder / MANIFEST).write(json.dumps(manifest, indent=1) + "\n")
        arrays = io.BytesIO()
        np.savez_compressed(arrays, **labels)  # type: ignore[arg-type]
        (self.folder / LABELS).write(arrays.getvalue())
        with tempfile.TemporaryDirectory() as local:
            for entry in manifest:  # TFDS only checks that files of these names exist
                Path(local, str(entry["file"])).touch()
            template = tfds.core.ShardedFileTemplate(data_dir=local, dataset_name=name, filetype_suffix="tfrecord")
            infos = []
            for split, entries in splits.items():
                lengths, size = [entry.count for entry in entries], sum(entry.bytes for entry in entries)
                infos.append(tfds.core.SplitInfo(split, lengths, size, template.replace(split=split)))
            tfds.folder_dataset.write_metadata(
                data_dir=local, features=features, split_infos=infos, filename_template=template, version="1.0.0",
                check_data=False,
            )  # fmt: skip
            for file in sorted(Path(local).iterdir(), key=lambda file: file.name == INFO):
                if file.stat().st_size:
                    (self.folder / file.name).write(file.read_bytes())
        for path in self._list_files():
            if _is_sidecar(path.name):
                path.delete()
        if self.folder.is_local:
            self._delete_unfinished()
            for unfinished in self.scratch.glob(".*.tmp"):
                unfinished.unlink()


def parse_manifest(content: bytes | str) -> dict[str, ShardEntry]:
    """Parse the entries of a manifest, by file name. Empty if the content is not a manifest."""
    try:
        return {entry.file: entry for entry in map(ShardEntry.from_json, json.loads(content))}
    except CONTENT_ERRORS:
        return {}


def read_manifest_and_labels(folder: Path) -> tuple[dict[str, ShardEntry], dict[str, np.ndarray]]:
    """Read the entries and labels (int32 [records]) of the shards of a prepared folder, by file name.

    Both are empty if manifest or labels file are missing, corrupt or inconsistent. Then the shards must be read.
    """
    try:
        entries, labels = parse_manifest((folder / MANIFEST).read_bytes()), unpack((folder / LABELS).read_bytes())
    except (OSError, *CONTENT_ERRORS):
        return {}, {}
    consistent = entries.keys() == labels.keys() and all(labels[n].shape == (e.count,) for n, e in entries.items())
    return (entries, labels) if consistent else ({}, {})


def _is_sidecar(name: str) -> bool:
    return name.startswith(".") and name.endswith(".json")
