"""Choose the data source, `data=...`, if the arguments only give the data's location."""

import glob
import re
from collections.abc import Sequence
from typing import Any

from trainer.cli.compose import is_sweep
from trainer.cli.overrides import evaluate_override, map_argument_values, parse_override, translate_overrides
from trainer.config.base import InvalidValue, check_address
from trainer.config.typed import FUNCTION, format_argument, quote, quote_if_needed
from trainer.errors import ConfigError, DataError
from trainer.names import escape_unprintable
from trainer.storage.path import StoragePath, storage_path

_RECORDS = re.compile(r"\.tfrec(ord)?s?\b|\.tfrecord-\d", re.I)  # suffix of a TFRecord file
_INFO = "dataset_info.json"  # file in each folder that TensorFlow Datasets has prepared


def choose_source(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Add `data=...` if the arguments give data.root, data.name or data.pattern, but no source and no experiment.

    The argument data.root is replaced if the data is a prepared dataset in a subfolder of data.root, or record files.

    Returns:
        The arguments, and a log line about the choice and its reason, or "" if nothing was chosen.

    Raises:
        ConfigError: data.root cannot be parsed, has an unsupported scheme or refers to another key, or a sweep's values
            of data.root have different sources.
        DataError: data.root is not a supported source, or has several prepared datasets.
    """
    values = map_argument_values(arguments)
    has_choice = {"data", "experiment", "data.source"} & values.keys() or {"-h", "--help", "--version"} & set(arguments)
    key = next((k for k in ("data.root", "data.name", "data.pattern") if values.get(k)), None)
    if has_choice or key is None:
        return list(arguments), ""
    if key != "data.root":
        group, reason = ("tfds", "a TensorFlow dataset") if key == "data.name" else ("tfrecords", "record files")
        return [f"data={group}", *arguments], f"{key}={values[key]}: {reason}, so data={group}"
    roots = _parse_roots(values["data.root"], is_sweep(list(arguments)))
    if None in roots:
        return list(arguments), ""
    groups, reasons, replacements = zip(*map(_detect_source_or_raise, roots), strict=True)
    if len(set(groups)) > 1:
        joined_values = ", ".join(f"{root}: {reason}" for root, reason in zip(roots, reasons, strict=True))
        problem = f"the values are of several sources ({joined_values})"
        raise ConfigError(problem, key="data.root", value=values["data.root"], fix="sweep over those of one source")
    new_arguments, other_arguments = [f"data={groups[0]}"], list(arguments)
    if any(replacements):
        root_arguments = [
            replacement[0] if replacement else f"data.root={quote_if_needed(root)}"
            for replacement, root in zip(replacements, roots, strict=True)
        ]
        root_values = [argument.partition("=")[2] for argument in root_arguments]
        joined_values = (
            ",".join(quote(v) if "," in v and v[:1] not in "'\"" else v for v in root_values)
            if root_values[1:]
            else root_values[0]
        )
        new_arguments.append(f"{root_arguments[0].partition('=')[0]}={joined_values}")
        other_arguments = [a for a in arguments if not re.match(r"\+*data\.root=", a)]
    note = f"data.root={','.join(roots)}: {', '.join(dict.fromkeys(reasons))}, so {' '.join(new_arguments)}"
    return [*new_arguments, *other_arguments], note


def _parse_roots(text: str, sweep: bool) -> list[Any]:
    """Parse the value of data.root to a list of paths, which are several in a sweep. The value null becomes None.

    Raises ConfigError if a path cannot be parsed, or is known only when a run begins.
    """
    function = FUNCTION.fullmatch(text)
    problem = "is known only when a run begins, so the source of the data cannot be chosen by it"
    unknown_error = ConfigError(problem, key="data.root", value=text, fix="add data=image_folder or data=tfds")
    if sweep and function and function[1] != "choice":
        raise unknown_error
    (override,) = translate_overrides([f"data.root={text}"], sweep)
    parsed = parse_override(override)
    value_texts = parsed.sweep_string_iterator() if parsed.is_sweep_override() else [override.partition("=")[2]]
    try:
        return [evaluate_override(f"data.root={value_text}") for value_text in value_texts]
    except ConfigError:
        raise unknown_error from None  # a reference to another key


def _detect_source_or_raise(root: str) -> tuple[str, str, list[str]]:
    """Call `detect_source`; raise a ConfigError about data.root if `root` is not an address."""
    try:
        return detect_source(check_address(root))
    except InvalidValue as error:
        raise ConfigError(error.problem, key="data.root", value=root, fix=error.fix) from None


def detect_source(root: str) -> tuple[str, str, list[str]]:
    """Detect the kind of data source at an address.

    A folder with both subfolders of images and record files is an image folder. System folders such as lost+found are
    ignored.

    Returns:
        The source (a choice of the config group `data`), the reason for the log, and a list with the argument that
        replaces data.root, or an empty list.

    Raises:
        DataError: `root` does not exist, is empty, is a file other than .csv, or is a folder with several prepared
            datasets, or with neither subfolders nor record files.
    """
    from trainer.data.image_folder import is_system_name  # slow: imports NumPy

    folder = storage_path(root)
    file_names = [info.path.name for info in folder.list(recursive=False)]
    folders = [subfolder for subfolder in folder.folders() if not is_system_name(subfolder.name)]
    # In a bucket, only the first two are inspected, since each costs requests; two suffice to detect several datasets.
    inspected_folders = folders if folder.is_local else folders[:2]
    datasets = [subfolder for subfolder in inspected_folders if (subfolder / _INFO).exists()] + [
        subfolder
        for parent in inspected_folders[:9]
        for subfolder in parent.folders()[:9]
        if (subfolder / _INFO).exists()
    ]
    if _INFO in file_names:
        return "tfds", f"{_INFO}, a prepared dataset", []
    if len(datasets) == 1:
        return (
            "tfds",
            f"{_INFO} in {escape_unprintable(datasets[0].name)}, a prepared dataset",
            [f"data.root={quote_if_needed(str(datasets[0]))}"],
        )
    if datasets:
        problem = f"has {len(datasets)} prepared datasets ({', '.join(map(str, datasets))})"
        raise DataError(problem, key="data.root", value=root, fix=f"set {format_argument('data.root', datasets[-1])}")
    record_names = sorted(name for name in file_names if _RECORDS.search(name))
    if record_names and not any(map(_holds_images, folders[:9])):
        suffix_match = _RECORDS.search(record_names[0])
        pattern = f"{glob.escape(root.rstrip('/'))}/*{suffix_match[0] if suffix_match else ''}*"
        return "tfrecords", f"{len(record_names)} record files", [f"data.pattern={quote_if_needed(pattern)}"]
    if folders:
        return "image_folder", "class folders", []
    problem = f"has {len(file_names)} files and no folders" if file_names else "does not exist, or is empty"
    fix = (
        "give a folder with one folder per class, a dataset of TFDS, or a folder of .tfrecord files; or choose data=..."
    )
    if not file_names and folder.exists():
        if folder.name.lower().endswith(".csv"):
            return "csv", "a CSV file", []
        problem = "is a file"
        if _RECORDS.search(folder.name):
            fix = f"write data=tfrecords {format_argument('data.pattern', glob.escape(root))} data.class_names=[...]"
    raise DataError(problem, key="data.root", value=root, fix=fix)


def _holds_images(folder: StoragePath, depth: int = 2) -> bool:
    """Return whether a class folder has an image, or a split folder has one in its first three class folders."""
    from trainer.data.image_files import EXTENSIONS

    if any(info.path.name.lower().endswith(EXTENSIONS) for info in folder.list(recursive=False)):
        return True
    return depth > 1 and any(_holds_images(subfolder, depth - 1) for subfolder in folder.folders()[:3])
