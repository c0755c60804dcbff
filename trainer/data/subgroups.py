"""Which group each example of a split belongs to: the values of one more field of its records."""

from __future__ import annotations

import mmap
from typing import Any

from trainer.data.records import example_class, fields_of, index_shard
from trainer.errors import DataError
from trainer.types import Split

MOST_GROUPS = 100  # more are no groups but names


def read_groups(split: Split, field: str, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The value of `field` for each example of a record split, in the order of the examples.

    Args:
        field: text or whole numbers, one value a record.
        names: what the numbers mean; None: the numbers are the names.

    Raises:
        DataError: a record has no such value, or there are more than 100 different ones.
    """
    groups: list[str] = []
    for shard in split.shards:
        index = index_shard(shard.path)
        with open(shard.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for number in range(shard.start, shard.stop):
                offset = int(index.offsets[number])
                example = example_class().FromString(data[offset : offset + int(index.lengths[number])])
                groups.append(_value(example, field, names, f"record {number} of shard {shard.path}"))
    found = set(groups)
    if len(found) > MOST_GROUPS:
        raise DataError(
            f"data.group_field={field} has {len(found):,} different values among the {split.count:,} {split.name} "
            f"examples, such as {sorted(found)[0]!r}; a table of groups takes at most {MOST_GROUPS}: name another field"
        )
    return tuple(groups)


def _value(example: Any, field: str, names: tuple[str, ...] | None, where: str) -> str:
    value = example.features.feature.get(field)
    texts, numbers = (list(value.bytes_list.value), list(value.int64_list.value)) if value else ([], [])
    if len(texts) + len(numbers) != 1:
        raise DataError(
            f"data.group_field={field}: {where} has not one text or whole number there; it has {fields_of(example)}"
        )
    if texts:
        return texts[0].decode("utf-8", "backslashreplace")
    if names is None:
        return str(numbers[0])
    if not 0 <= numbers[0] < len(names):
        raise DataError(f"data.group_field={field}: {where} holds {numbers[0]}, and there are {len(names)} names")
    return names[numbers[0]]
