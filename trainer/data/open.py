"""Open the dataset that `data.*` configures, with its class names, splits, fingerprint and notes on its quality."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from filecmp import cmp
from pathlib import Path

import numpy as np

from trainer.config.schema import Data, RequestedConfig
from trainer.data.corrections import apply_corrections
from trainer.data.csv_source import open_csv
from trainer.data.digits import prepare_digits
from trainer.data.examine import examine_images
from trainer.data.fingerprint import compute_fingerprints
from trainer.data.image_folder import open_image_folder
from trainer.data.records import join_first, read_groups
from trainer.data.remote import fetch_local_copies, replace_local_paths, show_addresses_in_errors
from trainer.data.splits import RawData, describe_class_counts, open_tfrecords, select_at_most, select_per_class
from trainer.data.tfds import open_tfds
from trainer.errors import DataError
from trainer.names import escape_unprintable, normalize_class_name
from trainer.storage.disk import make_write_error
from trainer.storage.shard_cache import ShardCache
from trainer.types import Dataset, LogMessage, Purpose, choose_scored_split

# In a split with fewer examples, which is noted, one example changes the accuracy by more than 3 percentage points.
MIN_SPLIT_EXAMPLES = 30
MAX_CLASS_RATIO = 3  # examples of the largest training class per example of the smallest; a higher ratio is noted


@dataclass(frozen=True)
class OpenedData:
    """A run's dataset and pretrained weights, with local copies of the files that are in buckets."""

    dataset: Dataset
    addresses: dict[str, str]  # local folder -> the bucket folder that it is a copy of
    shards: ShardCache | None  # fetches shards while they are read; None if all files are local
    weights: str  # model.weights, or the path of its local copy if it is in a bucket


def stage_and_open_run_dataset(
    config: RequestedConfig,
    log_message: LogMessage,
    check_stop: Callable[[str], None],
    stream: bool = True,
    purpose: Purpose = "train",
) -> OpenedData:
    """Copy a run's dataset and weights from buckets to the local disk, and open the dataset.

    Log lines, notes and errors name files in a bucket by address, not by the path of the local copy.

    Args:
        check_stop: called repeatedly during a copy, with the address that is copied; can raise an exception to cancel.
        stream: leave the shards of a prepared dataset in its bucket, and fetch them while they are read.
        purpose: see `open_dataset`.

    Raises:
        DataError: nothing exists at an address, the copies exceed the disk budget, or the dataset cannot be opened.
        Interrupted: a bucket does not respond.
    """
    local_config, addresses, shards = fetch_local_copies(config, log_message, check_stop, stream)

    def restore_addresses(text: str) -> str:
        return replace_local_paths(text, addresses)

    with show_addresses_in_errors(addresses):
        dataset = open_run_dataset(
            config, local_config.data, lambda text: log_message(restore_addresses(text)), shards is not None, purpose
        )
    dataset = replace(
        dataset,
        skipped=tuple(map(restore_addresses, dataset.skipped)),
        notes=tuple(map(restore_addresses, dataset.notes)),
    )
    return OpenedData(dataset, addresses, shards, local_config.model.weights)


def open_run_dataset(
    config: RequestedConfig, data: Data, log_message: LogMessage, streamed: bool = False, purpose: Purpose = "train"
) -> Dataset:
    """Open a run's dataset with `open_dataset`. `data` is `config.data` with local paths instead of bucket addresses.

    With debug.overfit, the training split, which `config.example_limit` reduces to one batch, is also the validation
    split.
    """
    cache_dir, max_examples = config.runtime.cache_folder, config.example_limit
    dataset = open_dataset(
        data,
        seed=config.seed,
        cache_dir=cache_dir,
        max_examples=max_examples,
        log_message=log_message,
        streamed=streamed,
        purpose=purpose,
    )
    if config.debug.overfit:
        batch = dataset.splits["train"]
        dataset = replace(dataset, splits={"train": batch, "validation": batch}, skipped=(), notes=())
    return dataset


def require_validation(dataset: Dataset, fraction: float) -> None:
    """Raise a DataError if the dataset has no validation split; `fraction` is data.validation_fraction."""
    if "validation" in dataset.splits:
        return
    problem, fix = "there are no validation examples", "set it above 0, or set data.validation_split"
    if fraction > 0:
        num_images, num_classes = dataset.splits["train"].count, len(dataset.class_names)
        problem = (
            f"leaves no validation examples: there are {num_images} images of {num_classes} classes, and none to spare"
        )
        fix = "add images, at least two of a class, or a validation split"
    raise DataError(problem, key="data.validation_fraction", value=fraction or None, fix=fix)


