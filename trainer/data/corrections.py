"""Apply a list of corrections to a dataset: exclude examples, and change labels.

The list is a CSV file with the columns `file`, `action` (exclude or relabel) and `class`. A report's page can save one.
The column `file` names an example as predictions.csv does: by the path or address of its file, by SHARD#RECORD, or by
the file name that its record stores. The path below data.root suffices, so a list remains valid if the data is moved.
"""

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from trainer.data.records import join_first, read_source_names
from trainer.data.splits import RawData, make_empty_split_error, select_examples
from trainer.data.table import read_table
from trainer.errors import DataError
from trainer.names import decode_cell, escape_unprintable, normalize_class_name
from trainer.types import Split

KEY = "data.corrections"
COLUMNS = ("file", "action", "class")
ACTIONS = ("exclude", "relabel")


@dataclass(frozen=True)
class Correction:
    """A row of a list of corrections."""

    row: int  # number of the row, as in a spreadsheet
    file: str  # name of the example, escaped for display
    class_name: str | None  # new class, normalized; None if the example is excluded

    def __str__(self) -> str:
        return f"row {self.row} relabels it to {self.class_name}" if self.class_name else f"row {self.row} excludes it"


@dataclass(frozen=True)
class Example:
    """An example of a split, with the names by which a correction can refer to it."""

    name: str  # path of the file, or SHARD#RECORD with the path of the shard
    short: str  # path below data.root, SHARD#RECORD with the file name of the shard, or file name in the record
    split: str
    index: int  # in the split


def read_corrections(address: str) -> list[Correction]:
    """Read the list of corrections at a storage path.

    Raises:
        DataError: the file is not a CSV file with these columns, a row has no file or an action that is not in
            `ACTIONS`, or a row with the action relabel has no class.
    """

    def error(problem: str, fix: str) -> DataError:
        return DataError(problem, key=KEY, value=address, fix=fix)

    corrections = []
    for row in read_table(address, KEY, COLUMNS).rows:
        file, action = escape_unprintable(decode_cell(row["file"])), row["action"].strip().lower()
        if not file.strip():
            raise error(f"row {row.number} has no file", "write its name as in predictions.csv, or remove the row")
        if action not in ACTIONS:
            matches = difflib.get_close_matches(action, ACTIONS, 1)
            fix = f"did you mean {matches[0]}?" if matches else "write exclude or relabel"
            content = f"the action {escape_unprintable(action)}" if action else "no action"
            raise error(f"row {row.number} has {content}", fix)
        class_cell = row["class"].strip()
        if action == "relabel" and not class_cell:
            raise error(f"row {row.number} relabels {file}, but has no class", "write its class, or exclude it")
        class_name = normalize_class_name(decode_cell(class_cell)) if action == "relabel" else None
        corrections.append(Correction(row.number, file, class_name))
    return corrections


def describe_corrections(corrections: Iterable[Correction]) -> str:
    """Describe the number of corrections by action, such as "3 excluded, 5 relabelled"."""
    is_excluded = [correction.class_name is None for correction in corrections]
    return f"{sum(is_excluded)} excluded, {len(is_excluded) - sum(is_excluded)} relabelled"


def apply_corrections(raw: RawData, address: str, other_names: dict[str, str], skip_unknown: bool) -> RawData:
    """Return a dataset with the corrections in a list applied, and a note on them. No example changes its split.

    Args:
        raw: a dataset with its final class names, before any selection of examples.
        address: storage path of the list.
        other_names: further class names that the list can use -> class name in `raw`.
        skip_unknown: whether rows that name no example are skipped with a note in `raw`, instead of raising an error.

    Raises:
        DataError: the list is invalid (see `read_corrections`), a row has an unknown class, a row names several
            examples or, without `skip_unknown`, none, two rows contradict each other, or a split loses all examples.
    """
    corrections = read_corrections(address)
    labels = {name: label for label, name in enumerate(raw.class_names)}
    labels = {other: labels[name] for other, name in other_names.items() if name in labels} | labels
    for correction in corrections:
        if correction.class_name and correction.class_name not in labels:
            similar_names = difflib.get_close_matches(correction.class_name, raw.class_names, 1)
            fix = (
                f"did you mean {similar_names[0]}?" if similar_names else f"write one of {join_first(raw.class_names)}"
            )
            problem = f"row {correction.row} relabels {correction.file} to an unknown class, {correction.class_name}"
            raise DataError(problem, key=KEY, value=address, fix=fix)
    matches = _find_examples(raw, corrections, address)
    if unmatched := [c for c in corrections if c not in matches]:
        files = join_first([f"{c.file} (row {c.row})" for c in unmatched])
        problem = f"{len(unmatched)} of {len(corrections)} rows name no file or record of {raw.name}: {files}"
        if not skip_unknown:
            fix = "remove these rows, give the data that the list was made for, or set data.on_error=skip to omit them"
            raise DataError(problem, key=KEY, value=address, fix=fix)
        raw.notes.append(f"{KEY}={escape_unprintable(address)}: {problem}; they are omitted")
    by_example: dict[str, Correction] = {}  # first correction of each example, by the name of the example
    for correction, examples in matches.items():
        first = by_example.setdefault(examples[0].name, correction)
        if first.class_name != correction.class_name:
            problem = f"contradicts itself for {correction.file}: {first}, {correction}"
            raise DataError(problem, key=KEY, value=address, fix="remove one of the rows")
    targets = {(e.split, e.index): c.class_name for c, examples in matches.items() for e in examples}
    splits = {name: _correct_split(split, targets, labels) for name, split in raw.splits.items()}
    summary = f"corrections: {describe_corrections(by_example.values())} ({escape_unprintable(address)})"
    num_same = sum(name is not None and labels[name] == raw.splits[s].labels[i] for (s, i), name in targets.items())
    if num_same:
        summary += f"; {num_same} had the class already"
    return replace(raw, splits=splits, notes=[*raw.notes, summary])


