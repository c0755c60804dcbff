"""Note EXIF orientations, and PNGs with 16 bits per channel, in a sample of the encoded images of a dataset."""

import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np

from trainer.data.records import RecordLocation, locate_records, read_image
from trainer.data.splits import take
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.types import Split

MAX_FILES, MAX_RECORDS = 2000, 200  # maximum number of examined images, in files and in records
_HEAD_BYTES = 2**16  # bytes that are read at the beginning of a file, in which the EXIF data of a photo begin
_MAX_DECODED = 8  # number of 16-bit PNGs that are decoded to determine their maximum value
_ORIENTATION_TAG = 0x0112  # EXIF tag


def parse_orientation(data: bytes) -> int:
    """Return the EXIF orientation, 1 to 8, of an encoded image or its beginning.

    It is 1, which means upright, if there are no EXIF data or they are corrupt.
    """
    from PIL import Image

    # The markers of JPEG, PNG and WebP. In a WebP, the length of the chunk, 4 bytes, is between marker and data.
    for marker, skipped in ((b"Exif\0\0", 0), (b"eXIf", 0), (b"EXIF", 4)):
        start = data.find(marker)
        if start >= 0:
            with suppress(Exception):  # corrupt EXIF data raise many exception types
                exif = Image.Exif()
                exif.load(data[start + len(marker) + skipped :])
                value = exif.get(_ORIENTATION_TAG, 1)
                return value if value in range(1, 9) else 1
    return 1


def _make_sample_readers(split: Split) -> list[Callable[[int], bytes]]:
    """Make functions that each read one example of a sample: at most so many bytes of its file, or the whole record.

    With -1 they read the whole file.
    """

    def read_file(path: str, max_bytes: int) -> bytes:
        with open(path, "rb") as file:
            return file.read(max_bytes)

    def read_record(record: RecordLocation, _max_bytes: int) -> bytes:
        return read_image(record)

    if split.files:
        indices = np.unique(np.linspace(0, split.count - 1, min(split.count, MAX_FILES)).astype(int))
        return [partial(read_file, split.files[i]) for i in indices]
    # Only the first records, which are in few shards: to locate a record, all record headers of its shard are read.
    records = locate_records(take(split, np.arange(min(split.count, MAX_RECORDS))))
    return [partial(read_record, record) for record in records]


def examine_images(split: Split) -> list[str]:
    """Return notes on EXIF orientations and 16-bit PNGs in a sample of the training images, which must be local."""
    readers = _make_sample_readers(split)

    def examine(read: Callable[[int], bytes]) -> tuple[int, bytes]:
        """Return the EXIF orientation of an image, and its data if it is a 16-bit PNG, otherwise b""."""
        try:
            data = read(_HEAD_BYTES)
        except (OSError, DataError):  # the error is reported when the image is decoded
            return 1, b""
        health.record_progress()
        is_deep = data[:4] == b"\x89PNG" and data[24:25] == b"\x10"
        return parse_orientation(data), data if is_deep else b""

    with warnings.catch_warnings(), ThreadPoolExecutor(16) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about corrupt EXIF data
        results = list(pool.map(examine, readers))
    notes, deep_samples = [], [i for i, (_, data) in enumerate(results) if data]
    sample = f"{len(readers)}{'' if len(readers) == split.count else ' examined'} training images"
    if num_marked := sum(orientation > 1 for orientation, _ in results):
        treatment = "turned upright" if split.orientation == "exif" else "used as they are stored"
        summary = f"{num_marked} of {sample} {'has' if num_marked == 1 else 'have'} an EXIF orientation"
        notes.append(f"{summary}: {treatment} (data.orientation={split.orientation})")
    if deep_samples:
        notes.append(_note_depth([readers[i] for i in deep_samples], sample))
    return notes


def _note_depth(readers: list[Callable[[int], bytes]], examined: str) -> str:
    """Return a note on PNGs with 16 bits per channel, with their maximum value if they would become almost black.

    `examined` describes the sample, such as "200 examined training images".
    """
    from PIL import Image

    maximum = 0
    for read in readers[:_MAX_DECODED]:
        # Corrupt images raise many exception types, and are reported when they are decoded.
        with suppress(Exception), Image.open(io.BytesIO(read(-1))) as image:
            if image.mode.startswith("I"):  # Pillow reads 16 bits of gray, but only 8 of color
                maximum = max(maximum, int(np.asarray(image).max()))
    note = f"{len(readers)} of {examined} are PNGs with 16 bits per channel, of which the upper 8 are used"
    if 0 < maximum < 2**14:
        note += (
            f"; their largest value is {maximum:,} of 65,535, so they become 0..{maximum >> 8} of 255, almost black: "
            "scale them to the full range, or save them with 8 bits"
        )
    return note
