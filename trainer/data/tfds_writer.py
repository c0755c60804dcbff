"""Write labeled images as sharded TFRecord files in TFDS's folder format, in several threads.

This module imports TensorFlow only to verify images, which are decoded as in training.
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
    make_unreadable_error,
    read_image,
    read_source_name,
    serialize_example,
)
from trainer.data.tfds_folder import INFO_FILE, DatasetFolder, ShardEntry
from trainer.errors import DataError
from trainer.names import escape_unprintable, make_file_stem
from trainer.storage.base import StoragePath
from trainer.storage.local import add_path_to_errors, make_temporary_path
from trainer.storage.path import storage_path
from trainer.storage.staging import identify_staged_file
from trainer.types import Orientation

ImageSource = str | Path | bytes | RecordLocation  # path of an image file, encoded image, or record with an image
TIFF_MAGIC = (b"II*\0", b"MM\0*")  # first bytes of a little-endian and of a big-endian TIFF
DEFAULT_SHARD_BYTES = 100 * 2**20  # approximate size of a shard if the number of shards is not configured


@dataclass(frozen=True)
class LabeledImages:
    """A dataset to write."""

    name: str  # of the dataset
    class_names: Sequence[str]  # by class index
    # Name of each split -> image and class index of each record. Empty splits are not written.
    splits: Mapping[str, Sequence[tuple[ImageSource, int]]]
    # Name of each additional field of the records -> name of each split -> text of each record.
    texts: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class WriteOptions:
    """Options of `write_dataset`."""

    # Number of shards in the largest split. Other splits get shards of about the same size. None for shards of about
    # `DEFAULT_SHARD_BYTES` bytes.
    shards: int | None = None
    workers: int = 1  # number of threads
    verify: bool = True  # whether to decode each image as in training before it is written
    on_error: str = "fail"  # fail | skip, for images that cannot be read or decoded
    scratch: Path | None = None  # local folder for shards before they are uploaded to a bucket
    part: tuple[int, int] = (0, 1)  # (i, n) to write shards i, i + n, i + 2n, ...
    orientation: Orientation = "exif"  # exif: images that are converted to PNG are turned upright


DEFAULT_OPTIONS = WriteOptions()


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write."""

    split: str  # name of the split
    file: str  # name of the shard file
    examples: list[tuple[ImageSource, int]]  # image and class index of each example
    texts: list[dict[str, str]]  # additional fields of each example: name -> text
    made_of: str  # as in `ShardEntry`
    verify: bool  # as in `WriteOptions`
    orientation: Orientation  # as in `WriteOptions`

    def matches(self, entry: ShardEntry) -> bool:
        """Return whether an entry's shard was written from the same examples, with the same options."""
        return entry.made_of == self.made_of and entry.count + len(entry.missing) == len(self.examples)


def _get_source_name(source: ImageSource) -> str:
    """Return the path of an image file, or a record as PATH#INDEX, escaped for display."""
    if isinstance(source, RecordLocation):
        return source.name
    return "an image in memory" if isinstance(source, bytes) else escape_unprintable(str(source))


def _describe_source(source: ImageSource) -> str:
    """Return a source's name for messages. For a record, append the image file name that it stores, if any."""
    file_name = ""
    if isinstance(source, RecordLocation):
        with suppress(OSError):
            file_name = read_source_name(source)
    return f"{_get_source_name(source)} ({file_name})" if file_name else _get_source_name(source)


def _get_num_bytes(source: ImageSource) -> int:
    """Return the size in bytes of an encoded image, or of the record payload that contains the image."""
    if isinstance(source, RecordLocation):
        return source.length
    return len(source) if isinstance(source, bytes) else os.path.getsize(source)


def _format_identity(source: ImageSource) -> str:
    """Return a text that changes whenever the content of an image changes.

    For encoded bytes, it is a hash. For a file, it is the name and version in a bucket, or the path, size and
    modification time. For a record, it is the same for the shard, with the index of the record.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    path = source.path if isinstance(source, RecordLocation) else source
    if version := identify_staged_file(path):  # other pods' local copies have other paths and times
        return f"{version} {source.record_index}" if isinstance(source, RecordLocation) else version
    stat = os.stat(path)
    return f"{_get_source_name(source)} {stat.st_size} {stat.st_mtime_ns}"


def _read_encoded(source: ImageSource) -> bytes:
    """Read the encoded image of a source."""
    if isinstance(source, RecordLocation):
        return read_image(source)
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def convert_for_storage(data: bytes, orientation: Orientation) -> bytes:
    """Verify that an image can be decoded as in training, and return the encoded image to store in a record.

    A JPEG or PNG is returned unchanged. An image in another format is converted to PNG with the pixels that training
    would read: the first frame, without alpha, and turned upright if `orientation` is "exif". A TIFF is decoded with
    Pillow, because TensorFlow cannot decode it.

    Args:
        data: the encoded image.

    Raises:
        ValueError: the image cannot be decoded. The message states the reason.
    """
    import tensorflow as tf

    from trainer.data.decoding import decode_full_size, describe_decoding_error

    is_tiff = data[:4] in TIFF_MAGIC
    try:
        pixels = _decode_tiff(data, orientation) if is_tiff else decode_full_size(data, orientation)
    except tf.errors.OpError as error:
        raise ValueError(describe_decoding_error(error)) from None
    is_jpeg_or_png = data.startswith((b"\xff\xd8\xff", b"\x89PNG"))
    return data if is_jpeg_or_png else tf.io.encode_png(pixels).numpy()


def _decode_tiff(data: bytes, orientation: Orientation) -> np.ndarray:
    """Decode a TIFF with Pillow to uint8 [H, W, 3].

    Raises ValueError if decoding fails, or if the image has 16 or 32 bits per channel.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about large images and unusual metadata
            with Image.open(io.BytesIO(data)) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"has pixels of mode {image.mode}; save it with 8 bits per channel")
                upright = ImageOps.exif_transpose(image) if orientation == "exif" else image
                return np.asarray(upright.convert("RGB"))
    except Exception as error:  # corrupt bytes raise many exception types, such as struct.error and zlib.error
        raise ValueError(str(error)) from None


