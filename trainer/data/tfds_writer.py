"""Writing labelled images as sharded TFRecords in TFDS's folder format. Nothing at module level imports TensorFlow."""

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

from trainer.data.records import RecordAt, frame, read_image, serialize
from trainer.data.tfds_folder import INFO, DatasetFolder, ShardEntry
from trainer.errors import INTERRUPTED, DataError
from trainer.storage.base import StoragePath
from trainer.storage.path import storage_path
from trainer.storage.staging import origin

ImageSource = str | Path | bytes | RecordAt
SHARD_BYTES = 100 * 2**20  # of a shard where no number of shards is given


@dataclass(frozen=True)
class LabelledImages:
    """A dataset to write: for each split (image, label) pairs in the order of the records; empty ones are left out."""

    name: str
    class_names: Sequence[str]
    splits: Mapping[str, Sequence[tuple[ImageSource, int]]]
    group_field: str | None = None  # one more text field of the records
    groups: Mapping[str, Sequence[str]] | None = None  # its values, of each split in the order of its examples


@dataclass(frozen=True)
class WriteOptions:
    """Options of `write_dataset`.

    Attributes:
        shards: of the largest split (the others get shards of the same size); None: one per 100 MB.
        workers: processes; 1 writes in this one.
        verify: decode every image with Pillow first.
        on_error: "fail", or "skip" to leave out images that cannot be decoded.
        scratch: where shards for a bucket are written before they are copied.
    """

    shards: int | None = None
    workers: int = 1
    verify: bool = True
    on_error: str = "fail"
    scratch: Path | None = None


USUAL = WriteOptions()


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    file: str
    examples: list[tuple[ImageSource, int]]
    texts: list[dict[str, str]]  # of each example, by field
    made_of: str
    verify: bool


def name_of(source: ImageSource) -> str:
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
    if there := origin(path):  # other pods have copies elsewhere, of other times
        return f"{there} {source.number}" if isinstance(source, RecordAt) else there
    facts = os.stat(path)
    return f"{name_of(source)} {facts.st_size} {facts.st_mtime_ns}"


