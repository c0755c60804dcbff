"""Open a dataset of image files in class folders: list the class folders and their files."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations

from trainer.config.schema import Data
from trainer.config.typed import format_argument
from trainer.data.image_files import (
    EXTENSIONS,
    PILLOW_EXTENSIONS,
    SPLIT_NAMES,
    ImageFile,
    ListedImages,
    build_raw_data,
)
from trainer.data.records import join_first
from trainer.data.splits import SPLITS, RawData
from trainer.errors import DataError, format_count
from trainer.names import escape_unprintable, normalize_class_name
from trainer.types import Purpose

# Lower-case names of folders that file systems, archives and network disks create, and of thumbnail files. They are
# ignored, like hidden files and folders.
SYSTEM_NAMES = frozenset((
    "lost+found", "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini",
))  # fmt: skip
SUPPORTED_LAYOUT_FIX = "use ROOT/<class>/*.jpg, or ROOT/train/<class>/*.jpg with validation/ and test/ next to train/"


@dataclass(frozen=True)
class _Listing:
    """The names of the files and folders directly in a folder."""

    folders: list[str]  # sorted
    files: list[str]
    system_names: list[str]  # files and folders for which `is_system_name` is true; they are not in the other lists


def open_image_folder(data: Data, purpose: Purpose = "train") -> RawData:
    """Open the image files in the class folders of data.root, or of its folders train, validation and test.

    The validation folder can also be named val or valid. A split without a folder gets a fraction of the training
    images of each class (`build_raw_data`). With `purpose` "prepare", files that only Pillow decodes (TIFF) are images.

    Raises:
        DataError: the folder is missing, unreadable, without images, or has an unsupported layout; two folders are the
            same class or the same split; there is only one class and `purpose` is not "evaluate"; the splits have
            different classes; a split has no readable image; with on_error="fail", a file cannot be read or is not an
            image.
    """
    root = os.path.expanduser(data.root or "")
    try:
        class_names, images, notes, ignored = _list_images(root, purpose)
    except OSError as error:
        problem = f"{error.strerror}: {escape_unprintable(str(error.filename))} (working directory {os.getcwd()})"
        raise DataError(problem, key="data.root", value=root, fix=SUPPORTED_LAYOUT_FIX) from None
    location = f"below {escape_unprintable(root)}"
    split_descriptions = {
        name: f"its folder has {format_count(len(members), 'image')} {location}" for name, members in images.items()
    }
    name = os.path.basename(os.path.abspath(root))
    return build_raw_data(ListedImages(name, class_names, images, split_descriptions, notes, ignored), data, purpose)


def _list_images(
    root: str, purpose: Purpose
) -> tuple[tuple[str, ...], dict[str, list[ImageFile]], list[str], dict[int, str]]:
    """List the image files in the class folders of all splits.

    Returns:
        The class names; split -> its images, for each split that has a folder; notes; and class index -> description of
        the ignored files.
    """
    extensions = EXTENSIONS + PILLOW_EXTENSIONS if purpose == "prepare" else EXTENSIONS
    list_folder = cache(_list_folder)  # listing a folder on a network disk is slow
    folders = _find_split_folders(root, list_folder)  # by split
    classes = {split: _find_class_folders(root, folder, list_folder(folder)) for split, folder in folders.items()}
    images: dict[str, list[ImageFile]] = {}
    ignored: dict[int, Counter[str]] = defaultdict(Counter)
    system_names = Counter[str]()
    folder_notes = []
    for folder in dict.fromkeys([root, *folders.values()]):
        system_names.update(_list_system_names(list_folder(folder).system_names))
        if counts := Counter(os.path.splitext(name)[1].lower() for name in list_folder(folder).files):
            folder_notes.append(
                f"{_describe_ignored(counts)}: directly in {escape_unprintable(folder)}, not in a class folder"
            )
    for split, folder in folders.items():
        if not classes[split]:
            num_images = sum(_is_image(name, extensions) for name in list_folder(folder).files)
            problem = (
                f"{escape_unprintable(folder)} has {num_images} image{'s' * (num_images != 1)} and no class folders"
            )
            raise DataError(problem, key="data.root", value=root, fix=SUPPORTED_LAYOUT_FIX)
        if classes[split].keys() != classes["train"].keys():
            train_classes, split_classes = set(classes["train"]), set(classes[split])
            surplus = {  # folder of a split -> classes that only this split has
                folders["train"]: sorted(train_classes - split_classes),
                folder: sorted(split_classes - train_classes),
            }
            differences = ", and ".join(
                f"only {escape_unprintable(path)} has {', '.join(names)}" for path, names in surplus.items() if names
            )
            problem, fix = f"the class folders differ: {differences}", "use the same class folders in each split"
            raise DataError(problem, key="data.root", value=root, fix=fix)
        images[split] = [
            ImageFile(path, os.path.relpath(path, root).replace(os.sep, "/"), label)
            for label, name in enumerate(classes["train"])
            for path in find_image_files(
                os.path.join(folder, classes[split][name]), extensions, ignored[label], system_names
            )
        ]
    class_names = tuple(classes["train"])
    notes = _note_ignored(sum(ignored.values(), Counter()), system_names, extensions) + folder_notes
    notes += _note_nesting(folders["train"], images["train"])
    if not any(images.values()):
        problem = f"has no images in its class folders ({', '.join([*class_names[:5], *notes])})"
        raise DataError(problem, key="data.root", value=root, fix=SUPPORTED_LAYOUT_FIX)
    if len(class_names) == 1 and purpose != "evaluate":
        class_folder = os.path.join(root, classes["train"][class_names[0]])
        has_subfolders = folders["train"] == root and len(list_folder(class_folder).folders) > 1
        problem = f"has only one class folder ({class_names[0]}), and a classifier needs two"
        fix = f"set {format_argument('data.root', class_folder)}" if has_subfolders else SUPPORTED_LAYOUT_FIX
        raise DataError(problem, key="data.root", value=root, fix=fix)
    return class_names, images, notes, {label: _describe_ignored(counts) for label, counts in ignored.items() if counts}


def _describe_ignored(counts: Counter[str]) -> str:
    """Describe file counts by extension, most frequent first, such as "3 .txt, 1 without extension ignored"."""
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    items = (f"{count} {escape_unprintable(extension) or 'without extension'}" for extension, count in top[:10])
    return f"{', '.join(items)}{', ...' * (len(counts) > 10)} ignored"


def _note_ignored(ignored: Counter[str], system: Counter[str], extensions: tuple[str, ...]) -> list[str]:
    """Return notes on the files below the class folders that are not images, and on system and hidden files.

    `ignored` and `system` are numbers of files, by extension and by name.
    """
    notes = []
    if ignored:
        image_types = "/".join(extension[1:] for extension in extensions)
        notes.append(f"files without a {image_types} extension: {_describe_ignored(ignored)}")
        if num_convertible := sum(ignored[extension] for extension in PILLOW_EXTENSIONS):
            names = "/".join(PILLOW_EXTENSIONS)
            notes.append(f"python -m trainer.prepare converts the {num_convertible} {names} files to PNG")
    if system:
        notes.append(f"left out as of the system or hidden: {_describe_ignored(system).removesuffix(' ignored')}")
    return notes


def is_system_name(name: str) -> bool:
    """Return whether a file name is hidden (`.cache`), or is created by a file system, archive tool or photo viewer."""
    return name.startswith((".", "SYNOPHOTO_THUMB")) or name.lower() in SYSTEM_NAMES


def _list_system_names(names: list[str]) -> list[str]:
    """Return the system names among `names`. Each one that is not in `SYSTEM_NAMES` is replaced by "hidden"."""
    return [name if name.lower() in SYSTEM_NAMES else "hidden" for name in names if is_system_name(name)]


def _note_nesting(folder: str, images: list[ImageFile]) -> list[str]:
    """Return a note if all images are in subfolders of the class folders, so that data.root may be one level too high.

    `images` are the images in the training folder `folder`. There is no note if all subfolders have the same name.
    """
    components = [os.path.relpath(image.path, folder).split(os.sep) for image in images]
    subfolders = sorted({names[1] for names in components})
    if len(subfolders) < 2 or min(map(len, components)) < 3:
        return []
    argument = format_argument("data.root", os.path.join(folder, components[0][0]))
    fix = f"if these are the classes, set {escape_unprintable(argument)}"
    return [
        f"all images are two folders deep ({escape_unprintable(join_first(subfolders))} below the class folders): {fix}"
    ]


def _find_class_folders(root: str, folder: str, listing: _Listing) -> dict[str, str]:
    """Return class name -> name of its folder, sorted by class name.

    Raise a DataError if two folder names become the same class name when they are normalized.
    """
    names = listing.folders
    folder_names = {normalize_class_name(name): name for name in reversed(names)}
    for name in names:
        if (first_name := folder_names[normalize_class_name(name)]) != name:
            predicate = f"are both the class {normalize_class_name(name)}"
            problem = f"the folders {first_name!a} and {name!a} of {escape_unprintable(folder)} {predicate}"
            fix = "rename one, or move its images to the other (class names are in NFC, without spaces at their ends)"
            raise DataError(problem, key="data.root", value=root, fix=fix)
    return dict(sorted(folder_names.items()))


def _list_folder(folder: str) -> _Listing:
    """List the files and folders directly in a folder. Raise an OSError if it cannot be listed."""
    with os.scandir(folder) as entries:
        all_names = {entry.name: entry.is_dir() for entry in entries}  # name -> whether it is a folder
    system_names = [name for name in all_names if is_system_name(name)]
    data_names = {name: is_folder for name, is_folder in all_names.items() if not is_system_name(name)}
    folders = sorted(name for name, is_folder in data_names.items() if is_folder)
    return _Listing(folders, [name for name, is_folder in data_names.items() if not is_folder], system_names)


def _is_image(name: str, extensions: tuple[str, ...]) -> bool:
    """Return whether a file name has one of `extensions`, in any case, and is not a system name."""
    return name.lower().endswith(extensions) and not is_system_name(name)


def _find_split_folders(root: str, list_folder: Callable[[str], _Listing]) -> dict[str, str]:
    """Return split -> path of its folder, or {"train": root} if the class folders are directly in `root`.

    Raise a DataError if the layout is not supported, or if two folders are the same split or are the same folder.
    """
    names = list_folder(root).folders
    splits = {name: SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES}  # by folder name
    other_names = [name for name in names if name not in splits]
    if "train" not in splits.values():
        if splits and not other_names:
            problem = f"has {' and '.join(splits)} but no train folder"
            raise DataError(problem, key="data.root", value=root, fix=SUPPORTED_LAYOUT_FIX)
        return {"train": root}
    if other_names:
        train_folder = os.path.join(root, next(name for name, split in splits.items() if split == "train"))
        if not list_folder(train_folder).folders:  # "train" is a class
            return {"train": root}
        first_names = ", ".join(map(escape_unprintable, other_names[:5]))
        problem = f"has both split folders ({', '.join(splits)}) and others ({first_names})"
        raise DataError(problem, key="data.root", value=root, fix=SUPPORTED_LAYOUT_FIX)
    folders: dict[str, str] = {}
    for name, split in splits.items():
        folder = os.path.join(root, name)
        if split in folders:
            problem = (
                f"{escape_unprintable(folders[split])} and {escape_unprintable(folder)} are both the {split} split"
            )
            raise DataError(problem, key="data.root", value=root, fix="remove one of them")
        folders[split] = folder
    for (split, folder), (other_split, other_folder) in combinations(folders.items(), 2):
        if os.path.samefile(folder, other_folder):
            problem = f"{split} and {other_split} are the same folder ({escape_unprintable(os.path.realpath(folder))})"
            fix = "use a separate folder for each split: training images must not be scored"
            raise DataError(problem, key="data.root", value=root, fix=fix)
    return {split: folders[split] for split in SPLITS if split in folders}


def find_image_files(
    folder: str, extensions: tuple[str, ...], ignored: Counter[str], system: Counter[str]
) -> list[str]:
    """Return the paths of the image files below a folder, sorted. Links are followed, and each folder is visited once.

    Args:
        extensions: file name extensions of images, in lower case.
        ignored: counter to which the other files are added, by extension.
        system: counter to which system and hidden files and folders are added, by name. Such folders are not visited.

    Raises:
        OSError: a folder cannot be listed.
    """
    image_paths = []
    visited_folders = set()

    def reraise(error: OSError) -> None:
        raise error

    for parent, dirnames, filenames in os.walk(folder, onerror=reraise, followlinks=True):
        real_path = os.path.realpath(parent)
        if real_path in visited_folders:  # through a link
            dirnames.clear()
            continue
        visited_folders.add(real_path)
        system.update(_list_system_names([*dirnames, *filenames]))
        dirnames[:] = [name for name in dirnames if not is_system_name(name)]
        image_paths += [os.path.join(parent, name) for name in filenames if _is_image(name, extensions)]
        other_files = [name for name in filenames if not _is_image(name, extensions) and not is_system_name(name)]
        ignored.update(os.path.splitext(name)[1].lower() for name in other_files)
    return sorted(image_paths)
