"""Build a dataset from a list of image files: check their first bytes, sort them, and divide them into splits."""

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
    list_unused_fractions,
    make_empty_split_error,
)
from trainer.data.tfds_writer import TIFF_MAGIC
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.names import escape_unprintable
from trainer.types import Purpose, Split

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")  # TensorFlow decodes these formats
PILLOW_EXTENSIONS = (".tif", ".tiff")  # TensorFlow does not decode these; `trainer.prepare` converts them
# Lower-case name of a split folder, or cell in a CSV file's column `split` -> split.
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "val", "valid"), "validation")
_MAGIC_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")  # first bytes of JPEG, PNG, BMP and GIF
_FORMATS = "JPEG, PNG, BMP, GIF or WebP"
_END_BYTES = 64  # number of first and of last bytes of each file that the dataset fingerprint covers
_FILES_PER_TASK = 32  # files that a thread inspects in one task; scheduling a task costs more than inspecting one file


@dataclass(frozen=True)
class ImageFile:
    """An image file with its label, as an image folder or a CSV file lists it."""

    path: str
    name: str  # path relative to the image folder, with forward slashes, or the cell in the CSV file's column `file`
    label: int  # class index
    row: int | None = None  # number of the row in a CSV file
    group: str | None = None  # value of data.group_field

    @property
    def display_name(self) -> str:
        """The path, and the number of the row in a CSV file, escaped for display in messages."""
        return escape_unprintable(self.path) + (f" (row {self.row})" if self.row else "")

    def make_sort_key(self, seed: int) -> tuple[bytes, str]:
        """Return a key for sorting files by a hash of `seed` and their name."""
        content = f"{seed}/{self.name}".encode(errors="surrogateescape")
        return hashlib.blake2b(content, digest_size=8).digest(), self.name


@dataclass
class ListedImages:
    """The image files of an image folder or CSV file (the source), before any image is read."""

    name: str  # of the dataset
    class_names: tuple[str, ...]  # by class index
    images: Mapping[str, list[ImageFile]]  # by split, for the splits that the source defines, which include train
    # Split -> description of its files, for the error message if none is readable.
    split_descriptions: Mapping[str, str]
    notes: list[str] = field(default_factory=list)
    ignored: dict[int, str] = field(default_factory=dict)  # class index -> description of the files that are not images


def build_raw_data(listed: ListedImages, data: Data, purpose: Purpose) -> RawData:
    """Build a dataset: check the first bytes of each file, and hold out training images for missing splits.

    Images are sorted by a hash of data.split_seed and their name, which mixes the classes. Missing splits get a
    fraction of each class: the first images become the validation split, the next ones the test split, and all others
    stay in train. Therefore an additional image moves few other images to another split.

    Args:
        purpose: with "prepare", TIFF files are images too.

    Raises:
        DataError: with on_error="fail", a file cannot be read or is not an image; a split has no readable file.
    """
    images = listed.images
    identities, errors = _inspect_files(list(chain.from_iterable(images.values())), purpose)
    if errors and data.on_error == "fail":
        details = join_first(list(errors.values()), "\n  ")
        num_files = len(identities)
        problem = f"{len(errors)} of {num_files} files are not readable {_FORMATS} images:\n  {details}"
        raise DataError(problem, fix="repair or remove them, or set data.on_error=skip")
    readable_images = {name: [image for image in images.get(name, ()) if image.path not in errors] for name in SPLITS}
    for name, members in images.items():
        if not readable_images[name]:
            raise make_empty_split_error(
                name, listed.split_descriptions[name], [errors[image.path] for image in members]
            )
    sorted_images = {
        name: sorted(members, key=lambda image: image.make_sort_key(data.split_seed))
        for name, members in readable_images.items()
    }
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    missing_splits = {name: fraction for name, fraction in fractions.items() if name not in images}
    sorted_images |= _divide_by_class(sorted_images["train"], missing_splits)
    splits = {name: _make_split(name, members) for name, members in sorted_images.items() if members}
    notes = listed.notes + list_unused_fractions(data, images)
    return RawData(listed.name, listed.class_names, splits, identities, list(errors.values()), notes, listed.ignored)


def _make_split(name: str, images: list[ImageFile]) -> Split:
    """Build a split of image files, in the order of `images`."""
    groups = tuple(image.group for image in images if image.group is not None)
    labels = np.array([image.label for image in images], np.int32)
    return Split(name, labels, files=tuple(image.path for image in images), groups=groups or None)


def _inspect_files(images: list[ImageFile], purpose: Purpose) -> tuple[dict[str, str], dict[str, str]]:
    """Read the first and last bytes of each file, and determine its identity and whether it is an image.

    Returns:
        Path -> identity for all files, and path -> error message for those that are not readable images.

    An identity is "NAME SIZE HASH", with a hash of the file's first and last bytes, or "" if the file cannot be read.
    """

    def inspect(image: ImageFile) -> tuple[str, str]:
        """Return the identity of a file, and why it is not a readable image; "" if it is one."""
        try:
            size, head, digest = digest_head_and_tail(image.path, _END_BYTES)
        except OSError as error:
            return "", f"cannot be read ({error.strerror})"
        is_webp, is_tiff = head[8:12] == b"WEBP", head.startswith(TIFF_MAGIC)
        problem = "" if head.startswith(_MAGIC_BYTES) or is_webp or is_tiff else f"does not begin like a {_FORMATS}"
        if is_tiff and not image.path.lower().endswith(PILLOW_EXTENSIONS):
            problem = "is a TIFF: name it .tif, and convert it with python -m trainer.prepare"
        elif is_tiff and purpose != "prepare":
            problem = "is a TIFF: convert it with python -m trainer.prepare"
        return f"{image.name} {size} {digest}", problem if size else "is empty"

    def inspect_batch(first: int) -> list[tuple[str, str]]:
        health.record_progress()
        return [inspect(image) for image in images[first : first + _FILES_PER_TASK]]

    with ThreadPoolExecutor(16) as pool:  # on a network disk each file costs a round trip
        results = list(chain.from_iterable(pool.map(inspect_batch, range(0, len(images), _FILES_PER_TASK))))
    image_results = list(zip(images, results, strict=True))
    errors = {image.path: f"{image.display_name}: {problem}" for image, (_, problem) in image_results if problem}
    return {image.path: identity for image, (identity, _) in image_results}, errors


def _divide_by_class(images: list[ImageFile], fractions: dict[str, float]) -> dict[str, list[ImageFile]]:
    """Divide the first images of each class among the splits in `fractions`, in order. The others stay in train."""
    counts = Counter(image.label for image in images)
    edges = {label: list(accumulate(compute_split_sizes(count, fractions).values())) for label, count in counts.items()}
    split_names = [*fractions, "train"]
    splits: dict[str, list[ImageFile]] = {name: [] for name in split_names}
    ranks: Counter[int] = Counter()  # label -> number of earlier images of the class
    for image in images:
        splits[split_names[bisect_right(edges[image.label], ranks[image.label])]].append(image)
        ranks[image.label] += 1
    return splits
