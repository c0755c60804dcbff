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
from trainer.data.remote import addresses_in_errors, fetch_local_copies, with_addresses
from trainer.data.splits import RawData, count_classes, open_tfrecords, select_at_most, select_per_class
from trainer.data.tfds import open_tfds
from trainer.errors import DataError
from trainer.names import escape_unprintable, normalize_class_name
from trainer.storage.disk import make_write_error
from trainer.storage.shard_cache import ShardCache
from trainer.types import Dataset, LogMessage, Purpose, choose_scored_split

SMALL_SPLIT = 30  # examples; in a smaller split, one example changes the accuracy by more than 3 percentage points
MAX_CLASS_RATIO = 3  # above this ratio of the most to the least training examples of a class, a note on imbalance


@dataclass(frozen=True)
class OpenedData:
    """The dataset of a run, with local paths for files and weights in buckets."""

    dataset: Dataset
    addresses: dict[str, str]  # local folder -> the bucket folder that it is a copy of
    shards: ShardCache | None  # fetches shards while they are read; None: all files are local
    weights: str  # model.weights, or the path of its local copy


def open_run_data(
    config: RequestedConfig,
    log_message: LogMessage,
    check: Callable[[str], None],
    stream: bool = True,
    purpose: Purpose = "train",
) -> OpenedData:
    """Copy a dataset and weights in buckets to the local disk, and open the dataset."""
    local, addresses, shards = fetch_local_copies(config, log_message, check, stream)

    def named(text: str) -> str:
        return with_addresses(text, addresses)

    with addresses_in_errors(addresses):
        dataset = open_run_dataset(
            config, local.data, lambda text: log_message(named(text)), shards is not None, purpose
        )
    dataset = replace(dataset, skipped=tuple(map(named, dataset.skipped)), notes=tuple(map(named, dataset.notes)))
    return OpenedData(dataset, addresses, shards, local.model.weights)


