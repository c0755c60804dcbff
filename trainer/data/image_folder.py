"""Open a dataset of image files in class folders: list the files, check their first bytes, divide them into splits."""

import hashlib
import os
from bisect import bisect_right
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, combinations

import numpy as np

from trainer.config.schema import Data
from trainer.config.typed import argument
from trainer.data.records import join_first
from trainer.data.splits import SPLITS, RawData, empty_split, head_and_tail_digest, split_sizes, unused_fractions
from trainer.data.tfds_writer import TIFF_MAGIC
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.names import class_name, printable
from trainer.types import Purpose, Split

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")
PILLOW_EXTENSIONS = (".tif", ".tiff")  # TensorFlow does not decode these, `trainer.prepare` converts them
# Folders of file systems, archives and network disks, and files of their thumbnails; hidden ones are left out too.
SYSTEM_NAMES = frozenset((
    "lost+found", "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini",
))  # fmt: skip
_SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "val", "valid"), "validation")
_MAGIC_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")
_FORMATS = "JPEG, PNG, BMP, GIF or WebP"
_END_BYTES = 64  # at the beginning and at the end of each file, covered by the fingerprint of the dataset
_FILES_PER_TASK = 32  # scheduling a task costs more than inspecting one file
LAYOUT = "use ROOT/<class>/*.jpg, or ROOT/train/<class>/*.jpg with validation/ and test/ next to train/"


@dataclass(frozen=True)
class _Image:
    path: str
    name: str  # the path below the root, with forward slashes
    label: int

    def sort_key(self, seed: int) -> tuple[bytes, str]:
        content = f"{seed}/{self.name}".encode(errors="surrogateescape")
        return hashlib.blake2b(content, digest_size=8).digest(), self.name


def open_image_folder(data: Data, purpose: Purpose = "train") -> RawData:
    """Open `root/<class>`, split by fraction, or `root/{train,validation|val|valid,test}/<class>`.

    Images are sorted by a hash of data.split_seed and the path below the root, which mixes the classes. Splits without
    a folder get a fraction of each class: the first images become the validation split, the next the test split, all
    others stay in train. So a new image moves hardly any other image to another split. To prepare, files of formats
    that only Pillow decodes are images too.

    Raises:
        DataError: the folder is missing, unreadable, without images, or has an unsupported layout; there are fewer than
            two classes, unless to evaluate; the splits have different classes or are the same folder; with
            on_error="fail", a file cannot be read or is not an image.
    """
    root = os.path.expanduser(data.root or "")
    try:
        class_names, images, notes, ignored = _scan(root, purpose)
    except OSError as error:
        problem = f"{error.strerror}: {printable(str(error.filename))} (working directory {os.getcwd()})"
        raise DataError(problem, key="data.root", value=root, fix=LAYOUT) from None
    identities, faults = _inspect(list(chain.from_iterable(images.values())))
    if faults and data.on_error == "fail":
        listed, total = join_first(list(faults.values()), "\n  "), len(identities)
        problem = f"{len(faults)} of {total} files are not readable {_FORMATS} images:\n  {listed}"
        raise DataError(problem, fix="repair or remove them, or set data.on_error=skip")
    readable = {name: [image for image in images.get(name, ()) if image.path not in faults] for name in SPLITS}
    for name, members in images.items():
        if not readable[name]:
            content = f"its folder has {len(members)} images below {root}"
            raise empty_split(name, content, [faults[image.path] for image in members])
    ordered = {name: sorted(i, key=lambda image: image.sort_key(data.split_seed)) for name, i in readable.items()}
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    missing = {name: fraction for name, fraction in fractions.items() if name not in images}
    notes += unused_fractions(data, images)
    ordered |= _divide(ordered["train"], missing)
    splits = {
        name: Split(name, np.array([image.label for image in members], np.int32), files=tuple(i.path for i in members))
        for name, members in ordered.items()
        if members
    }
    name, skipped = os.path.basename(os.path.abspath(root)), list(faults.values())
    return RawData(name, class_names, splits, identities, skipped, notes, ignored)


