"""Format a table of the examples per class and split, for a terminal of 80 columns."""

from collections.abc import Mapping, Sequence

from rich.cells import set_cell_size

from trainer.report.figures import shorten_name

_MAX_CLASSES, _SHOWN_CLASSES = 20, 6  # of more than 20 classes, only the 6 rarest and 6 most frequent are listed
_NAME_WIDTH = 24  # of a class name, in columns of the terminal


def format_counts(class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> list[str]:
    """Format a table of the examples per class and split, one string per line.

    `counts` has the number of examples of each class, by split. Of many classes, the table lists those with the fewest
    and the most examples in the first split.
    """
    first_split_counts = next(iter(counts.values()))
    listed_classes = list(range(len(class_names)))
    if len(listed_classes) > _MAX_CLASSES:
        by_count = sorted(listed_classes, key=lambda k: first_split_counts[k])
        listed_classes = by_count[:_SHOWN_CLASSES] + by_count[-_SHOWN_CLASSES:]
    lines = ["  " + " " * _NAME_WIDTH + "".join(f"{name:>12}" for name in counts)]
    for k in listed_classes:
        name = set_cell_size(shorten_name(class_names[k], _NAME_WIDTH), _NAME_WIDTH)
        lines.append(f"  {name}" + "".join(f"{column[k]:12,}" for column in counts.values()))
    if len(listed_classes) < len(class_names):
        lines.insert(1 + _SHOWN_CLASSES, f"  ... {len(class_names) - len(listed_classes):,} classes between these")
    lines.append(f"  {'in total':{_NAME_WIDTH}}" + "".join(f"{sum(column):12,}" for column in counts.values()))
    return lines
