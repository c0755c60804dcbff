"""Write labelled images as sharded TFRecords in TFDS's folder format, in several processes.

It does not import TensorFlow, which would take seconds in each process.
"""

import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from trainer.data.records import RecordAt, frame_record, join_first, read_image, serialize, unreadable
from trainer.data.tfds_folder import INFO, DatasetFolder, ShardEntry
from trainer.errors import INTERRUPTED, DataError
from trainer.storage.base import StoragePath
from trainer.storage.path import storage_path
from trainer.storage.staging import origin

ImageSource = str | Path | bytes | RecordAt
SHARD_BYTES = 100 * 2**20  # approximate size of a shard if the number of shards is not configured


@dataclass(frozen=True)
class LabelledImages:
    """A dataset to write; splits have (image, label) pairs in the order of their records, empty splits are omitted."""

    name: str
    class_names: Sequence[str]
    splits: Mapping[str, Sequence[tuple[ImageSource, int]]]
    group_field: str | None = None  # name of an additional text field of the records
    groups: Mapping[str, Sequence[str]] | None = None  # by split, its value for each example


@dataclass(frozen=True)
class WriteOptions:
    """Options of `write_dataset`."""

    shards: int | None = None  # of the largest split, other splits get shards of its size; None: of `SHARD_BYTES`
    workers: int = 1  # number of processes; with 1 this process writes
    verify: bool = True  # decode each image with Pillow before it is written
    on_error: str = "fail"  # fail | skip, for images that cannot be read or decoded
    scratch: Path | None = None  # local folder in which shards are written before they are uploaded to a bucket
    part: tuple[int, int] = (0, 1)  # (i, n): write shards i, i + n, i + 2n, ...


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

    def fits(self, entry: ShardEntry) -> bool:
        """Return whether the shard of this entry was written from the same images, labels and texts."""
        return entry.made_of == self.made_of and entry.count + len(entry.missing) == len(self.examples)


def _name_of(source: ImageSource) -> str:
    if isinstance(source, RecordAt):
        return source.name
    return "an image in memory" if isinstance(source, bytes) else str(source)


def _size_of(source: ImageSource) -> int:
    if isinstance(source, RecordAt):
        return source.length
    return len(source) if isinstance(source, bytes) else os.path.getsize(source)


def _identity(source: ImageSource) -> str:
    """Return a text that changes when the image changes: hash of the bytes, address in a bucket, or size and time."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    path = source.path if isinstance(source, RecordAt) else source
    if address := origin(path):  # in other pods, the local copy has another path and time
        return f"{address} {source.number}" if isinstance(source, RecordAt) else address
    status = os.stat(path)
    return f"{_name_of(source)} {status.st_size} {status.st_mtime_ns}"


def _read(source: ImageSource) -> bytes:
    if isinstance(source, RecordAt):
        return read_image(source)
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def as_stored(data: bytes) -> bytes:
    """Verify an encoded image, and return it as records store it: JPEG and PNG unchanged, others as PNG (first frame).

    Raises:
        ValueError: Pillow cannot decode the image completely; the message is the reason.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and unusual metadata
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if image.format in ("JPEG", "MPO", "PNG"):  # MPO: a JPEG of a camera, followed by further images
                    return data
                mode = {"1": "L", "L": "L", "RGBA": "RGBA"}.get(image.mode, "RGB")
                out = io.BytesIO()
                (image if image.mode == mode else image.convert(mode)).save(out, "PNG")
                return out.getvalue()
    except Exception as error:  # damaged bytes raise many types, such as struct.error and zlib.error
        raise ValueError(str(error) if "BytesIO" not in str(error) else "not an image format of Pillow") from None


_images_done: Any = None  # counter of all writing processes, a multiprocessing.Value


def _start_worker(counter: Any) -> None:
    """Set the shared counter of a writing process, and end the process when its parent ends, even if that is killed."""
    global _images_done
    _images_done = counter
    if parent := multiprocessing.parent_process():

        def end_with_parent() -> None:
            parent.join()
            os._exit(INTERRUPTED)

        threading.Thread(target=end_with_parent, daemon=True).start()


def _write_shard(job: ShardJob, folder: Path) -> tuple[Path, ShardEntry]:
    """Write one shard to a new temporary file in `folder`; return its path and the entry of the shard."""
    temporary, faults, missing = folder / f".{job.file}.{uuid.uuid4().hex}.tmp", [], []
    crc = size = count = 0
    with open(temporary, "wb") as file:
        for number, ((source, label), texts) in enumerate(zip(job.examples, job.texts, strict=True)):
            try:
                image = _read(source)
                payload = serialize(as_stored(image) if job.verify else image, label, texts)
            except (OSError, ValueError, DataError) as error:
                faults.append(f"{_name_of(source)}: {error.problem if isinstance(error, DataError) else error}")
                missing.append(number)
            else:
                record = frame_record(payload)
                file.write(record)
                crc, size, count = google_crc32c.extend(crc, record), size + len(record), count + 1
            with _images_done.get_lock():
                _images_done.value += 1
        file.flush()
        os.fsync(file.fileno())
    return temporary, ShardEntry(job.file, count, size, f"{crc:08x}", job.made_of, tuple(faults), tuple(missing))