def open_run_dataset(
    config: RequestedConfig, data: Data, log_message: LogMessage, streamed: bool = False, purpose: Purpose = "train"
) -> Dataset:
    """Open `data`, which is `config.data` with local paths. debug.overfit makes one batch both train and validation."""
    cache, limit = config.runtime.cache_folder, config.example_limit
    dataset = open_dataset(
        data,
        seed=config.seed,
        cache_dir=cache,
        max_examples=limit,
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
        count, classes = dataset.splits["train"].count, len(dataset.class_names)
        problem = f"leaves no validation examples: there are {count} images of {classes} classes, and none to spare"
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
    """Open the source that `data.source` names.

    Args:
        seed: selects the examples of data.labels_per_class and `max_examples`.
        cache_dir: stores the digits and the labels of record shards for later runs.
        max_examples: maximum per split, balanced over the classes as far as possible.
        log_message: logs a line before slow work, and each of `Dataset.notes`.
        streamed: data.root has only manifest and labels. Its shards are fetched while they are used.
        purpose: "prepare" reads data.group_field of every split, not only of the split of the final scores, and accepts
            image files that only Pillow decodes. "evaluate" accepts a single class, classes without training
            examples, and other classes than those of data.class_names, as `map_to_run_classes` maps them by name.

    Raises:
        DataError: the dataset is missing, corrupt, or contradicts the configuration.
    """
    cache_dir = Path(cache_dir).expanduser()
    raw = _open_source(data, cache_dir, log_message, streamed, purpose)
    own_names = tuple(map(normalize_class_name, raw.class_names))
    if purpose != "evaluate":
        require_mapped_classes(own_names, data)
    raw.name, raw.class_names = escape_unprintable(raw.name), show_class_names(own_names, data)
    class_names = show_class_order(data)
    if purpose != "evaluate" or sorted(class_names or ()) == sorted(raw.class_names):
        raw = apply_class_names(raw, class_names)
    if data.corrections:
        other_names = dict(zip(own_names, show_class_names(own_names, data), strict=True))
        raw = apply_corrections(raw, data.corrections, other_names, skip_unknown=data.on_error == "skip")
    _check_classes(raw, purpose, may_begin_with_1=bool(data.class_names) and data.label_kind == "index")
    raw.splits = {name: replace(split, orientation=data.orientation) for name, split in raw.splits.items()}
    train = raw.splits["train"]
    if data.labels_per_class:
        smaller = np.flatnonzero(np.bincount(train.labels) < data.labels_per_class)
        if smaller.size:
            names = _list_classes(raw, smaller)
            raw.notes.append(f"data.labels_per_class={data.labels_per_class}: fewer examples exist of {names}")
        raw.splits["train"] = select_per_class(train, data.labels_per_class, seed)
    if max_examples:
        raw.splits = {name: select_at_most(split, max_examples, seed) for name, split in raw.splits.items()}
    if data.group_field and data.source != "csv":
        for name in raw.splits if purpose == "prepare" else {choose_scored_split(raw.splits)} & raw.splits.keys():
            groups = read_groups(raw.splits[name], data.group_field, raw.group_names)
            raw.splits[name] = replace(raw.splits[name], groups=groups)
    raw.notes += _note_quality(raw, limited=max_examples is not None) + _note_copies(raw)
    raw.notes += [] if streamed else examine_images(raw.splits["train"])
    for line in raw.notes:
        log_message(line)
    skipped, notes = tuple(raw.skipped), tuple(raw.notes)
    hashes = compute_fingerprints(raw, data.fingerprint, cache_dir, streamed, log_message)
    return Dataset(raw.name, raw.class_names, raw.splits, [*hashes.values()][-1], skipped, notes, hashes)


def _open_source(data: Data, cache_dir: Path, log_message: LogMessage, streamed: bool, purpose: Purpose) -> RawData:
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
        data = Data(source="tfds", root=root, on_error=data.on_error)  # its splits are fixed
    return open_tfds(data, cache_dir, log_message, streamed)


def show_class_names(names: tuple[str, ...], data: Data) -> tuple[str, ...]:
    """Return the shown names of classes with these normalized names.

    These are their names in the mapping of data.class_names, otherwise without what data.class_prefix matches at their
    beginning.

    Raises:
        DataError: nothing is left of a name, or two names become equal.
    """
    mapped = {normalize_class_name(own): normalize_class_name(name) for own, name in _mapping(data).items()}
    prefix = re.compile(rf"\A(?:{data.class_prefix or ''})")
    shown = tuple(mapped[name] if name in mapped else prefix.sub("", name).strip() for name in names)
    first = dict(zip(reversed(shown), reversed(names), strict=True))
    for own, name in zip(names, shown, strict=True):
        if not name or first[name] != own:
            outcome = f"{first[name]} and {own} both become {name}" if name else f"nothing is left of {own}"
            if {own, first[name]} & mapped.keys():
                raise DataError(outcome, key="data.class_names", fix="give each class a name of its own")
            fix = "match less of the names, or leave it out"
            raise DataError(outcome, key="data.class_prefix", value=data.class_prefix, fix=fix)
    return shown


def show_class_order(data: Data) -> tuple[str, ...] | None:
    """Return the shown names of the classes that data.class_names lists; None if it is not a list."""
    if not isinstance(data.class_names, tuple):
        return None
    return show_class_names(tuple(map(normalize_class_name, data.class_names)), data)


def _mapping(data: Data) -> dict[str, str]:
    return data.class_names if isinstance(data.class_names, dict) else {}


def require_mapped_classes(names: tuple[str, ...], data: Data) -> None:
    """Raise a DataError if the mapping of data.class_names has a class that is not one of the normalized `names`."""
    own = {normalize_class_name(name): name for name in _mapping(data)}
    if len(own) < len(_mapping(data)):
        twice = next(name for name in _mapping(data) if own[normalize_class_name(name)] != name)
        problem = f"has several names for {normalize_class_name(twice)}"
        raise DataError(problem, key="data.class_names", fix="give each class one name")
    for name in own.keys() - set(names):
        near = difflib.get_close_matches(name, names, 1)
        fix = f"did you mean {near[0]}?" if near else f"its classes are {join_first(names)}"
        raise DataError(f"maps {name}, which is no class of the data", key="data.class_names", fix=fix)


def apply_class_names(raw: RawData, names: tuple[str, ...] | None) -> RawData:
    """Reorder the classes of a dataset as in data.class_names, and map its labels.

    Raises:
        DataError: the dataset has other class names of its own.
    """
    if not names or names == raw.class_names:
        return raw
    if sorted(names) != sorted(raw.class_names):
        only = {raw.name: set(raw.class_names) - set(names), "data.class_names": set(names) - set(raw.class_names)}
        sides = (f"only {where} has {join_first(sorted(some))}" for where, some in only.items() if some)
        differences = ", ".join(sides) or "a name is repeated"
        problem = f"does not name the {len(raw.class_names)} classes of the data: {differences}"
        fix = "name exactly these classes in any order, or leave it out (null) where the source is not tfrecords"
        raise DataError(problem, key="data.class_names", value=f"[{','.join(names)}]", fix=fix)
    new_index = np.array([names.index(name) for name in raw.class_names], np.int32)
    splits = {name: replace(split, labels=new_index[split.labels]) for name, split in raw.splits.items()}
    ignored = {int(new_index[label]): files for label, files in raw.ignored.items()}
    note = "the class indices follow the order of data.class_names, not that of the dataset"
    return replace(raw, class_names=names, splits=splits, notes=[*raw.notes, note], ignored=ignored)


def _list_classes(raw: RawData, classes: Iterable[int]) -> str:
    return join_first([raw.class_names[i] for i in classes])


def _check_classes(raw: RawData, purpose: Purpose, *, may_begin_with_1: bool) -> None:
    count = len(raw.class_names)
    if count < 2 and purpose != "evaluate":
        classes = "".join(raw.class_names) or "no classes"
        raise DataError(f"{raw.name} has only {classes}", fix="use data of at least two classes")
    if len(set(raw.class_names)) < count:
        repeated = join_first([name for name, times in Counter(raw.class_names).items() if times > 1])
        raise DataError(f"{raw.name} has duplicate class names: {repeated}", fix="use each class name once")
    absent = np.flatnonzero(np.bincount(raw.splits["train"].labels, minlength=count) == 0)
    if absent.size and purpose != "evaluate":
        skipped = f" ({len(raw.skipped)} unreadable ones were skipped)" if raw.skipped else ""
        skipped += "".join(f"; {raw.class_names[i]}: {raw.ignored[i]}" for i in absent[:5] if i in raw.ignored)
        fix = "add examples, remove the class, or choose another split"
        if may_begin_with_1 and absent[0] == 0 and raw.splits["train"].shards:
            fix = f"if labels begin with 1, set data.label_kind=index1; otherwise {fix}"
        raise DataError(f"no training example of {_list_classes(raw, absent)}{skipped}", fix=fix)


def _note_quality(raw: RawData, limited: bool) -> list[str]:
    """Return notes on class imbalance, small splits, absent classes and skipped files.

    `limited`: max_examples is set, so splits are small on purpose.
    """
    notes = []
    counts = np.bincount(raw.splits["train"].labels, minlength=len(raw.class_names))
    if counts.max() > MAX_CLASS_RATIO * counts.min():
        order = np.argsort(counts, kind="stable")
        shown = order if len(order) <= 10 else np.concatenate([order[:5], order[-5:]])
        listed = ", ".join(f"{raw.class_names[i]} {counts[i]}" for i in shown)
        listed += "; the five rarest and the five most frequent" * (len(order) > 10)
        differ = f"training examples per class differ {counts.max() / max(counts.min(), 1):.1f}-fold"
        notes.append(f"{differ} ({listed}): training.class_weights=balanced may help")
    for name, split in raw.splits.items():
        if split.count < SMALL_SPLIT and name != "train" and not limited:
            notes.append(f"{name} has only {split.count} examples: each is {100 / split.count:.1f} points of accuracy")
        absent = np.setdiff1d(np.arange(len(raw.class_names)), split.labels)
        if absent.size and not limited:
            notes.append(f"{name} has no example of {_list_classes(raw, absent)}")
    if raw.skipped:
        notes.append(f"{len(raw.skipped)} skipped (data.on_error=skip), the first: {raw.skipped[0]}")
        left = (f"{name} {count_classes(split.labels, raw.class_names)}" for name, split in raw.splits.items())
        notes.append(f"left after skipping: {'; '.join(left)}")
    return notes


def _note_copies(raw: RawData) -> list[str]:
    """Return notes on files that are both in train and in another split. Read only files of equal size and ends."""

    def size_and_digest(path: str) -> tuple[str, ...]:
        return tuple(raw.identities[path].rsplit(" ", 2)[1:])

    candidates: dict[tuple[str, ...], list[str]] = defaultdict(list)
    notes = []
    for path in raw.splits["train"].files:
        candidates[size_and_digest(path)].append(path)
    for name, split in raw.splits.items():
        files = split.files if name != "train" else ()
        alike = [(path, other) for path in files for other in candidates.get(size_and_digest(path), ())]
        pairs = [(path, other) for path, other in alike if cmp(path, other, shallow=False)]
        if pairs:
            copies = f"{len(pairs)} of the {len(files)} files of {name} also occur byte for byte in train"
            notes.append(f"{copies}, the first: {escape_unprintable(pairs[0][0])} = {escape_unprintable(pairs[0][1])}")
    return notes