def _read(source: ImageSource) -> bytes:
    if isinstance(source, RecordAt):
        return read_image(source)
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def as_stored(data: bytes) -> bytes:
    """The bytes that a record keeps: JPEG and PNG as they are, the first frame of anything else as PNG.

    Raises:
        ValueError: Pillow cannot decode all of the image; the message is the reason.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures and odd metadata are no concern here
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if image.format in ("JPEG", "MPO", "PNG"):  # MPO: a camera's JPEG with a preview behind it
                    return data
                mode = {"1": "L", "L": "L", "RGBA": "RGBA"}.get(image.mode, "RGB")
                out = io.BytesIO()
                (image if image.mode == mode else image.convert(mode)).save(out, "PNG")
                return out.getvalue()
    except Exception as error:  # damaged bytes raise anything from struct.error to zlib.error
        raise ValueError(str(error) if "BytesIO" not in str(error) else "not an image that Pillow knows") from None


_done: Any = None  # in a writing process: the shared count of images done


def _begin(counter: Any) -> None:
    global _done
    _done = counter
    if parent := multiprocessing.parent_process():  # when that is killed nothing else would end this process

        def follow() -> None:
            parent.join()
            os._exit(INTERRUPTED)

        threading.Thread(target=follow, daemon=True).start()


def _write_shard(job: Job, folder: Path) -> tuple[Path, ShardEntry]:
    """Write one shard beside its final name, under a name of its own: nobody else can be writing there."""
    temporary, faults, missing = folder / f".{job.file}.{uuid.uuid4().hex}.tmp", [], []
    crc = size = count = 0
    with open(temporary, "wb") as file:
        for number, ((source, label), texts) in enumerate(zip(job.examples, job.texts, strict=True)):
            try:
                image = _read(source)
                payload = serialize(as_stored(image) if job.verify else image, label, texts)
            except (OSError, ValueError, DataError) as error:
                faults.append(f"{name_of(source)}: {error}")
                missing.append(number)
            else:
                before, after = frame(payload)
                record = before + payload + after
                file.write(record)
                crc, size, count = google_crc32c.extend(crc, record), size + len(record), count + 1
            with _done.get_lock():
                _done.value += 1
        file.flush()
        os.fsync(file.fileno())
    return temporary, ShardEntry(job.file, count, size, f"{crc:08x}", job.made_of, tuple(faults), tuple(missing))


def _plan(name: str, images: LabelledImages, shards: int | None, verify: bool) -> dict[str, list[Job]]:
    splits = {split: examples for split, examples in images.splits.items() if len(examples)}
    sizes = {split: sum(_size_of(source) for source, _ in examples) for split, examples in splits.items()}
    shard_size = max(sizes.values()) / shards if shards else SHARD_BYTES
    plan: dict[str, list[Job]] = {}
    for split, examples in splits.items():
        count = min(len(examples), max(1, math.ceil(sizes[split] / max(shard_size, 1) - 1e-9)))
        bounds = np.linspace(0, len(examples), count + 1).round().astype(int)
        plan[split] = []
        for number in range(count):
            here = slice(bounds[number], bounds[number + 1])
            part = list(examples[here])
            facts: list[Any] = [list(images.class_names), verify, [(_identity(source), int(n)) for source, n in part]]
            texts: list[dict[str, str]] = [{}] * len(part)
            if images.group_field and images.groups:
                texts = [{images.group_field: value} for value in images.groups[split][here]]
                facts.append(texts)
            made_of = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
            file = f"{name}-{split}.tfrecord-{number:05d}-of-{count:05d}"
            plan[split].append(Job(file, part, texts, made_of, verify))
    return plan


def write_dataset(
    folder: str | Path | StoragePath,
    images: LabelledImages,
    options: WriteOptions = USUAL,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    part: tuple[int, int] = (0, 1),
) -> list[ShardEntry] | None:
    """Write labelled images as a TFDS folder: `<name>-<split>.tfrecord-0000i-of-0000n`, metadata last.

    Each shard is written beside its name, flushed, then made visible in one act; its record (count, bytes, CRC32C) is
    kept, and a shard whose record still fits is not written again: start the same command again to go on. JPEG and PNG
    bytes stay as they are, anything else becomes PNG.

    Args:
        folder: here or in a bucket.
        progress: called with the images done and their total number.
        part: (i, n): write every n-th shard from the i-th on. The part that finds all shards there writes the metadata.

    Returns:
        The manifest, in the order of the splits; None where shards of other parts are not there yet.

    Raises:
        DataError: the folder is taken or cannot be written; an image is missing or (on_error="fail") cannot be decoded.
    """
    out = DatasetFolder(folder if isinstance(folder, StoragePath) else storage_path(folder), options.scratch)
    name = re.sub(r"\W+", "_", images.name).strip("_").lower() or "images"
    name = name if name[0].isalpha() else f"data_{name}"
    try:
        plan = _plan(name, images, options.shards, options.verify)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    jobs = [job for parts in plan.values() for job in parts]
    out.make_room({job.file for job in jobs})
    before = out.entries()

    def fits(job: Job, entry: ShardEntry | None) -> bool:
        if entry is None or entry.made_of != job.made_of or (entry.skipped and options.on_error == "fail"):
            return False
        return entry.count + len(entry.missing) == len(job.examples) and out.holds(entry)

    entries = {job.file: before[job.file] for job in jobs if fits(job, before.get(job.file))}
    mine = [job for number, job in enumerate(jobs) if number % part[1] == part[0]]
    todo = [job for job in mine if job.file not in entries]
    if todo:  # until the last shard is there nobody must take the folder for a dataset
        (out.folder / INFO).delete()
    total, ready = sum(len(job.examples) for job in mine), sum(len(j.examples) for j in mine if j.file in entries)
    faults: list[str] = []
    bad: list[str] = []  # shards that cannot be: a fault where none may be, or not one good image
    for temporary, entry in _run(todo, out.scratch, options.workers, lambda done: progress(ready + done, total)):
        faults += entry.skipped
        if entry.skipped and (options.on_error == "fail" or not entry.count):
            bad.append(entry.file)
            temporary.unlink()
        else:
            out.commit(temporary, entry)
            entries[entry.file] = entry
    if bad:
        raise DataError(
            f"{len(faults)} image{'s' * (len(faults) > 1)} cannot be decoded; repair or remove "
            f"{'them' if len(faults) > 1 else 'it'}, or set data.on_error=skip:\n  " + "\n  ".join(sorted(faults)[:5])
        )
    progress(total, total)
    if part[1] > 1:  # others may have written theirs meanwhile
        now = out.entries()
        entries = {job.file: now[job.file] for job in jobs if fits(job, now.get(job.file))}
    if len(entries) < len(jobs):
        return None
    manifest = {split: [entries[job.file] for job in parts] for split, parts in plan.items()}
    labels = {}  # int32 [records] of each shard
    for job in jobs:
        missing = np.array(entries[job.file].missing, np.int64)
        labels[job.file] = np.delete(np.array([label for _, label in job.examples], np.int32), missing)
    out.finish(name, images.class_names, manifest, labels, images.group_field)
    return [entry for parts in manifest.values() for entry in parts]


def _run(jobs: list[Job], folder: Path, workers: int, progress: Callable[[int], None]) -> Any:
    """Yield the temporary file and the entry of each job as it ends."""
    global _done
    context = multiprocessing.get_context("spawn")  # a fork of a process that holds TensorFlow's threads may hang
    counter = context.Value("q", 0)
    if workers <= 1 or len(jobs) <= 1:
        _done = counter
        for job in jobs:
            yield _write_shard(job, folder)
            progress(counter.value)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_begin, initargs=(counter,)) as pool:
        waiting = {pool.submit(_write_shard, job, folder) for job in jobs}
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.25, return_when="FIRST_COMPLETED")
                progress(counter.value)
                for future in ended:
                    yield future.result()
        except BaseException:  # else all are waited for, and one that only starts now would not find the counter
            pool.shutdown(wait=False, cancel_futures=True)
            raise