def _scan(root: str, purpose: Purpose) -> tuple[tuple[str, ...], dict[str, list[_Image]], list[str], dict[int, str]]:
    """Return the class names, the images of each split that has a folder, notes, and the ignored files by class."""
    extensions = EXTENSIONS + PILLOW_EXTENSIONS * (purpose == "prepare")
    folders = _split_folders(root)
    classes = {split: _class_folders(root, folder) for split, folder in folders.items()}
    images: dict[str, list[_Image]] = {}
    ignored: dict[int, Counter[str]] = defaultdict(Counter)
    system = Counter[str]()
    for folder in {root, *folders.values()}:
        system.update(_system_names(os.listdir(folder)))
    for split, folder in folders.items():
        if not classes[split]:
            count = sum(_is_image(name, extensions) for name in os.listdir(folder))
            problem = f"{printable(folder)} has {count} image{'s' * (count != 1)} and no class folders"
            raise DataError(problem, key="data.root", value=root, fix=LAYOUT)
        if classes[split].keys() != classes["train"].keys():
            train, other = set(classes["train"]), set(classes[split])
            extra = {folders["train"]: sorted(train - other), folder: sorted(other - train)}
            differences = ", and ".join(
                f"only {printable(path)} has {', '.join(names)}" for path, names in extra.items() if names
            )
            problem, fix = f"the class folders differ: {differences}", "use the same class folders in each split"
            raise DataError(problem, key="data.root", value=root, fix=fix)
        images[split] = [
            _Image(path, os.path.relpath(path, root).replace(os.sep, "/"), label)
            for label, name in enumerate(classes["train"])
            for path in _image_files(os.path.join(folder, classes[split][name]), extensions, ignored[label], system)
        ]
    class_names = tuple(classes["train"])
    notes = _notes_on_ignored(sum(ignored.values(), Counter()), system, extensions)
    notes += _nesting_note(folders["train"], images["train"])
    if not any(images.values()):
        problem = f"has no images in its class folders ({', '.join([*class_names[:5], *notes])})"
        raise DataError(problem, key="data.root", value=root, fix=LAYOUT)
    if len(class_names) == 1 and purpose != "evaluate":
        only_class = os.path.join(root, classes["train"][class_names[0]])
        nested = folders["train"] == root and len(_subfolders(only_class)) > 1
        problem = f"has only one class folder ({class_names[0]}), and a classifier needs two"
        fix = f"set {argument('data.root', only_class)}" if nested else LAYOUT
        raise DataError(problem, key="data.root", value=root, fix=fix)
    return class_names, images, notes, {label: _list_kinds(kinds) for label, kinds in ignored.items() if kinds}


def _list_kinds(kinds: Counter[str]) -> str:
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    listed = (f"{count} {kind or 'without extension'}" for kind, count in ordered[:10])
    return f"{', '.join(listed)}{', ...' * (len(kinds) > 10)} ignored"


def _notes_on_ignored(ignored: Counter[str], system: Counter[str], extensions: tuple[str, ...]) -> list[str]:
    notes = []
    if ignored:
        known = "/".join(extension[1:] for extension in extensions)
        notes.append(f"files without a {known} extension: {_list_kinds(ignored)}")
        if converted := sum(ignored[extension] for extension in PILLOW_EXTENSIONS):
            names = "/".join(PILLOW_EXTENSIONS)
            notes.append(f"python -m trainer.prepare converts the {converted} {names} files to PNG")
    if system:
        notes.append(f"left out as of the system or hidden: {_list_kinds(system).removesuffix(' ignored')}")
    return notes


def is_system(name: str) -> bool:
    """Return whether a file or folder is hidden, or was made by a file system, an archive or a photo viewer."""
    return name.startswith((".", "SYNOPHOTO_THUMB")) or name.lower() in SYSTEM_NAMES


def _system_names(names: list[str]) -> list[str]:
    """Return the system's names among `names`, and "hidden" for each of its others."""
    return [name if name.lower() in SYSTEM_NAMES else "hidden" for name in names if is_system(name)]


def _nesting_note(folder: str, images: list[_Image]) -> list[str]:
    """Return a note if no class folder has images of its own, as with a root that is one folder too high."""
    paths = [os.path.relpath(image.path, folder).split(os.sep) for image in images]
    nested = sorted({path[1] for path in paths})
    if len(nested) < 2 or min(map(len, paths)) < 3:
        return []
    fix = f"if these are the classes, set data.root={os.path.join(folder, paths[0][0])}"
    return [f"all images are two folders deep ({join_first(nested)} below the class folders): {fix}"]


def _class_folders(root: str, folder: str) -> dict[str, str]:
    """Return the class folders by class name, sorted by name; a DataError if two of them have one class name."""
    names = _subfolders(folder)
    classes = {class_name(name): name for name in reversed(names)}
    for name in names:
        if (other := classes[class_name(name)]) != name:
            problem = f"the folders {other!a} and {name!a} of {printable(folder)} are both the class {class_name(name)}"
            fix = "rename one, or move its images to the other (class names are in NFC, without spaces at their ends)"
            raise DataError(problem, key="data.root", value=root, fix=fix)
    return dict(sorted(classes.items()))


