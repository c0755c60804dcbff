"""Notes on the encoded images of a dataset: EXIF orientations, and PNGs of more than 8 bits per channel."""

import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from trainer.data.records import locate_records, read_image
from trainer.data.splits import take
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.types import Split

MAX_FILES, MAX_RECORDS = 2000, 200  # maximum number of examined training images
_HEAD_BYTES = 2**16  # bytes read of a file; the EXIF data of a photo begin there
_MAX_DECODED = 8  # 16-bit PNGs whose maximum value is determined
_ORIENTATION = 0x0112  # EXIF tag


def parse_orientation(data: bytes) -> int:
    """Return the EXIF orientation, 1 to 8, of an encoded image or its beginning. It is 1 if there is none."""
    from PIL import Image

    for marker, skipped in ((b"Exif\0\0", 0), (b"eXIf", 0), (b"EXIF", 4)):
        start = data.find(marker)
        if start >= 0:
            with suppress(Exception):  # corrupt EXIF data raise many types
                exif = Image.Exif()
                exif.load(data[start + len(marker) + skipped :])
                value = exif.get(_ORIENTATION, 1)
                return value if value in range(1, 9) else 1
    return 1


def _make_sample_readers(split: Split) -> list[Callable[[], bytes]]:
    """Make functions that each read an example of a split: the beginning of a file, or the image of a record."""

    def read_file(path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read(_HEAD_BYTES)

    if split.files:
        chosen = np.unique(np.linspace(0, split.count - 1, min(split.count, MAX_FILES)).astype(int))
        return [partial(read_file, split.files[i]) for i in chosen]
    # The first records, which are in few shards: locating a record requires all record headers of its shard.
    records = locate_records(take(split, np.arange(min(split.count, MAX_RECORDS))))
    return [partial(read_image, record) for record in records]


def examine_images(split: Split) -> list[str]:
    """Return notes on a sample of the training images, which must be local. [] if nothing is remarkable."""
    readers = _make_sample_readers(split)

    def examine(read: Callable[[], bytes]) -> tuple[int, bytes]:
        try:
            data = read()
        except (OSError, DataError):  # reported when it is decoded
            return 1, b""
        health.record_progress()
        is_deep = data[:4] == b"\x89PNG" and data[24:25] == b"\x10"
        return parse_orientation(data), data if is_deep else b""

    with warnings.catch_warnings(), ThreadPoolExecutor(16) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about corrupt EXIF data
        results = list(pool.map(examine, readers))
    notes, deep = [], [i for i, (_, data) in enumerate(results) if data]
    examined = f"{len(readers)}{'' if len(readers) == split.count else ' examined'} training images"
    if marked := sum(orientation > 1 for orientation, _ in results):
        done = "turned upright" if split.orientation == "exif" else "used as they are stored"
        have = f"{marked} of {examined} {'has' if marked == 1 else 'have'} an EXIF orientation"
        notes.append(f"{have}: {done} (data.orientation={split.orientation})")
    if deep:
        notes.append(_note_depth(split, [(i, readers[i]) for i in deep], examined))
    return notes


def _note_depth(split: Split, readers: list[tuple[int, Callable[[], bytes]]], examined: str) -> str:
    """Return a note on PNGs with 16 bits per channel. It includes the maximum value of some of them."""
    from PIL import Image

    maximum = 0
    for index, read in readers[:_MAX_DECODED]:
        with suppress(Exception):  # corrupt images raise many types, and are reported when they are decoded
            content = read() if split.shards else Path(split.files[index]).read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                if image.mode.startswith("I"):  # Pillow reads 16 bits of gray, but only 8 of color
                    maximum = max(maximum, int(np.asarray(image).max()))
    note = f"{len(readers)} of {examined} are PNGs with 16 bits per channel, of which the upper 8 are used"
    if 0 < maximum < 2**14:
        note += (
            f"; their largest value is {maximum:,} of 65,535, so they become 0..{maximum >> 8} of 255, almost black: "
            "scale them to the full range, or save them with 8 bits"
        )
    return note
