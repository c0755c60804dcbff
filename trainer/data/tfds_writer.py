"""Write labelled images as sharded TFRecords in TFDS's folder format. Importing it does not import TensorFlow."""

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

from trainer.data.records import RecordAt, frame, read_image, serialize, unreadable
from trainer.data.tfds_folder import INFO, DatasetFolder, ShardEntry
from trainer.errors import INTERRUPTED, DataError
from trainer.storage.base import StoragePath
from trainer.storage.path import storage_path
from trainer.storage.staging import origin

ImageSource = str | Path | bytes | RecordAt
SHARD_BYTES = 100 * 2**20  # size of a shard if the number of shards is not given


@dataclass(frozen=True)
class LabelledImages:
    """A dataset to write: for each split (image, label) pairs in the order of the records; empty splits are omitted."""

    name: str
    class_names: Sequence[str]
    splits: Mapping[str, Sequence[tuple[ImageSource, int]]]
    group_field: str | None = None  # one more text field of the records
    groups: Mapping[str, Sequence[str]] | None = None  # its values by split, in the order of the examples


@dataclass(frozen=True)
class WriteOptions:
    """Options of `write_dataset`."""

    shards: int | None = None  # of the largest split, the others get shards of the same size; None: one per 100 MB
    workers: int = 1  # processes; 1 writes in this one
    verify: bool = True  # decode every image with Pillow first
    on_error: str = "fail"  # fail | skip: leave out images that cannot be decoded
    scratch: Path | None = None  # where shards for a bucket are written before they are uploaded
    part: tuple[int, int] = (0, 1)  # (i, n): write every n-th shard from the i-th on


USUAL = WriteOptions()


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    split: str
    file: str
    examples: list[tuple[ImageSource, int]]
    texts: list[dict[str, str]]  # by example, then by field
    made_of: str
    verify: bool

    def fits(self, entry: ShardEntry) -> bool:
        """Return whether the entry is of a shard that was written from the same images."""
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
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    path = source.path if isinstance(source, RecordAt) else source
    if address := origin(path):  # local copies of other pods have other paths and times
        return f"{address} {source.number}" if isinstance(source, RecordAt) else address
    facts = os.stat(path)
    return f"{_name_of(source)} {facts.st_size} {facts.st_mtime_ns}"