def open_dataset(
    data: Data,
    *,
    seed: int,
    cache_dir: Path,
    max_examples: int | None,
    log_message: LogMessage,
    streamed: bool = False,
    purpose: Purpose = "train",
) -> Dataset:
    """Open the dataset that `data` configures: read its source, name its classes, and select its examples.

    Args:
        seed: random seed for selecting examples by data.labels_per_class and `max_examples`.
        cache_dir: folder that stores the digits, the labels of record shards and the checksums of files for later runs.
        max_examples: maximum number of examples per split, with class counts as equal as possible; None for all.
        log_message: logs a line before slow work, each of `Dataset.notes`, and the fingerprint.
        streamed: whether data.root has only the metadata and labels of a prepared dataset, whose shards are fetched
            while they are read.
        purpose: "prepare" reads data.group_field of all splits, not only of the split for the final scores, and accepts
            image files that only Pillow decodes. "evaluate" accepts a single class, classes without training examples,
            and classes that are not in data.class_names, because trainer/runs/stored_run.py maps the labels.

    Raises:
        DataError: the dataset is missing, corrupt, or contradicts the configuration.
    """
    cache_dir = Path(cache_dir).expanduser()
    raw = _open_source(data, cache_dir, log_message, streamed, purpose)
    source_names = tuple(map(normalize_class_name, raw.class_names))
    if purpose != "evaluate":
        require_mapped_classes(source_names, data)
    raw.name, raw.class_names = escape_unprintable(raw.name), get_display_names(source_names, data)
    class_names = get_ordered_display_names(data)
    if purpose != "evaluate" or sorted(class_names or ()) == sorted(raw.class_names):
        raw = reorder_classes(raw, class_names)
    if data.corrections:
        display_names = dict(zip(source_names, get_display_names(source_names, data), strict=True))
        raw = apply_corrections(raw, data.corrections, display_names, skip_unknown=data.on_error == "skip")
    _check_classes(raw, purpose, may_be_one_based=bool(data.class_names) and data.label_kind == "index")
    raw.splits = {name: replace(split, orientation=data.orientation) for name, split in raw.splits.items()}
    train = raw.splits["train"]
    if data.labels_per_class:
        small_classes = np.flatnonzero(np.bincount(train.labels) < data.labels_per_class)
        if small_classes.size:
            names = _list_classes(raw, small_classes)
            raw.notes.append(f"data.labels_per_class={data.labels_per_class}: fewer examples exist of {names}")
        raw.splits["train"] = select_per_class(train, data.labels_per_class, seed)
    if max_examples:
        raw.splits = {name: select_at_most(split, max_examples, seed) for name, split in raw.splits.items()}
    if data.group_field and data.source != "csv":
        for name in raw.splits if purpose == "prepare" else {choose_scored_split(raw.splits)} & raw.splits.keys():
            groups = read_groups(raw.splits[name], data.group_field, raw.group_names)
            raw.splits[name] = replace(raw.splits[name], groups=groups)
    raw.notes += _note_quality(raw, is_limited=max_examples is not None) + _note_duplicates(raw)
    raw.notes += [] if streamed else examine_images(raw.splits["train"])
    for line in raw.notes:
        log_message(line)
    skipped, notes = tuple(raw.skipped), tuple(raw.notes)
    fingerprints = compute_fingerprints(raw, data.fingerprint, cache_dir, streamed, log_message)  # most thorough last
    return Dataset(raw.name, raw.class_names, raw.splits, [*fingerprints.values()][-1], skipped, notes, fingerprints)


def _open_source(data: Data, cache_dir: Path, log_message: LogMessage, streamed: bool, purpose: Purpose) -> RawData:
    """Open data.source, with all its examples and its own class names, before any selection."""
    if data.source == "image_folder":
        return open_image_folder(data, purpose)
    if data.source == "csv":
        return open_csv(data, cache_dir, purpose)
    if data.source == "tfrecords":
        return open_tfrecords(data, cache_dir, log_message)
    if data.source == "digits":
        try:
            root = str(prepare_digits(cache_dir))
        except OSError as error:
            raise make_write_error(error, cache_dir, "runtime.cache_dir", "set a writable folder", DataError) from None
        data = Data(source="tfds", root=root, on_error=data.on_error)  # the digits have fixed splits
    return open_tfds(data, cache_dir, log_message, streamed)


