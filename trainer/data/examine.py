"""Examine a sample of a dataset's encoded images, and note EXIF orientations and PNGs with 16 bits per channel."""

import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np

from trainer.data.records import RecordLocation, locate_records, read_image
from trainer.data.splits import select_examples
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.types import Split

MAX_EXAMINED_FILES = 2000  # maximum number of image files in a sample
MAX_EXAMINED_RECORDS = 200  # maximum number of records in a sample
_HEAD_BYTES = 2**16  # number of bytes read from the beginning of a file; a photo's EXIF data begins there
_MAX_DECODED = 8  # number of 16-bit PNGs that are decoded to determine their maximum value
_ORIENTATION_TAG = 0x0112  # EXIF tag


def parse_orientation(encoded: bytes) -> int:
    """Return the EXIF orientation, 1 to 8, of an image, of which `encoded` has all encoded bytes or the first ones.

    Return 1, which means upright, if the EXIF data is missing or corrupt.
    """
    from PIL import Image

    # The markers of JPEG, PNG and WebP. In a WebP, the 4 bytes of the chunk's length are between marker and data.
    for marker, gap in ((b"Exif\0\0", 0), (b"eXIf", 0), (b"EXIF", 4)):
        start = encoded.find(marker)
        if start >= 0:
            with suppress(Exception):  # corrupt EXIF data raises many exception types
                exif = Image.Exif()
                exif.load(encoded[start + len(marker) + gap :])
                value = exif.get(_ORIENTATION_TAG, 1)
                return value if value in range(1, 9) else 1
    return 1


def _make_sample_readers(split: Split) -> list[Callable[[int], bytes]]:
    """Return a function for each example of a sample that reads its encoded image.

    The argument of a function is the maximum number of bytes to read from a file, or -1 for all bytes. It has no effect
    on an image in a record.
    """

    def read_file(path: str, max_bytes: int) -> bytes:
        with open(path, "rb") as file:
            return file.read(max_bytes)

    def read_record(record: RecordLocation, _max_bytes: int) -> bytes:
        return read_image(record)

    if split.files:
        indices = np.unique(np.linspace(0, split.count - 1, min(split.count, MAX_EXAMINED_FILES)).astype(int))
        return [partial(read_file, split.files[i]) for i in indices]
    # The first records, because they are in few shards: to locate a record, all record headers of its shard are read.
    records = locate_records(select_examples(split, np.arange(min(split.count, MAX_EXAMINED_RECORDS))))
    return [partial(read_record, record) for record in records]


def examine_images(split: Split) -> list[str]:
    """Return notes on EXIF orientations and 16-bit PNGs in a sample of the training split. Its files must be local."""
    readers = _make_sample_readers(split)

    def examine(read: Callable[[int], bytes]) -> tuple[int, bytes]:
        """Return the EXIF orientation of an image, and its first bytes if it is a 16-bit PNG, otherwise b""."""
        try:
            encoded = read(_HEAD_BYTES)
        except (OSError, DataError):  # the error is reported when the image is decoded
            return 1, b""
        health.record_progress()
        is_16_bit_png = encoded[:4] == b"\x89PNG" and encoded[24:25] == b"\x10"
        return parse_orientation(encoded), encoded if is_16_bit_png else b""

    with warnings.catch_warnings(), ThreadPoolExecutor(16) as pool:
        warnings.simplefilter("ignore")  # Pillow warns about corrupt EXIF data
        results = list(pool.map(examine, readers))
    notes = []
    png_indices = [i for i, (_, encoded) in enumerate(results) if encoded]
    sample_name = f"{len(readers)}{'' if len(readers) == split.count else ' examined'} training images"
    if num_not_upright := sum(orientation > 1 for orientation, _ in results):
        treatment = "turned upright" if split.orientation == "exif" else "used as they are stored"
        summary = f"{num_not_upright} of {sample_name} {'has' if num_not_upright == 1 else 'have'} an EXIF orientation"
        notes.append(f"{summary}: {treatment} (data.orientation={split.orientation})")
    if png_indices:
        notes.append(_note_depth([readers[i] for i in png_indices], sample_name))
    return notes


def _note_depth(readers: list[Callable[[int], bytes]], sample_name: str) -> str:
    """Return a note on PNGs with 16 bits per channel, and on their maximum value if they would become almost black.

    `sample_name` describes the sample, such as "200 examined training images".
    """
    from PIL import Image

    max_value = 0
    for read in readers[:_MAX_DECODED]:
        # Corrupt images raise many exception types, and are reported when they are decoded.
        with suppress(Exception), Image.open(io.BytesIO(read(-1))) as image:
            if image.mode.startswith("I"):  # Pillow reads 16 bits of gray, but only 8 of color
                max_value = max(max_value, int(np.asarray(image).max()))
    note = f"{len(readers)} of {sample_name} are PNGs with 16 bits per channel, of which the upper 8 are used"
    if 0 < max_value < 2**14:
        note += (
            f"; their largest value is {max_value:,} of 65,535, so they become 0..{max_value >> 8} of 255, "
            "almost black: scale them to the full range, or save them with 8 bits"
        )
    return note
