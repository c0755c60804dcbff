"""Pictures in class folders."""

import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from trainer.config.schema import Data
from trainer.data.splits import PARTS, RawData, ends_of, part_sizes
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.types import Split

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "val", "valid"), "validation")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")
_ENDS = 64  # bytes of each end of a file that its fingerprint covers
_AT_ONCE = 32  # files that a thread inspects before it is given others: to hand over one costs more than to inspect it
LAYOUT = "expected are ROOT/<class>/*.jpg, or ROOT/train/<class>/*.jpg with validation/ and test/ beside train/"


@dataclass(frozen=True)
class _Picture:
    path: str
    below: str  # the path below the root, with forward slashes
    label: int


def open_image_folder(data: Data) -> RawData:
    """`root/<class>` split by fraction, or `root/{train,validation|val|valid,test}/<class>`.

    A picture's split depends on data.split_seed, its path below the root, and how many its class holds: each class is
    ranked by a hash of seed and path, and the first ones of the ranking validate. So a new picture moves hardly any
    other. Examples lie in the order of that hash: the classes are mixed from the start.

    Raises:
        DataError: the folder is missing, unreadable, empty or laid out in another way; the splits have different
            classes or are one folder; a file is no picture (on_error="fail").
    """
    root = os.path.expanduser(data.root or "")
    _check_root(root)
    folders = _split_folders(root)
    notes: list[str] = []
    parts: dict[str, list[_Picture]] = {}
    class_names: tuple[str, ...] = ()
    for part, folder in folders.items():
        classes = _subfolders(folder)
        if not classes:
            count = sum(_is_picture(name) for name in os.listdir(folder))
            here = f"data.root={root}" if folder == root else folder
            pictures_but = f"{count} picture{'s' * (count > 1)} but " * bool(count)
            raise DataError(f"{here} has {pictures_but}no class folders: {LAYOUT}")
        if part == "train":
            class_names = tuple(classes)
        elif different := sorted(set(class_names) ^ set(classes)):
            lacking = sorted(set(class_names) - set(classes))
            also = sorted(set(classes) - set(class_names))
            what = [f"lacks {', '.join(lacking)}"] * bool(lacking) + [f"also has {', '.join(also)}"] * bool(also)
            raise DataError(
                f"the class folders of {folder} and {folders['train']} differ in {', '.join(different)}: "
                f"{os.path.basename(folder)} {' and '.join(what)}"
            )
        ignored: Counter[str] = Counter()
        parts[part] = [
            _Picture(path, os.path.relpath(path, root).replace(os.sep, "/"), label)
            for label, name in enumerate(classes)
            for path in _pictures(os.path.join(folder, name), ignored)
        ]
        if ignored:
            kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in ignored.most_common(5))
            notes.append(f"files that are no {'/'.join(e[1:] for e in EXTENSIONS)} by name were ignored: {kinds}")
    if not any(parts.values()):
        named = ", ".join(class_names[:5])
        raise DataError(f"data.root={root} has class folders ({named}) but no pictures in them: {LAYOUT}")
    if len(class_names) == 1:
        only = os.path.join(root, class_names[0])
        meant = folders["train"] == root and len(_subfolders(only)) > 1
        hint = f"did you mean data.root={only}?" if meant else LAYOUT
        one = f"data.root={root} has only one class folder ({class_names[0]})"
        raise DataError(f"{one}, and telling classes apart takes two: {hint}")
    facts, bad = _inspect([picture for pictures in parts.values() for picture in pictures])
    if bad and data.on_error == "fail":
        raise DataError(
            f"{len(bad)} file{'s are' if len(bad) > 1 else ' is'} no JPEG, PNG, BMP or GIF; repair or remove "
            f"{'them' if len(bad) > 1 else 'it'}, or set data.on_error=skip:\n  " + "\n  ".join(list(bad.values())[:5])
        )
    ordered = {name: _by_hash([p for p in parts.get(name, ()) if p.path not in bad], data.split_seed) for name in PARTS}
    missing = {"validation": data.validation_fraction} if "validation" not in parts else {}
    if "test" not in parts and set(parts) == {"train"}:
        missing["test"] = data.test_fraction
    ordered |= _divide(ordered["train"], missing)
    splits = {
        name: Split(name, np.array([p.label for p in pictures], np.int32), files=tuple(p.path for p in pictures))
        for name, pictures in ordered.items()
        if pictures
    }
    return RawData(os.path.basename(os.path.abspath(root)), class_names, splits, facts, list(bad.values()), notes)