def _write_shard(plan: ShardPlan, folder: Path, report_image: Callable[[], None]) -> tuple[Path, ShardEntry]:
    """Write a shard to a new temporary file in `folder`. Return the file's path and the shard's entry.

    `report_image` is called after each image. If the shard cannot be written, the file is deleted.
    """
    temporary_path = make_temporary_path(folder / plan.file)
    try:
        return temporary_path, _write_records(plan, temporary_path, report_image)
    except BaseException:
        with suppress(OSError):  # a second error must not hide the first
            temporary_path.unlink(missing_ok=True)  # on a full disk, each start would leave one more file
        raise


def _write_records(plan: ShardPlan, temporary_path: Path, report_image: Callable[[], None]) -> ShardEntry:
    """Write a shard's records to the file `temporary_path`, and return the shard's entry.

    Images that cannot be read or decoded are left out and listed in the entry.
    """
    errors, missing_indices = [], []
    crc = size = num_records = 0
    with add_path_to_errors(temporary_path), open(temporary_path, "wb") as file:
        for index, ((source, label), texts) in enumerate(zip(plan.examples, plan.texts, strict=True)):
            try:
                data = _read_encoded(source)
                payload = serialize_example(
                    convert_for_storage(data, plan.orientation) if plan.verify else data, label, texts
                )
            except (OSError, ValueError, DataError) as error:
                errors.append(f"{_describe_source(source)}: {error.problem if isinstance(error, DataError) else error}")
                missing_indices.append(index)
            else:
                record = frame_record(payload)
                file.write(record)
                crc, size, num_records = google_crc32c.extend(crc, record), size + len(record), num_records + 1
            report_image()
        file.flush()
        os.fsync(file.fileno())
    return ShardEntry(plan.file, num_records, size, f"{crc:08x}", plan.made_of, tuple(errors), tuple(missing_indices))


def _plan_shards(name: str, images: LabeledImages, options: WriteOptions) -> list[ShardPlan]:
    """Divide the examples of each split into shards with equal numbers of examples (or 1 more)."""
    splits = {split: examples for split, examples in images.splits.items() if len(examples)}
    sizes = {split: sum(_get_num_bytes(source) for source, _ in examples) for split, examples in splits.items()}
    shard_size = max(sizes.values()) / options.shards if options.shards else DEFAULT_SHARD_BYTES
    plans: list[ShardPlan] = []
    for split, examples in splits.items():
        # The tolerance is for rounding errors, which would add a shard to the largest split.
        num_shards = min(len(examples), max(1, math.ceil(sizes[split] / max(shard_size, 1) - 1e-9)))
        bounds = np.linspace(0, len(examples), num_shards + 1).round().astype(int)
        for index in range(num_shards):
            rows = slice(bounds[index], bounds[index + 1])
            shard_examples = list(examples[rows])
            identities = [(_format_identity(source), int(label)) for source, label in shard_examples]
            content: list[Any] = [list(images.class_names), options.verify, options.orientation, identities]
            columns = {field: values[split][rows] for field, values in images.texts.items()}
            texts = [{field: values[i] for field, values in columns.items()} for i in range(len(shard_examples))]
            content.append(texts)
            made_of = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
            file = f"{name}-{split}.tfrecord-{index:05d}-of-{num_shards:05d}"
            plans.append(ShardPlan(split, file, shard_examples, texts, made_of, options.verify, options.orientation))
    return plans


