"""Write labeled images as sharded TFRecords in TFDS's folder format, in several threads.

TensorFlow is imported only to verify images, with the decoder of training.
"""

import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from trainer.data.records import (
    RecordLocation,
    frame_record,
    join_first,
    read_image,
    read_source_name,
    serialize,
    unreadable_error,
)
from trainer.data.tfds_folder import INFO, DatasetFolder, ShardEntry
from trainer.errors import DataError
from trainer.names import escape_unprintable, make_file_stem
from trainer.storage.base import StoragePath
from trainer.storage.local import add_path_to_errors, make_temporary_name
from trainer.storage.path import storage_path
from trainer.storage.staging import identify_staged_file
from trainer.types import Orientation

ImageSource = str | Path | bytes | RecordLocation
TIFF_MAGIC = (b"II*\0", b"MM\0*")
SHARD_BYTES = 100 * 2**20  # approximate shard size if the shard count is not configured


@dataclass(frozen=True)
class LabeledImages:
    """A dataset to write. Splits have (image, label) pairs in record order. Empty splits are omitted."""

    name: str
    class_names: Sequence[str]
    splits: Mapping[str, Sequence[tuple[ImageSource, int]]]
    texts: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)  # field -> split -> values


@dataclass(frozen=True)
class WriteOptions:
    """Options of `write_dataset`."""

    shards: int | None = None  # of the largest split; others get shards of equal size. None: `SHARD_BYTES`
    workers: int = 1  # number of threads
    verify: bool = True  # before an image is written, decode it as in training
    on_error: str = "fail"  # fail | skip, for images that cannot be read or decoded
    scratch: Path | None = None  # local folder for shards that are then uploaded to a bucket
    part: tuple[int, int] = (0, 1)  # (i, n): write shards i, i + n, i + 2n, ...
    orientation: Orientation = "exif"  # of images that are converted to PNG


DEFAULT_OPTIONS = WriteOptions()


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    split: str
    file: str
    examples: list[tuple[ImageSource, int]]
    texts: list[dict[str, str]]  # additional text fields of each example
    made_of: str  # as in `ShardEntry`
    verify: bool
    orientation: Orientation

    def matches(self, entry: ShardEntry) -> bool:
        """Return whether the shard of an entry was written from the same images, labels and texts."""
        return entry.made_of == self.made_of and entry.count + len(entry.missing) == len(self.examples)


def _get_source_name(source: ImageSource) -> str:
    if isinstance(source, RecordLocation):
        return source.name
    return "an image in memory" if isinstance(source, bytes) else escape_unprintable(str(source))


def _describe_source(source: ImageSource) -> str:
    """Return the name of a source, with the name of the file that a record stores, for messages."""
    stored = ""
    if isinstance(source, RecordLocation):
        with suppress(OSError):
            stored = read_source_name(source)
    return f"{_get_source_name(source)} ({stored})" if stored else _get_source_name(source)


def _get_size(source: ImageSource) -> int:
    if isinstance(source, RecordLocation):
        return source.length
    return len(source) if isinstance(source, bytes) else os.path.getsize(source)


def _format_identity(source: ImageSource) -> str:
    """Identify the content of an image, by a hash of the bytes, an address in a bucket, or file size and time."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    path = source.path if isinstance(source, RecordLocation) else source
    if address := identify_staged_file(path):  # in other pods, the local copy has another path and time
        return f"{address} {source.record_index}" if isinstance(source, RecordLocation) else address
    status = os.stat(path)
    return f"{_get_source_name(source)} {status.st_size} {status.st_mtime_ns}"


def _read(source: ImageSource) -> bytes:
    if isinstance(source, RecordLocation):
        return read_image(source)
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def convert_for_storage(data: bytes, orientation: Orientation) -> bytes:
    """Verify an encoded image with the decoder of training, and convert it to what records store.

    JPEG and PNG are stored unchanged. Others become PNG with the pixels that training would read: the first frame,
    without alpha, upright if `orientation` is "exif". Pillow decodes only TIFF, which TensorFlow does not.

    Raises:
        ValueError: the image cannot be decoded; the message is the reason.
    """
    import tensorflow as tf

    from trainer.data.decoding import decode_full_size, describe_decoding_error

    is_tiff = data[:4] in TIFF_MAGIC
    try:
        pixels = _decode_tiff(data, orientation) if is_tiff else decode_full_size(data, orientation)
    except tf.errors.OpError as error:
        raise ValueError(describe_decoding_error(error)) from None
    unchanged = data.startswith((b"\xff\xd8\xff", b"\x89PNG"))
    return data if unchanged else tf.io.encode_png(pixels).numpy()


def _decode_tiff(data: bytes, orientation: Orientation) -> np.ndarray:
    """Decode a TIFF with Pillow to uint8 [H, W, 3]. Raise a ValueError if that fails, or if it has 16 or 32 bits."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and unusual metadata
            with Image.open(io.BytesIO(data)) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"has pixels of mode {image.mode}; save it with 8 bits per channel")
                upright = ImageOps.exif_transpose(image) if orientation == "exif" else image
                return np.asarray(upright.convert("RGB"))
    except Exception as error:  # corrupt bytes raise many types, such as struct.error and zlib.error
        raise ValueError(str(error)) from None