def _subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not is_system(entry.name))


def _is_image(name: str, extensions: tuple[str, ...]) -> bool:
    return name.lower().endswith(extensions) and not is_system(name)


def _split_folders(root: str) -> dict[str, str]:
    """Return the folder of each split; {"train": root} if the class folders are directly in the root."""
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
        if not _subfolders(train):  # "train" is a class
            return {"train": root}
        problem = f"has both split folders ({', '.join(splits)}) and others ({', '.join(map(printable, others[:5]))})"
        raise DataError(problem, key="data.root", value=root, fix=LAYOUT)
    folders: dict[str, str] = {}
    for name, split in splits.items():
        folder = os.path.join(root, name)
        if split in folders:
            problem = f"{printable(folders[split])} and {printable(folder)} are both the {split} split"
            raise DataError(problem, key="data.root", value=root, fix="remove one of them")
        folders[split] = folder
    for (split, folder), (other_split, other_folder) in combinations(folders.items(), 2):
        if os.path.samefile(folder, other_folder):
            problem = f"{split} and {other_split} are the same folder ({os.path.realpath(folder)})"
            fix = "use a separate folder for each split: training images must not be scored"
            raise DataError(problem, key="data.root", value=root, fix=fix)
    return {split: folders[split] for split in SPLITS if split in folders}


def _image_files(folder: str, extensions: tuple[str, ...], ignored: Counter[str], system: Counter[str]) -> list[str]:
    """Return the image files below a class folder, sorted.

    Count other files by extension in `ignored`, and by name those that the system made or hides in `system`.
    """
    files, seen = [], set()

    def reraise(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=reraise, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder that was visited
            folders.clear()
            continue
        seen.add(real)
        system.update(_system_names([*folders, *names]))
        folders[:] = [name for name in folders if not is_system(name)]
        files += [os.path.join(parent, name) for name in names if _is_image(name, extensions)]
        others = [name for name in names if not _is_image(name, extensions) and not is_system(name)]
        ignored.update(os.path.splitext(name)[1].lower() for name in others)
    return sorted(files)


def _inspect(images: list[_Image]) -> tuple[dict[str, str], dict[str, str]]:
    """Return by path the identity of each file (name, size, hash of its ends), and the fault of each unreadable one."""

    def inspect(image: _Image) -> tuple[str, str]:
        try:
            size, head, digest = head_and_tail_digest(image.path, _END_BYTES)
        except OSError as error:
            return "", f"cannot be read ({error.strerror})"
        is_webp, is_tiff = head[8:12] == b"WEBP", head.startswith(TIFF_MAGIC)
        fault = "" if head.startswith(_MAGIC_BYTES) or is_webp or is_tiff else f"does not begin like a {_FORMATS}"
        if is_tiff and not image.path.lower().endswith(PILLOW_EXTENSIONS):
            fault = "is a TIFF: name it .tif, and convert it with python -m trainer.prepare"
        return f"{image.name} {size} {digest}", fault if size else "is empty"

    def inspect_batch(first: int) -> list[tuple[str, str]]:
        health.progress()
        return [inspect(image) for image in images[first : first + _FILES_PER_TASK]]

    with ThreadPoolExecutor(16) as pool:  # on a network disk each file costs a round trip
        results = list(chain.from_iterable(pool.map(inspect_batch, range(0, len(images), _FILES_PER_TASK))))
    inspected = list(zip(images, results, strict=True))
    faults = {image.path: f"{printable(image.path)}: {fault}" for image, (_, fault) in inspected if fault}
    return {image.path: identity for image, (identity, _) in inspected}, faults


def _divide(images: list[_Image], fractions: dict[str, float]) -> dict[str, list[_Image]]:
    """Move the first images of each class to the splits of `fractions`, in this order; the others stay in train."""
    totals = Counter(image.label for image in images)
    edges = {label: list(accumulate(split_sizes(total, fractions).values())) for label, total in totals.items()}
    names = [*fractions, "train"]
    splits: dict[str, list[_Image]] = {name: [] for name in names}
    seen: Counter[int] = Counter()
    for image in images:
        splits[names[bisect_right(edges[image.label], seen[image.label])]].append(image)
        seen[image.label] += 1
    return splits
