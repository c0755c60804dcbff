"""Build a dataset from a list of image files: check their first bytes, order them, and divide them into splits."""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, chain

import numpy as np

from trainer.config.schema import Data
from trainer.data.records import join_first
from trainer.data.splits import (
    SPLITS,
    RawData,
    compute_split_sizes,
    digest_head_and_tail,
    empty_split_error,
    list_unused_fractions,
)
from trainer.data.tfds_writer import TIFF_MAGIC
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.names import escape_unprintable
from trainer.types import Purpose, Split

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")  # TensorFlow decodes these formats
PILLOW_EXTENSIONS = (".tif", ".tiff")  # TensorFlow does not decode these; `trainer.prepare` converts them
# Name of a split folder, or cell in column split, in lower case -> split.
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "val", "valid"), "validation")
_MAGIC_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")  # first bytes of JPEG, PNG, BMP and GIF
_FORMATS = "JPEG, PNG, BMP, GIF or WebP"
_END_BYTES = 64  # number of first and of last bytes of each file that the dataset fingerprint covers
_FILES_PER_TASK = 32  # scheduling a task costs more than inspecting one file


@dataclass(frozen=True)
class ImageFile:
    """A labelled image file of a source."""

    path: str
    name: str  # path relative to the image folder, with forward slashes, or the cell in column file of a CSV file
    label: int  # class index
    row: int | None = None  # number of the row in a CSV file
    group: str | None = None  # value of data.group_field

    @property
    def shown(self) -> str:
        """The path, and the row if it is from a CSV file, for messages."""
        return escape_unprintable(self.path) + (f" (row {self.row})" if self.row else "")

    def sort_key(self, seed: int) -> tuple[bytes, str]:
        """Return a key that sorts files by a hash of seed and name."""
        content = f"{seed}/{self.name}".encode(errors="surrogateescape")
        return hashlib.blake2b(content, digest_size=8).digest(), self.name


@dataclass
class ListedImages:
    """The image files that a source lists, before any of them is read."""

    name: str  # name of the dataset
    class_names: tuple[str, ...]
    images: Mapping[str, list[ImageFile]]  # by split, for the splits that the source defines, which include train
    contents: Mapping[str, str]  # split -> description of its files, for the error if none of them is readable
    notes: list[str] = field(default_factory=list)
    ignored: dict[int, str] = field(default_factory=dict)  # class index -> description of the files that are not images


def build_raw_data(listed: ListedImages, data: Data, purpose: Purpose) -> RawData:
    """Check the beginning of each file, and divide the images of train into the splits that are missing.

    Images are sorted by a hash of data.split_seed and their name, which mixes the classes. Missing splits get a
    fraction of each class: the first images become the validation split, the next ones the test split, and all others
    stay in train. Adding an image to the source therefore moves few other images to another split.

    Raises:
        DataError: with on_error="fail", a file cannot be read or is not an image; a split has no readable file.
    """
    images = listed.images
    identities, faults = _inspect(list(chain.from_iterable(images.values())), purpose)
    if faults and data.on_error == "fail":
        lines, total = join_first(list(faults.values()), "\n  "), len(identities)
        problem = f"{len(faults)} of {total} files are not readable {_FORMATS} images:\n  {lines}"
        raise DataError(problem, fix="repair or remove them, or set data.on_error=skip")
    readable = {name: [image for image in images.get(name, ()) if image.path not in faults] for name in SPLITS}
    for name, members in images.items():
        if not readable[name]:
            raise empty_split_error(name, listed.contents[name], [faults[image.path] for image in members])
    ordered = {
        name: sorted(members, key=lambda image: image.sort_key(data.split_seed)) for name, members in readable.items()
    }
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    missing_splits = {name: fraction for name, fraction in fractions.items() if name not in images}
    ordered |= _divide(ordered["train"], missing_splits)
    splits = {name: _make_split(name, members) for name, members in ordered.items() if members}
    notes = listed.notes + list_unused_fractions(data, images)
    return RawData(listed.name, listed.class_names, splits, identities, list(faults.values()), notes, listed.ignored)


def _make_split(name: str, images: list[ImageFile]) -> Split:
    groups = tuple(image.group for image in images if image.group is not None)
    labels = np.array([image.label for image in images], np.int32)
    return Split(name, labels, files=tuple(image.path for image in images), groups=groups or None)


def _inspect(images: list[ImageFile], purpose: Purpose) -> tuple[dict[str, str], dict[str, str]]:
    """Return the identity of each file by path ("NAME SIZE HASH", with a hash of its first and last bytes), and faults.

    The faults describe, by path, why a file is not a readable image. A file that cannot be read has the identity "".
    """

    def inspect(image: ImageFile) -> tuple[str, str]:
        try:
            size, head, digest = digest_head_and_tail(image.path, _END_BYTES)
        except OSError as error:
            return "", f"cannot be read ({error.strerror})"
        is_webp, is_tiff = head[8:12] == b"WEBP", head.startswith(TIFF_MAGIC)
        fault = "" if head.startswith(_MAGIC_BYTES) or is_webp or is_tiff else f"does not begin like a {_FORMATS}"
        if is_tiff and not image.path.lower().endswith(PILLOW_EXTENSIONS):
            fault = "is a TIFF: name it .tif, and convert it with python -m trainer.prepare"
        elif is_tiff and purpose != "prepare":
            fault = "is a TIFF: convert it with python -m trainer.prepare"
        return f"{image.name} {size} {digest}", fault if size else "is empty"

    def inspect_batch(first: int) -> list[tuple[str, str]]:
        health.record_progress()
        return [inspect(image) for image in images[first : first + _FILES_PER_TASK]]

    with ThreadPoolExecutor(16) as pool:  # on a network disk each file costs a round trip
        results = list(chain.from_iterable(pool.map(inspect_batch, range(0, len(images), _FILES_PER_TASK))))
    inspected = list(zip(images, results, strict=True))
    faults = {image.path: f"{image.shown}: {fault}" for image, (_, fault) in inspected if fault}
    return {image.path: identity for image, (identity, _) in inspected}, faults


def _divide(images: list[ImageFile], fractions: dict[str, float]) -> dict[str, list[ImageFile]]:
    """Move the first images of each class to the splits of `fractions`, in their order. The others stay in train."""
    totals = Counter(image.label for image in images)
    edges = {label: list(accumulate(compute_split_sizes(total, fractions).values())) for label, total in totals.items()}
    names = [*fractions, "train"]
    splits: dict[str, list[ImageFile]] = {name: [] for name in names}
    ranks: Counter[int] = Counter()  # label -> number of earlier images of the class
    for image in images:
        splits[names[bisect_right(edges[image.label], ranks[image.label])]].append(image)
        ranks[image.label] += 1
    return splits
