"""Choose the data source, `data=...`, from the location of the data, if the arguments do not choose it."""

import fnmatch
import glob
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from trainer.cli.compose import requests_sweep
from trainer.cli.overrides import evaluate_override, map_argument_values, parse_override, translate_overrides
from trainer.config.base import InvalidValue, check_address
from trainer.config.typed import FUNCTION, format_argument, quote, quote_if_needed
from trainer.errors import ConfigError, DataError, format_count
from trainer.names import escape_unprintable
from trainer.storage.bucket import MAX_CONCURRENT_REQUESTS, map_in_threads
from trainer.storage.path import StoragePath, storage_path

# End of a record file's name: a suffix, optionally with a shard number, as in .tfrecord-00000-of-00001, and with the
# suffix of a compression format. A run rejects compressed files, but they match, so that the run's error names the
# compression. Other files, such as the index .tfrecord.idx, do not match.
_RECORD_ENDING = re.compile(r"(\.tfrec(?:ord)?s?)([-_.]?\d+([-_]?of[-_]?\d+)?)?(\.gz|\.zlib)?$", re.I)
_TFDS_INFO_FILE = "dataset_info.json"  # file in the folder of each dataset that TensorFlow Datasets has prepared
_MAX_SUBFOLDERS = 9  # maximum number of a folder's subfolders that are searched for prepared datasets
_MAX_CLASS_FOLDERS = 3  # maximum number of these subfolders that are searched for images


class DetectedSource(NamedTuple):
    """The kind of data source at an address."""

    source: str  # choice of the config group `data`, such as "tfrecords"
    reason: str  # what was detected at the address, for the log
    replacement: str | None = None  # argument that replaces data.root, such as "data.pattern=..."; None if none does