def _write_shard(job: ShardJob, folder: Path, image_done: Callable[[], None]) -> tuple[Path, ShardEntry]:
    """Write one shard to a new temporary file in `folder`. Return the path and the entry of the shard."""
    temporary = make_temporary_name(folder / job.file)
    try:
        return temporary, _write_records(job, temporary, image_done)
    except BaseException:
        with suppress(OSError):  # must not hide the error
            temporary.unlink(missing_ok=True)  # on a full disk each start would leave one more
        raise


def _write_records(job: ShardJob, temporary: Path, image_done: Callable[[], None]) -> ShardEntry:
    """Write the records of a shard to a file; return its entry."""
    faults, missing = [], []
    crc = size = records = 0
    with add_path_to_errors(temporary), open(temporary, "wb") as file:
        for index, ((source, label), texts) in enumerate(zip(job.examples, job.texts, strict=True)):
            try:
                image = _read(source)
                payload = serialize(convert_for_storage(image, job.orientation) if job.verify else image, label, texts)
            except (OSError, ValueError, DataError) as error:
                faults.append(f"{_describe_source(source)}: {error.problem if isinstance(error, DataError) else error}")
                missing.append(index)
            else:
                record = frame_record(payload)
                file.write(record)
                crc, size, records = google_crc32c.extend(crc, record), size + len(record), records + 1
            image_done()
        file.flush()
        os.fsync(file.fileno())
    return ShardEntry(job.file, records, size, f"{crc:08x}", job.made_of, tuple(faults), tuple(missing))


def _plan_shards(name: str, images: LabeledImages, options: WriteOptions) -> list[ShardJob]:
    """Divide the examples of each split into shards of about equal size."""
    splits = {split: examples for split, examples in images.splits.items() if len(examples)}
    sizes = {split: sum(_get_size(source) for source, _ in examples) for split, examples in splits.items()}
    shard_size = max(sizes.values()) / options.shards if options.shards else SHARD_BYTES
    jobs: list[ShardJob] = []
    for split, examples in splits.items():
        count = min(len(examples), max(1, math.ceil(sizes[split] / max(shard_size, 1) - 1e-9)))
        bounds = np.linspace(0, len(examples), count + 1).round().astype(int)
        for index in range(count):
            rows = slice(bounds[index], bounds[index + 1])
            members = list(examples[rows])
            identities = [(_format_identity(source), int(label)) for source, label in members]
            content: list[Any] = [list(images.class_names), options.verify, options.orientation, identities]
            columns = {field: values[split][rows] for field, values in images.texts.items()}
            texts = [{field: values[i] for field, values in columns.items()} for i in range(len(members))]
            content.append(texts)
            made_of = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
            file = f"{name}-{split}.tfrecord-{index:05d}-of-{count:05d}"
            jobs.append(ShardJob(split, file, members, texts, made_of, options.verify, options.orientation))
    return jobs