def _check_root(root: str) -> None:
    try:
        names = os.listdir(root)
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
        if isinstance(error, FileNotFoundError):
            fault = f"does not exist (seen from {os.getcwd()})"
        elif isinstance(error, NotADirectoryError):
            fault = "is a file, not a folder"
        raise DataError(f"data.root={root} {fault}: {LAYOUT}") from None
    if all(name.startswith(".") for name in names):
        raise DataError(f"data.root={root} is empty: {LAYOUT}")


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): {LAYOUT}") from None


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _split_folders(root: str) -> dict[str, str]:
    """The folders of the splits; {"train": root} where the class folders lie directly in the root."""
    names = _subfolders(root)
    splits = {name: _SPLIT_NAMES[name.lower()] for name in names if name.lower() in _SPLIT_NAMES}
    others = [name for name in names if name not in splits]
    if "train" not in splits.values():
        if splits and not others:
            raise DataError(f"data.root={root} has {' and '.join(splits)} but no train folder: {LAYOUT}")
        return {"train": root}
    trained_on = os.path.join(root, next(name for name, part in splits.items() if part == "train"))
    if others:
        if not _subfolders(trained_on):  # a class that happens to be called train
            return {"train": root}
        both = f"split folders ({', '.join(splits)}) and others ({', '.join(others[:5])})"
        raise DataError(f"data.root={root} has both {both}: {LAYOUT}")
    folders: dict[str, str] = {}
    for part in PARTS:
        named = [os.path.join(root, name) for name, meant in splits.items() if meant == part]
        if len(named) > 1:
            raise DataError(f"{' and '.join(named)} are both taken for {part}: remove one")
        for folder in named:
            if same := [earlier for earlier, other in folders.items() if os.path.samefile(folder, other)]:
                shared = f"{part} and {same[0]} are the same folder ({os.path.realpath(folder)})"
                raise DataError(f"{shared}: what is trained on cannot be scored")
            folders[part] = folder
    return folders


def _pictures(folder: str, ignored: Counter[str]) -> list[str]:
    """Every picture below a class folder, sorted; `ignored` counts other files by extension."""
    pictures, seen = [], set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): {LAYOUT}")

    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if _is_picture(name):
                pictures.append(os.path.join(here, name))
            elif not name.startswith("."):
                ignored[os.path.splitext(name)[1].lower()] += 1
    return sorted(pictures)


def _inspect(pictures: list[_Picture]) -> tuple[dict[str, str], dict[str, str]]:
    """Facts of every file for the fingerprint, and the files that cannot be pictures with the reason, by path."""

    def inspect(picture: _Picture) -> tuple[str, str | None]:
        try:
            size, head, ends = ends_of(picture.path, _ENDS)
        except OSError as error:
            return "", f"{picture.path}: cannot be read ({error.strerror})"
        fault = None
        if not size:
            fault = f"{picture.path}: is empty"
        elif not head.startswith(_MAGIC):
            kind = " (it is WebP)" if head[8:12] == b"WEBP" else ""
            fault = f"{picture.path}: does not begin like a JPEG, PNG, BMP or GIF{kind}"
        return f"{picture.below} {size} {ends}", fault

    def inspect_some(first: int) -> list[tuple[str, str | None]]:
        health.progress()
        return [inspect(picture) for picture in pictures[first : first + _AT_ONCE]]

    with ThreadPoolExecutor(16) as pool:  # on a network disk each file costs a round trip
        results = list(chain.from_iterable(pool.map(inspect_some, range(0, len(pictures), _AT_ONCE))))
    facts = {picture.path: fact for picture, (fact, _) in zip(pictures, results, strict=True)}
    return facts, {picture.path: fault for picture, (_, fault) in zip(pictures, results, strict=True) if fault}


def _by_hash(pictures: Iterable[_Picture], seed: int) -> list[_Picture]:
    def rank(picture: _Picture) -> tuple[bytes, str]:
        content = f"{seed}/{picture.below}".encode(errors="surrogateescape")
        return hashlib.blake2b(content, digest_size=8).digest(), picture.below

    return sorted(pictures, key=rank)


def _divide(pictures: list[_Picture], fractions: dict[str, float]) -> dict[str, list[_Picture]]:
    """The first pictures of each class, in their order, go to the parts; the rest trains."""
    totals = Counter(picture.label for picture in pictures)
    edges = {label: list(accumulate(part_sizes(total, fractions).values())) for label, total in totals.items()}
    names = [*fractions, "train"]
    parts: dict[str, list[_Picture]] = {name: [] for name in names}
    seen: Counter[int] = Counter()
    for picture in pictures:
        parts[names[bisect_right(edges[picture.label], seen[picture.label])]].append(picture)
        seen[picture.label] += 1
    return parts