def _plan_shards(name: str, images: LabelledImages, shards: int | None, verify: bool) -> list[ShardJob]:
    """Divide the examples of each split into shards of about equal size."""
    splits = {split: examples for split, examples in images.splits.items() if len(examples)}
    sizes = {split: sum(_size_of(source) for source, _ in examples) for split, examples in splits.items()}
    shard_size = max(sizes.values()) / shards if shards else SHARD_BYTES
    jobs: list[ShardJob] = []
    for split, examples in splits.items():
        count = min(len(examples), max(1, math.ceil(sizes[split] / max(shard_size, 1) - 1e-9)))
        bounds = np.linspace(0, len(examples), count + 1).round().astype(int)
        for number in range(count):
            rows = slice(bounds[number], bounds[number + 1])
            members = list(examples[rows])
            identities = [(_identity(source), int(label)) for source, label in members]
            content: list[Any] = [list(images.class_names), verify, identities]
            texts: list[dict[str, str]] = [{}] * len(members)
            if images.group_field and images.groups:
                texts = [{images.group_field: value} for value in images.groups[split][rows]]
                content.append(texts)
            made_of = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
            file = f"{name}-{split}.tfrecord-{number:05d}-of-{count:05d}"
            jobs.append(ShardJob(split, file, members, texts, made_of, verify))
    return jobs


def write_dataset(
    folder: str | Path | StoragePath,
    images: LabelledImages,
    options: WriteOptions = DEFAULT_OPTIONS,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[ShardEntry] | None:
    """Write a folder in TFDS's format: shards `<name>-<split>.tfrecord-0000i-of-0000n`, then the metadata.

    Each shard is written to a temporary file, flushed and renamed or uploaded; then its entry (records, bytes, CRC32C)
    is stored. A finished shard whose sources are unchanged is not written again, so that the same call continues an
    interrupted one. With `verify`, JPEG and PNG bytes are stored unchanged and any other image as PNG; without it, all
    bytes are stored unchanged. `progress` is called with the number of images done and the total number.

    Returns:
        The entries of all shards, in the order of the splits; None if shards of other parts are missing. The part that
        completes them writes the metadata.

    Raises:
        DataError: `folder` has other files or is not writable; an image is missing, or cannot be read or decoded
            (on_error="fail"), or a shard has no readable image.
    """
    out = DatasetFolder(folder if isinstance(folder, StoragePath) else storage_path(folder), options.scratch)
    name = re.sub(r"\W+", "_", images.name).strip("_").lower() or "images"
    name = name if name[0].isalpha() else f"data_{name}"
    try:
        jobs = _plan_shards(name, images, options.shards, options.verify)
    except OSError as error:
        raise unreadable(error.filename, error) from None
    out.create({job.file for job in jobs})

    def finished() -> dict[str, ShardEntry]:
        """Return the entries of shards that exist, are intact and were written from the same images."""
        entries = {file: e for file, e in out.entries().items() if not e.skipped or options.on_error == "skip"}
        known = [(job, entries[job.file]) for job in jobs if job.file in entries]
        return {job.file: entry for job, entry in known if job.fits(entry) and out.holds(entry)}

    entries = finished()
    first, step = options.part
    part_jobs = jobs[first::step]
    missing_jobs = [job for job in part_jobs if job.file not in entries]
    if missing_jobs:  # the folder must not be readable as a dataset while shards are missing
        (out.folder / INFO).delete()
    total = sum(len(job.examples) for job in part_jobs)
    done_before = total - sum(len(job.examples) for job in missing_jobs)
    faults: list[str] = []
    failed = False  # a shard has faults that must not be skipped, or no readable image
    written = _run(missing_jobs, out.scratch, options.workers, lambda done: progress(done_before + done, total))
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
    if step > 1:  # other parts may have written their shards meanwhile
        entries = finished()
    if len(entries) < len(jobs):
        return None
    manifest: dict[str, list[ShardEntry]] = {}
    labels = {}  # int32 [records] of each shard
    for job in jobs:
        manifest.setdefault(job.split, []).append(entries[job.file])
        missing = np.array(entries[job.file].missing, np.int64)
        labels[job.file] = np.delete(np.array([label for _, label in job.examples], np.int32), missing)
    out.finish(name, images.class_names, manifest, labels, images.group_field)
    return [entries[job.file] for job in jobs]


def _run(jobs: list[ShardJob], folder: Path, workers: int, progress: Callable[[int], None]) -> Any:
    """Yield the temporary file and the entry of each shard when it is written."""
    global _images_done
    context = multiprocessing.get_context("spawn")  # a forked process may hang because of TensorFlow's threads
    counter = context.Value("q", 0)
    if workers <= 1 or len(jobs) <= 1:
        _images_done = counter
        for job in jobs:
            yield _write_shard(job, folder)
            progress(counter.value)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker, initargs=(counter,)) as pool:
        pending = {pool.submit(_write_shard, job, folder) for job in jobs}
        try:
            while pending:
                ended, pending = wait(pending, timeout=0.25, return_when="FIRST_COMPLETED")
                progress(counter.value)
                for future in ended:
                    yield future.result()
        except BaseException:  # cancel jobs that have not started, which could no longer read the counter
            pool.shutdown(wait=False, cancel_futures=True)
            raise