def write_dataset(
    folder: str | Path | StoragePath,
    images: LabeledImages,
    options: WriteOptions = DEFAULT_OPTIONS,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[ShardEntry] | None:
    """Write a folder in TFDS's format: shards `<name>-<split>.tfrecord-0000i-of-0000n`, then the metadata.

    Each shard is written to a temporary file, flushed, and renamed or uploaded. Then its entry (records, bytes, CRC32C)
    is stored. A finished shard whose sources are unchanged is not written again, so that the same call continues an
    interrupted one. With `verify`, JPEG and PNG bytes are stored unchanged, and any other image as PNG. Without it, all
    bytes are stored unchanged. `progress` is called with the count of images done and the total.

    Returns:
        The entries of all shards, in the order of the splits, or None if shards of other parts are missing. The part
        that completes the shards writes the metadata.

    Raises:
        DataError: `folder` has other files or is not writable, an image is missing or cannot be read or decoded (with
            on_error="fail"), or a shard has no readable image.
    """
    out = DatasetFolder(folder if isinstance(folder, StoragePath) else storage_path(folder), options.scratch)
    name = re.sub(r"\W+", "_", images.name).strip("_").lower() or "images"
    name = make_file_stem(name if name[0].isalpha() else f"data_{name}")
    try:
        jobs = _plan_shards(name, images, options)
    except OSError as error:
        raise unreadable_error(error.filename, error) from None
    first, step = options.part
    out.create({job.file for job in jobs}, alone=step == 1)

    def find_finished() -> dict[str, ShardEntry]:
        """Return the entries of intact shards that were written from the same images."""
        entries = {file: e for file, e in out.read_entries().items() if not e.skipped or options.on_error == "skip"}
        known = [(job, entries[job.file]) for job in jobs if job.file in entries]
        return {job.file: entry for job, entry in known if job.matches(entry) and out.has_intact(entry)}

    entries = find_finished()
    part_jobs = jobs[first::step]
    missing_jobs = [job for job in part_jobs if job.file not in entries]
    if missing_jobs:  # the folder must not be readable as a dataset while shards are missing
        (out.folder / INFO).delete()
    total = sum(len(job.examples) for job in part_jobs)
    done_before = total - sum(len(job.examples) for job in missing_jobs)
    faults: list[str] = []
    failed = False  # a shard has faults that are not skipped, or no readable image
    written = _write_shards(
        missing_jobs, out.scratch, options.workers, lambda done: progress(done_before + done, total)
    )
    for temporary, entry in written:
        faults += entry.skipped
        if entry.skipped and (options.on_error == "fail" or not entry.count):
            failed = True
            temporary.unlink()
        else:
            out.commit(temporary, entry)
            entries[entry.file] = entry
    if failed:
        listed = join_first(sorted(faults), "\n  ")
        problem = f"{len(faults)} image{'s' * (len(faults) > 1)} cannot be read or decoded:\n  {listed}"
        raise DataError(problem, fix="repair or remove them, or set data.on_error=skip")
    progress(total, total)
    if step > 1:  # other parts can have written their shards meanwhile
        entries = find_finished()
    if len(entries) < len(jobs):
        return None
    manifest: dict[str, list[ShardEntry]] = {}
    labels = {}  # int32 [records] of each shard
    for job in jobs:
        manifest.setdefault(job.split, []).append(entries[job.file])
        missing = np.array(entries[job.file].missing, np.int64)
        labels[job.file] = np.delete(np.array([label for _, label in job.examples], np.int32), missing)
    out.finish(name, images.class_names, manifest, labels, list(images.texts))
    return [entries[job.file] for job in jobs]


def _write_shards(jobs: list[ShardJob], folder: Path, workers: int, progress: Callable[[int], None]) -> Any:
    """Write shards in threads, since decoding releases the GIL. Yield the temporary file and entry of each shard."""
    done: list[None] = []  # one element per image: appending needs no lock
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield _write_shard(job, folder, lambda: done.append(None))
            progress(len(done))
        return
    with ThreadPoolExecutor(min(workers, len(jobs))) as pool:
        ended: set[Future[tuple[Path, ShardEntry]]] = set()
        pending = {pool.submit(_write_shard, job, folder, lambda: done.append(None)) for job in jobs}
        try:
            while pending:
                ended, pending = wait(pending, timeout=0.25, return_when="FIRST_COMPLETED")
                progress(len(done))
                for future in ended:
                    yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for future in (*ended, *pending):
                future.add_done_callback(_discard_shard)
            raise


def _discard_shard(written: Future[tuple[Path, ShardEntry]]) -> None:
    """Delete a shard that is not committed."""
    if not written.cancelled() and not written.exception():
        with suppress(OSError):
            written.result()[0].unlink(missing_ok=True)
