"""Apply a list of corrections to a dataset: examples to exclude, and labels to replace.

The list is a CSV file with the columns file, action (exclude or relabel) and class, as the page of a report saves it. A
file is named as in predictions.csv: by its path or address, by SHARD#RECORD, or by the name that its record stores. Of
a path, the part below data.root suffices, so that a list remains valid if the data is moved.
"""

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from trainer.data.records import join_first, read_source_names
from trainer.data.splits import RawData, empty_split_error, take
from trainer.data.table import read_table
from trainer.errors import DataError
from trainer.names import decode_cell, escape_unprintable, normalize_class_name
from trainer.types import Split

KEY = "data.corrections"
COLUMNS = ("file", "action", "class")
ACTIONS = ("exclude", "relabel")


@dataclass(frozen=True)
class Correction:
    """A row of the list."""

    row: int
    file: str  # escaped as for display
    class_name: str | None  # normalized; None: the example is excluded

    def __str__(self) -> str:
        return f"row {self.row} relabels it to {self.class_name}" if self.class_name else f"row {self.row} excludes it"


@dataclass(frozen=True)
class Example:
    """An example that a correction may name."""

    name: str  # unique: path of its file, or SHARD#RECORD
    short: str  # an ending of the names that mean it: name below data.root, name in the record, or SHARD#RECORD
    split: str
    index: int


def read_corrections(address: str) -> list[Correction]:
    """Read a list of corrections.

    Raises:
        DataError: the file cannot be read (`read_table`), a row names no file or no action of `ACTIONS`, or a row with
            the action relabel has no class.
    """

    def error(problem: str, fix: str) -> DataError:
        return DataError(problem, key=KEY, value=address, fix=fix)

    corrections = []
    for row in read_table(address, KEY, COLUMNS).rows:
        file, action = escape_unprintable(decode_cell(row["file"])), row["action"].strip().lower()
        if not file.strip():
            raise error(f"row {row.number} has no file", "write its name as in predictions.csv, or remove the row")
        if action not in ACTIONS:
            near = difflib.get_close_matches(action, ACTIONS, 1)
            fix = f"did you mean {near[0]}?" if near else "write exclude or relabel"
            has = f"the action {escape_unprintable(action)}" if action else "no action"
            raise error(f"row {row.number} has {has}", fix)
        name = row["class"].strip()
        if action == "relabel" and not name:
            raise error(f"row {row.number} relabels {file}, but has no class", "write its class, or exclude it")
        class_name = normalize_class_name(decode_cell(name)) if action == "relabel" else None
        corrections.append(Correction(row.number, file, class_name))
    return corrections


def describe_corrections(corrections: Iterable[Correction]) -> str:
    """Describe how many corrections there are of each action, such as "3 excluded, 5 relabelled"."""
    excluded = [correction.class_name is None for correction in corrections]
    return f"{sum(excluded)} excluded, {len(excluded) - sum(excluded)} relabelled"


