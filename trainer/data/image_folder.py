"""Image files in class folders."""

import hashlib
import os
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, combinations

import numpy as np

from trainer.config.schema import Data
from trainer.data.splits import SPLITS, RawData, ends_of, split_sizes
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.types import Split

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "val", "valid"), "validation")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")
_ENDS = 64  # bytes of each end of a file that its fingerprint covers
_BATCH = 32  # files per task of a thread: to schedule a task costs more than to inspect one file
LAYOUT = "use ROOT/<class>/*.jpg, or ROOT/train/<class>/*.jpg with validation/ and test/ next to train/"


@dataclass(frozen=True)
class _Image:
    path: str
    name: str  # the path below the root, with forward slashes
    label: int

    def rank(self, seed: int) -> tuple[bytes, str]:
        content = f"{seed}/{self.name}".encode(errors="surrogateescape")
        return hashlib.blake2b(content, digest_size=8).digest(), self.name


def open_image_folder(data: Data) -> RawData:
    """Open `root/<class>`, split by fraction, or `root/{train,validation|val|valid,test}/<class>`.

    Each class is ordered by a hash of data.split_seed and the path below the root, and the first images validate: a
    new image moves hardly any other. The examples of a split are in the order of that hash, which mixes the classes.

    Raises:
        DataError: the folder is missing, unreadable, empty or laid out in another way; the splits have different
            classes or are one folder; a file is no image (on_error="fail").
    """
    root = os.path.expanduser(data.root or "")
    try:
        class_names, images, notes = _scan(root)
    except OSError as error:
        problem = f"{error.strerror}: {error.filename} (working directory {os.getcwd()})"
        raise DataError(problem, key="data.root", value=root, fix=LAYOUT) from None
    facts, faults = _inspect(list(chain.from_iterable(images.values())))
    if faults and data.on_error == "fail":
        listed = "\n  ".join(list(faults.values())[:5])
        problem = f"{len(faults)} file{'s are' if len(faults) > 1 else ' is'} no JPEG, PNG, BMP or GIF:\n  {listed}"
        raise DataError(problem, fix="repair or remove them, or set data.on_error=skip")
    rest = {name: [image for image in images.get(name, ()) if image.path not in faults] for name in SPLITS}
    ordered = {name: sorted(chosen, key=lambda image: image.rank(data.split_seed)) for name, chosen in rest.items()}
    missing = {"validation": data.validation_fraction} if "validation" not in images else {}
    if set(images) == {"train"}:
        missing["test"] = data.test_fraction
    ordered |= _divide(ordered["train"], missing)
    splits = {
        name: Split(name, np.array([image.label for image in chosen], np.int32), files=tuple(i.path for i in chosen))
        for name, chosen in ordered.items()
        if chosen
    }
    name, skipped = os.path.basename(os.path.abspath(root)), list(faults.values())
    return RawData(name, class_names, splits, facts, skipped, notes)


def _scan(root: str) -> tuple[tuple[str, ...], dict[str, list[_Image]], list[str]]:
    """Class names, images by split folder, and notes on ignored files."""
    folders = _split_folders(root)
    classes = {split: _subfolders(folder) for split, folder in folders.items()}
    images: dict[str, list[_Image]] = {}
    notes: list[str] = []
    for split, folder in folders.items():
        if not classes[split]:
            count = sum(_is_image(name) for name in os.listdir(folder))
            problem = f"{folder} has {count} image{'s' * (count != 1)} and no class folders"
            raise DataError(problem, key="data.root", value=root, fix=LAYOUT)
        if classes[split] != classes["train"]:
            train, own = set(classes["train"]), set(classes[split])
            only = {folders["train"]: sorted(train - own), folder: sorted(own - train)}
            differences = ", and ".join(f"only {path} has {', '.join(names)}" for path, names in only.items() if names)
            problem, fix = f"the class folders differ: {differences}", "use the same class folders in each split"
            raise DataError(problem, key="data.root", value=root, fix=fix)
        ignored: Counter[str] = Counter()
        images[split] = [
            _Image(path, os.path.relpath(path, root).replace(os.sep, "/"), label)
            for label, name in enumerate(classes[split])
            for path in _image_files(os.path.join(folder, name), ignored)
        ]
        if ignored:
            kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in ignored.most_common(5))
            notes.append(f"files that are no {'/'.join(e[1:] for e in EXTENSIONS)} by name were ignored: {kinds}")
    class_names = tuple(classes["train"])
    if not any(images.values()):
        problem = f"has no images in its class folders ({', '.join(class_names[:5])})"
        raise DataError(problem, key="data.root", value=root, fix=LAYOUT)
    if len(class_names) == 1:
        only_class = os.path.join(root, class_names[0])
        nested = folders["train"] == root and len(_subfolders(only_class)) > 1
        problem = f"has only one class folder ({class_names[0]}), and a classifier needs two"
        raise DataError(problem, key="data.root", value=root, fix=f"set data.root={only_class}" if nested else LAYOUT)
    return class_names, images, notes


