"""Write a dataset folder in the format of TFDS, local or in a bucket, and read its manifest and labels.

The metadata is written last, so that a folder with missing shards is not readable as a dataset.
"""

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
from trainer.storage.base import STALE_SECONDS, StoragePath, encode_json, is_temporary_name
from trainer.storage.disk import make_write_error
from trainer.storage.local import compute_file_crc32c, delete_stale_temporary_files, delete_temporary_files
from trainer.storage.small_files import CONTENT_ERRORS

MANIFEST_FILE = "kubetune_shards.json"  # JSON list with the `ShardEntry` of each shard
LABELS_FILE = "kubetune_labels.npz"  # shard file name -> int32 [records], so that labels can be read without the shards
INFO_FILE = "dataset_info.json"  # marks a complete dataset, so it is written last
METADATA_FILES = (INFO_FILE, "features.json", "label.labels.txt")  # files that TFDS reads in addition to the shards


@dataclass(frozen=True)
class ShardEntry:
    """The manifest entry of a finished shard. Until the manifest is written, the entry is stored in a sidecar file."""

    file: str  # name of the shard file
    count: int  # number of records
    bytes: int  # size of the file
    crc32c: str  # checksum of the file, 8 hex digits
    # Hash of everything that the shard is written from: class names, options, images, labels and texts. An image is
    # identified by its content, by its name and version in a bucket, or by its path, size and modification time.
    made_of: str
    skipped: tuple[str, ...] = ()  # images that could not be read or decoded, each with the reason
    missing: tuple[int, ...] = ()  # indices of the skipped images among the source images of the shard

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build an entry from a decoded JSON object.

        Raises:
            TypeError, KeyError or ValueError: a key is unknown or missing, or has a wrong value.
        """
        lists = {"skipped": tuple(value["skipped"]), "missing": tuple(map(int, value.get("missing", ())))}
        return cls(**{**value, **lists, "count": int(value["count"]), "bytes": int(value["bytes"])})

    @property
    def identity(self) -> str:
        """The shard's name, size and checksum, "NAME BYTES CRC32C", which the dataset fingerprint covers."""
        return f"{self.file} {self.bytes} {self.crc32c}"