def apply_corrections(raw: RawData, address: str, other_names: dict[str, str], skip_unknown: bool) -> RawData:
    """Apply the list of corrections at an address; each example remains in its split.

    Args:
        raw: a dataset with its final class names, before any selection of examples.
        other_names: further names of classes that the list may use -> names of `raw`.
        skip_unknown: leave out rows that name no example of the dataset, with a note, instead of failing.

    Raises:
        DataError: the list is invalid (`read_corrections`), has an unknown class, an unknown file or a name of several
            examples, contradicts itself, or excludes all examples of a split.
    """
    corrections = read_corrections(address)
    labels = {name: label for label, name in enumerate(raw.class_names)}
    labels = {other: labels[name] for other, name in other_names.items() if name in labels} | labels
    for correction in corrections:
        if correction.class_name and correction.class_name not in labels:
            near = difflib.get_close_matches(correction.class_name, raw.class_names, 1)
            fix = f"did you mean {near[0]}?" if near else f"write one of {join_first(raw.class_names)}"
            problem = f"row {correction.row} relabels {correction.file} to an unknown class, {correction.class_name}"
            raise DataError(problem, key=KEY, value=address, fix=fix)
    matches = _find_examples(raw, corrections, address)
    if unknown := [c for c in corrections if c not in matches]:
        listed = join_first([f"{c.file} (row {c.row})" for c in unknown])
        problem = f"{len(unknown)} of {len(corrections)} rows name no file or record of {raw.name}: {listed}"
        if not skip_unknown:
            fix = "remove these rows, give the data that the list was made for, or set data.on_error=skip to omit them"
            raise DataError(problem, key=KEY, value=address, fix=fix)
        raw.notes.append(f"{KEY}={escape_unprintable(address)}: {problem}; they are omitted")
    applied: dict[str, Correction] = {}  # by the name of the example
    for correction, examples in matches.items():
        earlier = applied.setdefault(examples[0].name, correction)
        if earlier.class_name != correction.class_name:
            problem = f"contradicts itself for {correction.file}: {earlier}, {correction}"
            raise DataError(problem, key=KEY, value=address, fix="remove one of the rows")
    targets = {(e.split, e.index): c.class_name for c, examples in matches.items() for e in examples}
    splits = {name: _correct(split, targets, labels) for name, split in raw.splits.items()}
    summary = f"corrections: {describe_corrections(applied.values())} ({escape_unprintable(address)})"
    same = sum(name is not None and labels[name] == raw.splits[s].labels[i] for (s, i), name in targets.items())
    summary += f"; {same} had the class already" * bool(same)
    return replace(raw, splits=splits, notes=[*raw.notes, summary])


def _correct(split: Split, targets: dict[tuple[str, int], str | None], labels: dict[str, int]) -> Split:
    """Return the split with the new labels, and without the examples to exclude (class None)."""
    new, remains = split.labels.copy(), np.ones(split.count, bool)
    for (name, index), class_name in targets.items():
        if name == split.name and class_name is None:
            remains[index] = False
        elif name == split.name and class_name is not None:
            new[index] = labels[class_name]
    if not remains.any():
        raise empty_split_error(split.name, f"{KEY} excludes all {split.count} of it", ())
    corrected = replace(split, labels=new)
    return corrected if remains.all() else take(corrected, np.flatnonzero(remains))


def _find_examples(raw: RawData, corrections: list[Correction], address: str) -> dict[Correction, list[Example]]:
    """Return the example that each correction names, once for each split that has it. Unknown ones are left out.

    The longest match counts. Names that records store are read only if a name is no path and no SHARD#RECORD.
    """
    matches = _match(corrections, _list_examples(raw))
    if rest := [c for c in corrections if c not in matches]:
        matches |= _match(rest, _list_record_sources(raw))
    for correction, examples in matches.items():
        if len(names := dict.fromkeys(example.name for example in examples)) > 1:
            problem = f"row {correction.row} names {len(names)} examples, {correction.file}: {join_first(list(names))}"
            fix = "name the file or record as in the column file of predictions.csv"
            raise DataError(problem, key=KEY, value=address, fix=fix)
    return {c: matches[c] for c in corrections if c in matches}


def _match(corrections: list[Correction], examples: Iterable[Example]) -> dict[Correction, list[Example]]:
    """Return the examples whose name a correction has, or else those whose short name is its longest ending."""
    by_ending: dict[str, list[Correction]] = {}
    for correction in corrections:
        parts = correction.file.split("/")
        for start in range(len(parts)):
            by_ending.setdefault("/".join(parts[start:]), []).append(correction)
    best: dict[Correction, tuple[int, list[Example]]] = {}
    for example in examples:
        for name in dict.fromkeys((example.name, example.short)):
            for correction in by_ending.get(name, ()):
                length, members = best.setdefault(correction, (len(name), []))
                if len(name) > length:
                    best[correction] = (len(name), [example])
                elif len(name) == length and example not in members:
                    members.append(example)
    return {correction: members for correction, (_, members) in best.items()}


def _list_examples(raw: RawData) -> Iterator[Example]:
    """Yield each example with the path of its file or shard."""
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
    """Yield each record that stores a file name."""
    for split in raw.splits.values():
        if split.shards:
            records = (f"{escape_unprintable(s.path)}#{n}" for s in split.shards for n in range(s.start, s.stop))
            for index, (record, source) in enumerate(zip(records, read_source_names(split), strict=True)):
                if source:
                    yield Example(record, source, split.name, index)