def _correct_split(split: Split, targets: dict[tuple[str, int], str | None], labels: dict[str, int]) -> Split:
    """Return the split with the new labels, and without the excluded examples.

    `targets` maps an example's split name and index to the example's new class, or to None to exclude the example.
    """
    new_labels = split.labels.copy()
    is_included = np.ones(split.count, bool)
    for (name, index), class_name in targets.items():
        if name == split.name and class_name is None:
            is_included[index] = False
        elif name == split.name and class_name is not None:
            new_labels[index] = labels[class_name]
    if not is_included.any():
        raise make_empty_split_error(split.name, f"{KEY} excludes all {split.count} of it", skipped=())
    new_split = replace(split, labels=new_labels)
    return new_split if is_included.all() else select_examples(new_split, np.flatnonzero(is_included))


def _find_examples(raw: RawData, corrections: list[Correction], address: str) -> dict[Correction, list[Example]]:
    """Return the file or record that each correction names, as one `Example` per split that contains it.

    Corrections that name no example are omitted. The file names in records are read only if a correction matches
    neither a path nor SHARD#RECORD. Raise a DataError if a correction matches several files or records.
    """
    matches = _match(corrections, _list_examples(raw))
    if unmatched := [c for c in corrections if c not in matches]:
        matches |= _match(unmatched, _list_record_sources(raw))
    for correction, examples in matches.items():
        if len(names := dict.fromkeys(example.name for example in examples)) > 1:
            problem = f"row {correction.row} names {len(names)} examples, {correction.file}: {join_first(list(names))}"
            fix = "name the file or record as in the column file of predictions.csv"
            raise DataError(problem, key=KEY, value=address, fix=fix)
    return {c: matches[c] for c in corrections if c in matches}


def _match(corrections: list[Correction], examples: Iterable[Example]) -> dict[Correction, list[Example]]:
    """Return the examples that each correction matches.

    An example matches if its `name` or `short` equals the correction's `file`, or the rest of `file` after one of its
    slashes. If examples match by names of different lengths, only those with the longest name are returned.
    """
    by_suffix: dict[str, list[Correction]] = {}
    for correction in corrections:
        components = correction.file.split("/")
        for start in range(len(components)):
            by_suffix.setdefault("/".join(components[start:]), []).append(correction)
    best_matches: dict[Correction, tuple[int, list[Example]]] = {}  # length of the name, and examples with this name
    for example in examples:
        for name in dict.fromkeys((example.name, example.short)):
            for correction in by_suffix.get(name, ()):
                length, matches = best_matches.setdefault(correction, (len(name), []))
                if len(name) > length:
                    best_matches[correction] = (len(name), [example])
                elif len(name) == length and example not in matches:
                    matches.append(example)
    return {correction: matches for correction, (_, matches) in best_matches.items()}


def _list_examples(raw: RawData) -> Iterator[Example]:
    """Yield each example of a dataset, named by the path of its file or by SHARD#RECORD."""
    for split in raw.splits.values():
        for index, path in enumerate(split.files):
            name = raw.identities[path].rsplit(" ", 2)[0]
            yield Example(escape_unprintable(path), escape_unprintable(name), split.name, index)
        index = 0
        for shard in split.shards:
            path = escape_unprintable(shard.path)
            for record in range(shard.start, shard.stop):
                yield Example(f"{path}#{record}", f"{os.path.basename(path)}#{record}", split.name, index)
                index += 1


def _list_record_sources(raw: RawData) -> Iterator[Example]:
    """Yield the example of each record that stores a file name. Its `short` is this file name."""
    for split in raw.splits.values():
        if split.shards:
            records = (f"{escape_unprintable(s.path)}#{n}" for s in split.shards for n in range(s.start, s.stop))
            for index, (record, source) in enumerate(zip(records, read_source_names(split), strict=True)):
                if source:
                    yield Example(record, source, split.name, index)