def _read(source: ImageSource) -> bytes:
    if isinstance(source, RecordAt):
        return read_image(source)
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def as_stored(data: bytes) -> bytes:
    """Return the bytes that a record stores: JPEG and PNG unchanged, the first frame of any other image as PNG.

    Raises:
        ValueError: Pillow cannot decode all of the image; the message is the reason.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and unusual metadata
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if image.format in ("JPEG", "MPO", "PNG"):  # MPO: a camera's JPEG with a preview after it
                    return data
                mode = {"1": "L", "L": "L", "RGBA": "RGBA"}.get(image.mode, "RGB")
                out = io.BytesIO()
                (image if image.mode == mode else image.convert(mode)).save(out, "PNG")
                return out.getvalue()
    except Exception as error:  # damaged bytes raise anything from struct.error to zlib.error
        raise ValueError(str(error) if "BytesIO" not in str(error) else "not an image that Pillow knows") from None


_done: Any = None  # the count of images done, shared by all writing processes


def _start_worker(counter: Any) -> None:
    global _done
    _done = counter
    if parent := multiprocessing.parent_process():  # if that is killed, nothing else ends this process

        def end_with_parent() -> None:
            parent.join()
            os._exit(INTERRUPTED)

        threading.Thread(target=end_with_parent, daemon=True).start()


def _write_shard(job: ShardJob, folder: Path) -> tuple[Path, ShardEntry]:
    """Write one shard to a temporary file that no other process uses."""
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
                record = frame(payload)
                file.write(record)
                crc, size, count = google_crc32c.extend(crc, record), size + len(record), count + 1
            with _done.get_lock():
                _done.value += 1
        file.flush()
        os.fsync(file.fileno())
    return temporary, ShardEntry(job.file, count, size, f"{crc:08x}", job.made_of, tuple(faults), tuple(missing))


def _plan(name: str, images: LabelledImages, shards: int | None, verify: bool) -> list[ShardJob]:
    splits = {split: examples for split, examples in images.splits.items() if len(examples)}
    sizes = {split: sum(_size_of(source) for source, _ in examples) for split, examples in splits.items()}
    shard_size = max(sizes.values()) / shards if shards else SHARD_BYTES
    jobs: list[ShardJob] = []
    for split, examples in splits.items():
        count = min(len(examples), max(1, math.ceil(sizes[split] / max(shard_size, 1) - 1e-9)))
        bounds = np.linspace(0, len(examples), count + 1).round().astype(int)
        for number in range(count):
            rows = slice(bounds[number], bounds[number + 1])
            chosen = list(examples[rows])
            facts: list[Any] = [list(images.class_names), verify, [(_identity(source), int(n)) for source, n in chosen]]
            texts: list[dict[str, str]] = [{}] * len(chosen)
            if images.group_field and images.groups:
                texts = [{images.group_field: value} for value in images.groups[split][rows]]
                facts.append(texts)
            made_of = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
            file = f"{name}-{split}.tfrecord-{number:05d}-of-{count:05d}"
            jobs.append(ShardJob(split, file, chosen, texts, made_of, verify))
    return jobs


def write_dataset(
    folder: str | Path | StoragePath,
    images: LabelledImages,
    options: WriteOptions = USUAL,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[ShardEntry] | None:
    """Write labelled images as a TFDS folder: `<name>-<split>.tfrecord-0000i-of-0000n`, metadata last.

    Each shard is written to a temporary file, flushed and renamed, then its record (count, bytes, CRC32C) is stored. A
    shard whose record still fits is not written again: the same call continues an interrupted one. JPEG and PNG bytes
    stay as they are, any other image becomes PNG.

    Args:
        progress: called with the images done and their total number.

    Returns:
        The manifest, in the order of the splits; None while shards of other parts are missing. The part that completes
        them writes the metadata.

    Raises:
        DataError: `folder` has other files or cannot be written; an image is missing or (on_error="fail") damaged.
    """
    out = DatasetFolder(folder if isinstance(folder, StoragePath) else storage_path(folder), options.scratch)
    name = re.sub(r"\W+", "_", images.name).strip("_").lower() or "images"
    name = name if name[0].isalpha() else f"data_{name}"
    try:
        jobs = _plan(name, images, options.shards, options.verify)
    except OSError as error:
        raise unreadable(error.filename, error) from None
    out.make_room({job.file for job in jobs})

    def finished() -> dict[str, ShardEntry]:
        entries = {file: e for file, e in out.entries().items() if not e.skipped or options.on_error == "skip"}
        fitting = {job.file: entries[job.file] for job in jobs if job.file in entries and job.fits(entries[job.file])}
        return {file: entry for file, entry in fitting.items() if out.holds(entry)}

    entries = finished()
    first, step = options.part
    mine = jobs[first::step]
    todo = [job for job in mine if job.file not in entries]
    if todo:  # the folder must not count as a dataset while shards are missing
        (out.folder / INFO).delete()
    total = sum(len(job.examples) for job in mine)
    ready = total - sum(len(job.examples) for job in todo)
    faults: list[str] = []
    failed = False  # a shard has faults that may not be skipped, or no image at all
    for temporary, entry in _run(todo, out.scratch, options.workers, lambda done: progress(ready + done, total)):
        faults += entry.skipped
        if entry.skipped and (options.on_error == "fail" or not entry.count):
            failed = True
            temporary.unlink()
        else:
            out.commit(temporary, entry)
            entries[entry.file] = entry
    if failed:
        listed = "\n  ".join(sorted(faults)[:5])
        problem = f"{len(faults)} image{'s' * (len(faults) > 1)} cannot be decoded:\n  {listed}"
        raise DataError(problem, fix="repair or remove them, or set data.on_error=skip")
    progress(total, total)
    if step > 1:  # other parts may have written theirs meanwhile
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
    """Yield the temporary file and the entry of each job as it ends."""
    global _done
    context = multiprocessing.get_context("spawn")  # a fork of a process with TensorFlow's threads may hang
    counter = context.Value("q", 0)
    if workers <= 1 or len(jobs) <= 1:
        _done = counter
        for job in jobs:
            yield _write_shard(job, folder)
            progress(counter.value)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker, initargs=(counter,)) as pool:
        waiting = {pool.submit(_write_shard, job, folder) for job in jobs}
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.25, return_when="FIRST_COMPLETED")
                progress(counter.value)
                for future in ended:
                    yield future.result()
        except BaseException:  # a job that starts after the error would not find the counter
            pool.shutdown(wait=False, cancel_futures=True)
            raise