def get_display_names(names: tuple[str, ...], data: Data) -> tuple[str, ...]:
    """Return the display names of classes, in the order of `names`.

    If data.class_names is a mapping that contains a class, it has the class's display name. Otherwise the display name
    is the name without the prefix that data.class_prefix matches.

    Args:
        names: class names in the dataset, normalized by `normalize_class_name`.

    Raises:
        DataError: a display name is empty, or two classes have the same display name.
    """
    mapped_names = {normalize_class_name(key): normalize_class_name(name) for key, name in _get_mapping(data).items()}
    prefix = re.compile(rf"\A(?:{data.class_prefix or ''})")
    results = tuple(mapped_names[name] if name in mapped_names else prefix.sub("", name).strip() for name in names)
    first_sources = dict(zip(reversed(results), reversed(names), strict=True))  # display name -> first class
    for source, name in zip(names, results, strict=True):
        if not name or first_sources[name] != source:
            problem = (
                f"{first_sources[name]} and {source} both become {name}" if name else f"nothing is left of {source}"
            )
            if {source, first_sources[name]} & mapped_names.keys():
                raise DataError(problem, key="data.class_names", fix="give each class a name of its own")
            fix = "match less of the names, or leave it out"
            raise DataError(problem, key="data.class_prefix", value=data.class_prefix, fix=fix)
    return results


def get_ordered_display_names(data: Data) -> tuple[str, ...] | None:
    """Return the display names of the classes in the list data.class_names, in its order; None if it is not a list."""
    if not isinstance(data.class_names, tuple):
        return None
    return get_display_names(tuple(map(normalize_class_name, data.class_names)), data)


def _get_mapping(data: Data) -> dict[str, str]:
    """Return data.class_names if it is a mapping {name in the dataset: display name}, otherwise {}."""
    return data.class_names if isinstance(data.class_names, dict) else {}


def require_mapped_classes(names: tuple[str, ...], data: Data) -> None:
    """Raise a DataError if the mapping data.class_names has a class twice, or a class that is not in the dataset.

    `names` are the class names in the dataset, normalized by `normalize_class_name`.
    """
    key_by_name = {normalize_class_name(key): key for key in _get_mapping(data)}  # by normalized name
    if len(key_by_name) < len(_get_mapping(data)):
        duplicate = next(key for key in _get_mapping(data) if key_by_name[normalize_class_name(key)] != key)
        problem = f"has several names for {normalize_class_name(duplicate)}"
        raise DataError(problem, key="data.class_names", fix="give each class one name")
    for name in key_by_name.keys() - set(names):
        matches = difflib.get_close_matches(name, names, 1)
        fix = f"did you mean {matches[0]}?" if matches else f"its classes are {join_first(names)}"
        raise DataError(f"maps {name}, which is no class of the data", key="data.class_names", fix=fix)


def reorder_classes(raw: RawData, names: tuple[str, ...] | None) -> RawData:
    """Return the dataset with its classes in the order of `names`, and its labels mapped to this order.

    Args:
        names: all class names in the new order, from `get_ordered_display_names`; None leaves the order as it is.

    Raises:
        DataError: `names` are not exactly the dataset's class names.
    """
    if not names or names == raw.class_names:
        return raw
    if sorted(names) != sorted(raw.class_names):
        surplus = {raw.name: set(raw.class_names) - set(names), "data.class_names": set(names) - set(raw.class_names)}
        clauses = (f"only {owner} has {join_first(sorted(classes))}" for owner, classes in surplus.items() if classes)
        differences = ", ".join(clauses) or "a name is repeated"
        problem = f"does not name the {len(raw.class_names)} classes of the data: {differences}"
        fix = "name exactly these classes in any order, or leave it out (null) where the source is not tfrecords"
        raise DataError(problem, key="data.class_names", value=f"[{','.join(names)}]", fix=fix)
    new_index = np.array([names.index(name) for name in raw.class_names], np.int32)
    splits = {name: replace(split, labels=new_index[split.labels]) for name, split in raw.splits.items()}
    ignored = {int(new_index[label]): files for label, files in raw.ignored.items()}
    note = "the class indices follow the order of data.class_names, not that of the dataset"
    return replace(raw, class_names=names, splits=splits, notes=[*raw.notes, note], ignored=ignored)


def _list_classes(raw: RawData, classes: Iterable[int]) -> str:
    """Join the names of the classes with these indices for a message."""
    return join_first([raw.class_names[i] for i in classes])