def write_dataset(
    folder: str | Path | StoragePath,
    images: LabeledImages,
    options: WriteOptions = DEFAULT_OPTIONS,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[ShardEntry] | None:
    """Write a folder in TFDS's format: shards named `NAME-SPLIT.tfrecord-0000i-of-0000n`, then the metadata.

    Each shard is written to a temporary file, flushed, and renamed or uploaded. Then its `ShardEntry` is stored. A
    finished shard whose sources are unchanged is not written again, so that a second call completes an interrupted one.
    If `options.verify` is set, JPEG and PNG images are stored unchanged, and images in other formats are converted to
    PNG. Otherwise all images are stored unchanged.

    Args:
        folder: the dataset's folder, local or in a bucket.
        progress: called with the number of images written so far and the total number of images in `options.part`.

    Returns:
        The entries of all shards, in the order of the splits, or None if shards of other parts are missing. The part
        that completes the dataset writes the metadata.

    Raises:
        DataError: `folder` contains other files or cannot be written to, an image file does not exist, a shard has no
            readable image, or an image cannot be read or decoded and `options.on_error` is "fail".
        Interrupted: a bucket does not respond, or `folder` cannot be created because a disk is full or fails.
        OSError: a shard cannot be written.
    """
    output_folder = DatasetFolder(folder if isinstance(folder, StoragePath) else storage_path(folder), options.scratch)
    name = re.sub(r"\W+", "_", images.name).strip("_").lower() or "images"
    name = make_file_stem(name if name[0].isalpha() else f"data_{name}")
    try:
        all_plans = _plan_shards(name, images, options)
    except OSError as error:
        raise make_unreadable_error(error.filename, error) from None
    part_index, num_parts = options.part
    output_folder.create({plan.file for plan in all_plans}, is_only_writer=num_parts == 1)

    def read_finished() -> dict[str, ShardEntry]:
        """Return the entries of intact shards that were written from the same examples, by file name."""
        entries = {f: e for f, e in output_folder.read_entries().items() if not e.skipped or options.on_error == "skip"}
        candidates = [(plan, entries[plan.file]) for plan in all_plans if plan.file in entries]
        return {p.file: e for p, e in candidates if p.matches(e) and output_folder.has_intact_shard(e)}

    entries = read_finished()
    part_plans = all_plans[part_index::num_parts]
    missing_plans = [plan for plan in part_plans if plan.file not in entries]
    if missing_plans:  # the folder must not be readable as a dataset while shards are missing
        (output_folder.folder / INFO_FILE).delete()
    total = sum(len(plan.examples) for plan in part_plans)
    num_done_before = total - sum(len(plan.examples) for plan in missing_plans)
    errors: list[str] = []
    has_failed = False  # whether any shard has unreadable images that must not be skipped, or no readable image
    written_shards = _write_shards(
        missing_plans, output_folder.scratch, options.workers, lambda done: progress(num_done_before + done, total)
    )
    for temporary_path, entry in written_shards:
        errors += entry.skipped
        if entry.skipped and (options.on_error == "fail" or not entry.count):
            has_failed = True
            temporary_path.unlink()
        else:
            output_folder.commit(temporary_path, entry)
            entries[entry.file] = entry
    if has_failed:
        error_lines = join_first(sorted(errors), "\n  ")
        problem = f"{len(errors)} image{'s' * (len(errors) > 1)} cannot be read or decoded:\n  {error_lines}"
        raise DataError(problem, fix="repair or remove them, or set data.on_error=skip")
    progress(total, total)
    if num_parts > 1:  # other pods may have written their shards meanwhile
        entries = read_finished()
    if len(entries) < len(all_plans):
        return None
    split_entries: dict[str, list[ShardEntry]] = {}
    labels = {}  # file name -> int32 [records]
    for plan in all_plans:
        split_entries.setdefault(plan.split, []).append(entries[plan.file])
        missing_indices = np.array(entries[plan.file].missing, np.int64)
        labels[plan.file] = np.delete(np.array([label for _, label in plan.examples], np.int32), missing_indices)
    output_folder.finish(name, images.class_names, split_entries, labels, list(images.texts))
    return [entries[plan.file] for plan in all_plans]


def _write_shards(plans: list[ShardPlan], folder: Path, num_threads: int, progress: Callable[[int], None]) -> Any:
    """Write shards in `num_threads` threads. Yield each shard's temporary file and entry as soon as it is written.

    Threads suffice, because decoding releases the GIL. `progress` is called with the number of images written so far.
    """
    done_marks: list[None] = []  # one element per image, because appending to a list needs no lock
    if num_threads <= 1 or len(plans) <= 1:
        for plan in plans:
            yield _write_shard(plan, folder, lambda: done_marks.append(None))
            progress(len(done_marks))
        return
    with ThreadPoolExecutor(min(num_threads, len(plans))) as pool:
        completed: set[Future[tuple[Path, ShardEntry]]] = set()
        pending = {pool.submit(_write_shard, plan, folder, lambda: done_marks.append(None)) for plan in plans}
        try:
            while pending:
                completed, pending = wait(pending, timeout=0.25, return_when="FIRST_COMPLETED")
                progress(len(done_marks))
                for future in completed:
                    yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for future in (*completed, *pending):
                future.add_done_callback(_delete_written_shard)
            raise


def _delete_written_shard(future: Future[tuple[Path, ShardEntry]]) -> None:
    """Delete the temporary file that a completed `_write_shard` call returned, because it will not be committed."""
    if not future.cancelled() and not future.exception():
        with suppress(OSError):
            future.result()[0].unlink(missing_ok=True)
