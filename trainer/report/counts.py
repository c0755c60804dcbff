"""Format a table of the examples per class and split, for a terminal of 80 columns."""

from collections.abc import Mapping, Sequence

from rich.cells import set_cell_size

from trainer.report.figures import shorten_name

_MAX_CLASSES, _SHOWN_CLASSES = 20, 6  # if there are more than 20 classes, the 6 rarest and 6 most frequent are listed
_NAME_WIDTH = 24  # width of the class names in terminal columns


def format_counts(class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> list[str]:
    """Format a table of the examples per class and split, one string per line.

    `counts` maps each split to its number of examples per class. If there are more than 20 classes, the table lists
    only those with the fewest and the most examples in the first split.
    """
    first_split_counts = next(iter(counts.values()))
    listed_classes = list(range(len(class_names)))
    if len(listed_classes) > _MAX_CLASSES:
        sorted_classes = sorted(listed_classes, key=lambda class_index: first_split_counts[class_index])
        listed_classes = sorted_classes[:_SHOWN_CLASSES] + sorted_classes[-_SHOWN_CLASSES:]
    lines = ["  " + " " * _NAME_WIDTH + "".join(f"{name:>12}" for name in counts)]
    for class_index in listed_classes:
        name = set_cell_size(shorten_name(class_names[class_index], _NAME_WIDTH), _NAME_WIDTH)
        lines.append(f"  {name}" + "".join(f"{column[class_index]:12,}" for column in counts.values()))
    if len(listed_classes) < len(class_names):
        lines.insert(1 + _SHOWN_CLASSES, f"  ... {len(class_names) - len(listed_classes):,} classes between these")
    lines.append(f"  {'in total':{_NAME_WIDTH}}" + "".join(f"{sum(column):12,}" for column in counts.values()))
    return lines