def _check_classes(raw: RawData, purpose: Purpose, *, may_be_one_based: bool) -> None:
    """Raise a DataError for duplicate class names, fewer than two classes, or a class without training examples.

    With `purpose` "evaluate", only duplicate names are an error. With `may_be_one_based`, labels are class indices, and
    the error for a first class without examples suggests that the indices could begin with 1.
    """
    num_classes = len(raw.class_names)
    if num_classes < 2 and purpose != "evaluate":
        problem = f"has only the class {raw.class_names[0]}" if raw.class_names else "has no classes"
        raise DataError(f"{raw.name} {problem}", fix="use data of at least two classes")
    if len(set(raw.class_names)) < num_classes:
        duplicates = join_first([name for name, count in Counter(raw.class_names).items() if count > 1])
        raise DataError(f"{raw.name} has duplicate class names: {duplicates}", fix="use each class name once")
    absent_classes = np.flatnonzero(np.bincount(raw.splits["train"].labels, minlength=num_classes) == 0)
    if absent_classes.size and purpose != "evaluate":
        details = f" ({len(raw.skipped)} unreadable ones were skipped)" if raw.skipped else ""
        details += "".join(f"; {raw.class_names[i]}: {raw.ignored[i]}" for i in absent_classes[:5] if i in raw.ignored)
        fix = "add examples, remove the class, or choose another split"
        if may_be_one_based and absent_classes[0] == 0 and raw.splits["train"].shards:
            fix = f"if labels begin with 1, set data.label_kind=index1; otherwise {fix}"
        raise DataError(f"no training example of {_list_classes(raw, absent_classes)}{details}", fix=fix)


def _note_quality(raw: RawData, is_limited: bool) -> list[str]:
    """Return notes on class imbalance, small splits, absent classes and skipped files.

    With `is_limited`, splits are small on purpose, so there are no notes on small splits and absent classes.
    """
    notes = []
    counts = np.bincount(raw.splits["train"].labels, minlength=len(raw.class_names))
    if counts.max() > MAX_CLASS_RATIO * counts.min():
        order = np.argsort(counts, kind="stable")
        class_indices = order if len(order) <= 10 else np.concatenate([order[:5], order[-5:]])
        class_counts = ", ".join(f"{raw.class_names[i]} {counts[i]}" for i in class_indices)
        if len(order) > 10:
            class_counts += "; the five rarest and the five most frequent"
        imbalance = f"training examples per class differ {counts.max() / max(counts.min(), 1):.1f}-fold"
        notes.append(f"{imbalance} ({class_counts}): training.class_weights=balanced may help")
    for name, split in raw.splits.items():
        if split.count < MIN_SPLIT_EXAMPLES and name != "train" and not is_limited:
            notes.append(f"{name} has only {split.count} examples: each is {100 / split.count:.1f} points of accuracy")
        absent_classes = np.setdiff1d(np.arange(len(raw.class_names)), split.labels)
        if absent_classes.size and not is_limited:
            notes.append(f"{name} has no example of {_list_classes(raw, absent_classes)}")
    if raw.skipped:
        notes.append(f"{len(raw.skipped)} skipped (data.on_error=skip), the first: {raw.skipped[0]}")
        split_counts = (
            f"{name} {describe_class_counts(split.labels, raw.class_names)}" for name, split in raw.splits.items()
        )
        notes.append(f"left after skipping: {'; '.join(split_counts)}")
    return notes


def _note_duplicates(raw: RawData) -> list[str]:
    """Return a note for each other split that contains duplicates of training files, which make its scores too high.

    Only files with the same size and the same hash of their first and last bytes are compared, byte by byte.
    """

    def size_and_digest(path: str) -> tuple[str, ...]:
        return tuple(raw.identities[path].rsplit(" ", 2)[1:])

    candidates: dict[tuple[str, ...], list[str]] = defaultdict(list)  # paths of training files
    notes = []
    for path in raw.splits["train"].files:
        candidates[size_and_digest(path)].append(path)
    for name, split in raw.splits.items():
        files = split.files if name != "train" else ()
        similar_pairs = [(path, other) for path in files for other in candidates.get(size_and_digest(path), ())]
        pairs = [(path, other) for path, other in similar_pairs if cmp(path, other, shallow=False)]
        if pairs:
            summary = f"{len(pairs)} of the {len(files)} files of {name} also occur byte for byte in train"
            notes.append(f"{summary}, the first: {escape_unprintable(pairs[0][0])} = {escape_unprintable(pairs[0][1])}")
    return notes