def _subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _split_folders(root: str) -> dict[str, str]:
    """The folders of the splits; {"train": root} if the class folders are directly in the root."""
    names = _subfolders(root)
    splits = {name: _SPLIT_NAMES[name.lower()] for name in names if name.lower() in _SPLIT_NAMES}
    others = [name for name in names if name not in splits]
    if "train" not in splits.values():
        if splits and not others:
            problem = f"has {' and '.join(splits)} but no train folder"
            raise DataError(problem, key="data.root", value=root, fix=LAYOUT)
        return {"train": root}
    if others:
        train = os.path.join(root, next(name for name, split in splits.items() if split == "train"))
        if not _subfolders(train):  # a class with the name train
            return {"train": root}
        problem = f"has both split folders ({', '.join(splits)}) and others ({', '.join(others[:5])})"
        raise DataError(problem, key="data.root", value=root, fix=LAYOUT)
    folders: dict[str, str] = {}
    for name, split in splits.items():
        folder = os.path.join(root, name)
        if split in folders:
            problem = f"{folders[split]} and {folder} are both the {split} split"
            raise DataError(problem, key="data.root", value=root, fix="remove one of them")
        folders[split] = folder
    for (split, folder), (other, same) in combinations(folders.items(), 2):
        if os.path.samefile(folder, same):
            problem = f"{split} and {other} are the same folder ({os.path.realpath(folder)})"
            fix = "use a folder of its own for each split: what is trained on cannot be scored"
            raise DataError(problem, key="data.root", value=root, fix=fix)
    return {split: folders[split] for split in SPLITS if split in folders}


def _image_files(folder: str, ignored: Counter[str]) -> list[str]:
    """Every image file below a class folder, sorted; `ignored` counts other files by extension."""
    files, seen = [], set()

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(parent, name) for name in names if _is_image(name)]
        others = [name for name in names if not _is_image(name) and not name.startswith(".")]
        ignored.update(os.path.splitext(name)[1].lower() for name in others)
    return sorted(files)


def _inspect(images: list[_Image]) -> tuple[dict[str, str], dict[str, str]]:
    """Facts of every file for the fingerprint, and the reason for each file that cannot be an image, by path."""

    def inspect(image: _Image) -> tuple[str, str]:
        try:
            size, head, ends = ends_of(image.path, _ENDS)
        except OSError as error:
            return "", f"cannot be read ({error.strerror})"
        kind = " (it is WebP)" if head[8:12] == b"WEBP" else ""
        fault = "" if head.startswith(_MAGIC) else f"does not begin like a JPEG, PNG, BMP or GIF{kind}"
        return f"{image.name} {size} {ends}", fault if size else "is empty"

    def inspect_batch(first: int) -> list[tuple[str, str]]:
        health.progress()
        return [inspect(image) for image in images[first : first + _BATCH]]

    with ThreadPoolExecutor(16) as pool:  # on a network disk each file costs a round trip
        results = list(chain.from_iterable(pool.map(inspect_batch, range(0, len(images), _BATCH))))
    facts = {image.path: fact for image, (fact, _) in zip(images, results, strict=True)}
    return facts, {i.path: f"{i.path}: {fault}" for i, (_, fault) in zip(images, results, strict=True) if fault}


def _divide(images: list[_Image], fractions: dict[str, float]) -> dict[str, list[_Image]]:
    """Give the first images of each class, in their order, to the splits of `fractions`, and the rest to train."""
    totals = Counter(image.label for image in images)
    edges = {label: list(accumulate(split_sizes(total, fractions).values())) for label, total in totals.items()}
    names = [*fractions, "train"]
    splits: dict[str, list[_Image]] = {name: [] for name in names}
    seen: Counter[int] = Counter()
    for image in images:
        splits[names[bisect_right(edges[image.label], seen[image.label])]].append(image)
        seen[image.label] += 1
    return splits
