"""Format a table of the examples per class and split, for a terminal of 80 columns."""

from collections.abc import Mapping, Sequence

from rich.cells import set_cell_size

from trainer.report.figures import shorten_name

_MAX_CLASSES, _SHOWN_CLASSES = 20, 6  # of more classes, so many rarest ones and most frequent ones are listed
_NAME_WIDTH = 24  # columns


def format_counts(class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> list[str]:
    """Format a table of the examples per class and split; with many classes, of the rarest and most frequent ones."""
    first = next(iter(counts.values()))
    shown = list(range(len(class_names)))
    if len(shown) > _MAX_CLASSES:
        by_count = sorted(shown, key=lambda k: first[k])
        shown = by_count[:_SHOWN_CLASSES] + by_count[-_SHOWN_CLASSES:]
    lines = ["  " + " " * _NAME_WIDTH + "".join(f"{name:>12}" for name in counts)]
    for k in shown:
        name = set_cell_size(shorten_name(class_names[k], _NAME_WIDTH), _NAME_WIDTH)
        lines.append(f"  {name}" + "".join(f"{each[k]:12,}" for each in counts.values()))
    if len(shown) < len(class_names):
        lines.insert(1 + _SHOWN_CLASSES, f"  ... {len(class_names) - len(shown):,} classes between these")
    lines.append(f"  {'in total':{_NAME_WIDTH}}" + "".join(f"{sum(each):12,}" for each in counts.values()))
    return lines