class DatasetFolder:
    """A dataset's folder while the dataset is written.

    Until the dataset is complete, each finished shard has a sidecar file `.NAME.json` with its `ShardEntry`.
    """

    def __init__(self, folder: StoragePath, scratch: Path | None) -> None:
        """Set up the paths without writing to the folder.

        Args:
            folder: the dataset's folder, local or in a bucket.
            scratch: local folder for shards until they are uploaded to a bucket. Defaults to a new temporary folder.
                Not used if `folder` is local: a shard is then written to `folder` under a temporary name.
        """
        scratch_folder = Path(str(folder)) if folder.is_local else scratch or Path(tempfile.mkdtemp(prefix="kubetune-"))
        self.folder, self.scratch, self.is_only_writer = folder, scratch_folder, False

    def create(self, shards: set[str], is_only_writer: bool) -> None:
        """Create the folder, delete the temporary files of killed processes, and require that there are no other files.

        Args:
            shards: file names of all shards in the dataset.
            is_only_writer: whether no other pod writes the dataset. Otherwise, temporary files from the last hour
                (`STALE_SECONDS`) are not deleted, because another pod may be writing them.

        Raises:
            DataError: the folder cannot be written to, or contains files that do not belong to this dataset.
            Interrupted: the disk is full or fails.
        """
        names = {MANIFEST_FILE, LABELS_FILE, *METADATA_FILES} | shards
        self.is_only_writer = is_only_writer and self.folder.is_local
        prefixes = (
            f"{MANIFEST_FILE}.tmp",
            f".{MANIFEST_FILE}",
            *(f".{name}." for name in (*shards, LABELS_FILE, *METADATA_FILES)),
        )
        fix = "set an empty folder, or the one of an interrupted start with the same data"
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._delete_all_temporary_files(shards)
            files = self.scratch.iterdir() if self.folder.is_local else self._list_files()
            extras = sorted({file.name for file in files} - names)
            extras = [name for name in extras if not (name.startswith(prefixes) or is_temporary_name(name))]
        except OSError as error:
            raise make_write_error(error, str(self.folder), "output", fix, DataError) from None
        if extras:
            problem = f"has other files ({', '.join(map(escape_unprintable, extras[:3]))}{', ...' * (len(extras) > 3)})"
            raise DataError(problem, key="output", value=str(self.folder), fix=fix)

    def _delete_all_temporary_files(self, shards: set[str]) -> None:
        """Delete the temporary files of killed processes, including those that older versions named `.SHARD.*.tmp`."""
        self._delete_temporary_files()
        for file in self.scratch.glob(".*.tmp"):
            with contextlib.suppress(OSError):  # another pod has deleted the file
                is_shard = any(file.name.startswith(f".{shard}.") for shard in shards)
                if is_shard and time.time() - file.stat().st_mtime >= STALE_SECONDS:
                    file.unlink()

    def _delete_temporary_files(self) -> None:
        """Delete the temporary files of killed processes, unless another pod may be writing them."""
        if self.is_only_writer:
            delete_stale_temporary_files(self.scratch)
        delete_temporary_files(self.scratch, STALE_SECONDS, recursive=False)

    def read_entries(self) -> dict[str, ShardEntry]:
        """Read the entries of the shards that earlier starts or other pods have written, by file name.

        Entries in a corrupt manifest or sidecar file are left out, so that their shards are written again.
        """
        files = self._list_files()
        manifests = [parse_manifest(path.read()) for path in files if path.name == MANIFEST_FILE]
        sidecars = [parse_manifest(b"[%s]" % path.read()) for path in files if _is_sidecar(path.name)]
        return {file: entry for entries in (*manifests, *sidecars) for file, entry in entries.items()}

    def _list_files(self) -> list[StoragePath]:
        """Return the files directly in the dataset's folder."""
        return [info.path for info in self.folder.list(recursive=False)]

    def has_intact_shard(self, entry: ShardEntry) -> bool:
        """Return whether an entry's shard exists with the size and checksum in the entry."""
        info = (self.folder / entry.file).stat()
        if info is None or info.size != entry.bytes:
            return False
        crc = compute_file_crc32c(self.scratch / entry.file) if info.crc32c is None else info.crc32c
        return f"{crc:08x}" == entry.crc32c

    def commit(self, temporary: Path, entry: ShardEntry) -> None:
        """Rename or upload a finished shard from the path `temporary` to its final name. Then write its sidecar."""
        if self.folder.is_local:
            os.replace(temporary, self.scratch / entry.file)
        else:
            (self.folder / entry.file).upload(temporary)
            temporary.unlink()
        (self.folder / f".{entry.file}.json").write(encode_json(asdict(entry)))

    def finish(
        self,
        name: str,
        class_names: Sequence[str],
        splits: Mapping[str, Sequence[ShardEntry]],
        labels: Mapping[str, np.ndarray],
        text_fields: Sequence[str],
    ) -> None:
        """Write the manifest, the labels file and the metadata of a complete dataset. Then delete the sidecar files.

        Several pods can call this concurrently for the same dataset.

        Args:
            name: name of the dataset.
            class_names: class names by class index.
            splits: name of each split -> entries of its shards.
            labels: file name of each shard -> class index of each record, int32 [records].
            text_fields: names of the records' further fields, each of which has one text per record.
        """
        import tensorflow_datasets as tfds

        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list(class_names)),
        } | {name: tfds.features.Text() for name in text_fields}
        manifest = [asdict(entry) for entries in splits.values() for entry in entries]
        (self.folder / MANIFEST_FILE).write(encode_json(manifest))
        npz_buffer = io.BytesIO()
        np.savez_compressed(npz_buffer, **labels)  # type: ignore[arg-type]
        (self.folder / LABELS_FILE).write(npz_buffer.getvalue())
        with tempfile.TemporaryDirectory() as local_dir:
            for entry in manifest:  # TFDS only checks that files with these names exist
                Path(local_dir, str(entry["file"])).touch()
            template = tfds.core.ShardedFileTemplate(data_dir=local_dir, dataset_name=name, filetype_suffix="tfrecord")
            split_infos = []
            for split, entries in splits.items():
                shard_lengths = [entry.count for entry in entries]
                size = sum(entry.bytes for entry in entries)
                split_infos.append(tfds.core.SplitInfo(split, shard_lengths, size, template.replace(split=split)))
            tfds.folder_dataset.write_metadata(
                data_dir=local_dir, features=features, split_infos=split_infos, filename_template=template,
                version="1.0.0", check_data=False,
            )  # fmt: skip
            for file in sorted(Path(local_dir).iterdir(), key=lambda file: file.name == INFO_FILE):
                if file.stat().st_size:  # a metadata file: the shards here are empty
                    (self.folder / file.name).write(file.read_bytes())
        for path in self._list_files():
            if _is_sidecar(path.name):
                path.delete()
        if self.folder.is_local:
            self._delete_temporary_files()
            for temporary_file in self.scratch.glob(".*.tmp"):
                temporary_file.unlink()


def parse_manifest(content: bytes | str) -> dict[str, ShardEntry]:
    """Parse a manifest, and return its entries by file name. Return {} if the content is not a manifest."""
    try:
        return {entry.file: entry for entry in map(ShardEntry.from_json, json.loads(content))}
    except CONTENT_ERRORS:
        return {}


def read_manifest_and_labels(folder: Path) -> tuple[dict[str, ShardEntry], dict[str, np.ndarray]]:
    """Read the manifest and the labels file of a folder that `python -m trainer.prepare` wrote.

    Returns:
        The entries of the shards and their labels, int32 [records], both by file name. Both are empty if a file is
        missing or corrupt, or if the files contradict each other. The labels must then be read from the shards.
    """
    try:
        entries = parse_manifest((folder / MANIFEST_FILE).read_bytes())
        labels = unpack((folder / LABELS_FILE).read_bytes())
    except (OSError, *CONTENT_ERRORS):
        return {}, {}
    is_consistent = entries.keys() == labels.keys() and all(labels[n].shape == (e.count,) for n, e in entries.items())
    return (entries, labels) if is_consistent else ({}, {})


def _is_sidecar(name: str) -> bool:
    """Return whether a file name is that of a shard's sidecar file, `.NAME.json`."""
    return name.startswith(".") and name.endswith(".json")