def choose_source(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Add `data=...` if the arguments give data.root, data.name or data.pattern, but no source and no experiment.

    The argument data.root is replaced by the subfolder if the data is a prepared dataset in a subfolder of data.root,
    and by data.pattern if the data is record files. With -h, --help, --version or data.root=null, nothing is chosen.

    Returns:
        The arguments, and a log line about the choice and its reason, or "" if nothing was chosen.

    Raises:
        ConfigError: data.root cannot be parsed or resolved here, for example because it refers to another key; it has
            an unsupported scheme; or a sweep's values of data.root are given by a function other than choice(...), or
            have different sources.
        DataError: data.root is not a supported source, or has several prepared datasets.
    """
    values = map_argument_values(arguments)
    has_source = bool({"data", "experiment", "data.source"} & values.keys())
    prints_only = bool({"-h", "--help", "--version"} & set(arguments))
    key = next((k for k in ("data.root", "data.name", "data.pattern") if values.get(k)), None)
    if has_source or prints_only or key is None:
        return list(arguments), ""
    if key != "data.root":
        source, reason = ("tfds", "a TensorFlow dataset") if key == "data.name" else ("tfrecords", "record files")
        return [f"data={source}", *arguments], f"{key}={values[key]}: {reason}, so data={source}"
    roots = _parse_roots(values["data.root"], requests_sweep(list(arguments)))
    if None in roots:
        return list(arguments), ""
    detected = [_check_and_detect_source(root) for root in roots]
    if len({result.source for result in detected}) > 1:
        reasons_text = ", ".join(f"{root}: {result.reason}" for root, result in zip(roots, detected, strict=True))
        problem = f"the values are of several sources ({reasons_text})"
        raise ConfigError(problem, key="data.root", value=values["data.root"], fix="sweep over those of one source")
    new_arguments = [f"data={detected[0].source}"]
    other_arguments = list(arguments)
    if any(result.replacement for result in detected):
        new_arguments.append(_join_replacements(roots, detected))
        other_arguments = [a for a in arguments if not re.match(r"\+*data\.root=", a)]
    reasons = dict.fromkeys(result.reason for result in detected)
    log_line = f"data.root={','.join(roots)}: {', '.join(reasons)}, so {' '.join(new_arguments)}"
    return [*new_arguments, *other_arguments], log_line


def _join_replacements(roots: Sequence[str], detected: Sequence[DetectedSource]) -> str:
    """Return the one argument that replaces data.root, such as `data.pattern=a/*.tfrec,b/*.tfrec` in a sweep.

    Args:
        roots: the values of data.root: one, or those of a sweep.
        detected: the source at each of them, the same for all, so that all replacements set the same key.
    """
    arguments = [
        result.replacement or f"data.root={quote_if_needed(root)}" for root, result in zip(roots, detected, strict=True)
    ]
    key = arguments[0].partition("=")[0]
    values = [argument.partition("=")[2] for argument in arguments]
    if len(values) > 1:  # the values of a sweep are separated by commas, so those that contain a comma are quoted
        values = [quote(value) if "," in value and value[:1] not in "'\"" else value for value in values]
    return f"{key}={','.join(values)}"


def _parse_roots(text: str, is_sweep: bool) -> list[Any]:
    """Parse the value of data.root into a list of paths: one, or several in a sweep. The value null becomes None.

    Raises ConfigError if a path cannot be parsed or resolved here, or if a sweep's values are given by a function other
    than choice(...).
    """
    function = FUNCTION.fullmatch(text)
    problem = "is known only when a run begins, so the source of the data cannot be chosen by it"
    unresolved_error = ConfigError(problem, key="data.root", value=text, fix="add data=image_folder or data=tfds")
    if is_sweep and function and function[1] != "choice":
        raise unresolved_error
    (override,) = translate_overrides([f"data.root={text}"], is_sweep)
    parsed = parse_override(override)
    value_texts = parsed.sweep_string_iterator() if parsed.is_sweep_override() else [override.partition("=")[2]]
    try:
        return [evaluate_override(f"data.root={value_text}") for value_text in value_texts]
    except ConfigError:
        raise unresolved_error from None  # usually a reference to another key, or to a variable that is not set


def _check_and_detect_source(root: str) -> DetectedSource:
    """Call `detect_source`, or raise a ConfigError about data.root if `check_address` rejects `root`."""
    try:
        return detect_source(check_address(root))
    except InvalidValue as error:
        raise ConfigError(error.problem, key="data.root", value=root, fix=error.fix) from None


def detect_source(root: str) -> DetectedSource:
    """Detect the kind of data source at an address.

    A folder with record files is nevertheless an image folder if one of its subfolders contains images.
    System folders such as lost+found are ignored.

    Raises:
        DataError: `root` does not exist, is empty, is a file other than .csv, or is a folder with several prepared
            datasets, or with neither subfolders nor record files.
    """
    from trainer.data.image_folder import is_system_name  # slow: imports NumPy

    folder = storage_path(root)
    file_names = [info.path.name for info in folder.list(recursive=False)]
    folders = [subfolder for subfolder in folder.folders() if not is_system_name(subfolder.name)]
    if _TFDS_INFO_FILE in file_names:
        return DetectedSource("tfds", f"{_TFDS_INFO_FILE}, a prepared dataset")
    datasets, have_images = _inspect_folders(folders)
    if len(datasets) == 1:
        reason = f"{_TFDS_INFO_FILE} in {escape_unprintable(datasets[0].name)}, a prepared dataset"
        return DetectedSource("tfds", reason, replacement=f"data.root={quote_if_needed(str(datasets[0]))}")
    if datasets:
        problem = f"has {len(datasets)} prepared datasets ({', '.join(map(str, datasets))})"
        raise DataError(problem, key="data.root", value=root, fix=f"set {format_argument('data.root', datasets[-1])}")
    endings = {name: match for name in file_names if (match := _RECORD_ENDING.search(name))}
    if endings and not have_images:
        ending = endings[min(endings)]
        # The shortest pattern that matches no other file.
        patterns = [f"*{ending[1]}*", "*" + re.sub(r"\d+", "*", ending[0]), "*" + re.sub(r"\d", "[0-9]", ending[0])]
        pattern = next((p for p in patterns if {*fnmatch.filter(file_names, p)} == endings.keys()), patterns[0])
        pattern = f"{glob.escape(root.rstrip('/'))}/{pattern}"
        replacement = f"data.pattern={quote_if_needed(pattern)}"
        return DetectedSource("tfrecords", f"{len(endings)} record files", replacement)
    if folders:
        return DetectedSource("image_folder", "class folders")
    problem = (
        f"has {format_count(len(file_names), 'file')} and no folders" if file_names else "does not exist, or is empty"
    )
    fix = (
        "give a folder with one folder per class, a dataset of TFDS, or a folder of .tfrecord files; or choose data=..."
    )
    if not file_names and folder.exists():
        if folder.name.lower().endswith(".csv"):
            return DetectedSource("csv", "a CSV file")
        problem = "is a file"
        if _RECORD_ENDING.search(folder.name):
            fix = f"write data=tfrecords {format_argument('data.pattern', glob.escape(root))} data.class_names=[...]"
    raise DataError(problem, key="data.root", value=root, fix=fix)


def _inspect_folders(folders: Sequence[StoragePath]) -> tuple[list[StoragePath], bool]:
    """Return the prepared datasets in `folders`, directly or one level below, and whether there are folders of images.

    A folder has images if it or one of its subfolders contains some. Each folder in a bucket costs requests, so
    `MAX_CONCURRENT_REQUESTS` folders at a time are inspected, until all of them have images. The remaining folders are
    then assumed to be class folders too. Only the local ones are still searched for datasets.
    """
    datasets: list[StoragePath] = []
    have_images = False
    for start in range(0, len(folders), MAX_CONCURRENT_REQUESTS):
        results = map_in_threads(_inspect_folder, folders[start : start + MAX_CONCURRENT_REQUESTS])
        datasets += [dataset for in_folder, _ in results for dataset in in_folder]
        have_images |= any(has_images for _, has_images in results)
        if all(has_images for _, has_images in results):
            remaining = folders[start + MAX_CONCURRENT_REQUESTS :]
            return [*datasets, *(f for f in remaining if f.is_local and (f / _TFDS_INFO_FILE).exists())], True
    return datasets, have_images


def _inspect_folder(folder: StoragePath) -> tuple[list[StoragePath], bool]:
    """Return the prepared datasets in a folder, and whether it has images.

    If the folder is a dataset or contains images, its subfolders are not searched. If it contains datasets, they are
    not searched for images.
    """
    if (folder / _TFDS_INFO_FILE).exists():
        return [folder], False
    if _has_images(folder):
        return [], True
    subfolders = folder.folders()[:_MAX_SUBFOLDERS]
    datasets = [subfolder for subfolder in subfolders if (subfolder / _TFDS_INFO_FILE).exists()]
    return datasets, not datasets and any(map(_has_images, subfolders[:_MAX_CLASS_FOLDERS]))


def _has_images(folder: StoragePath) -> bool:
    from trainer.data.image_files import EXTENSIONS

    return any(info.path.name.lower().endswith(EXTENSIONS) for info in folder.list(recursive=False))
