"""Format the summary of a dataset that is printed to a terminal of 80 columns."""

import textwrap
from collections.abc import Mapping, Sequence

from trainer.errors import format_count
from trainer.look.facts import Facts
from trainer.look.suggestions import Suggestion
from trainer.report.counts import format_counts
from trainer.report.figures import shorten_name

WIDTH = 80  # terminal columns
_MAX_NOTES = 6  # maximum number of notes that are listed
_MAX_UNREADABLE = 3  # maximum number of unreadable files that are listed


def _wrap(label: str, text: str, width: int = 12) -> str:
    """Wrap a text to the right of a label. Long words, such as paths and arguments, are not broken."""
    margin = f"  {label:{width}}"
    return textwrap.fill(
        text, WIDTH, initial_indent=margin, subsequent_indent=" " * len(margin), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _list_counts(counts: Mapping[str, int]) -> str:
    """Format counts by name, such as "JPEG 12, PNG 3"."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _format_sizes(facts: Facts) -> str:
    """Format the quantiles of the image sizes."""
    side, elongation = facts.shorter_side, facts.elongation
    if not side:
        return "unknown"
    return (
        f"shorter side {side['median']:.0f} px (5 to 95 %: {side['p5']:.0f} to {side['p95']:.0f}), longer side "
        f"{elongation['median']:.2f} times it; trained at {facts.settings.image_size} px, {facts.settings.resize}"
    )


def _format_duplicates(facts: Facts) -> str:
    """Format the numbers of duplicates, by type."""
    result = facts.duplicates
    count = result["across_splits"] + result["different_labels"] + result["within_one_split_and_class"]
    if not (count or facts.copies["groups"]):
        return "none"
    copies = f"{facts.copies['images']:,} images in {format_count(facts.copies['groups'], 'group')} of exact copies"
    return (
        f"{format_count(result['across_splits'], 'image')} in several splits, {result['different_labels']:,} with "
        f"several labels, {result['within_one_split_and_class']:,} within a split and class; {copies}"
    )


def format_summary(facts: Facts, suggestions: Sequence[Suggestion], page: str) -> str:
    """Format the counts, sizes, duplicates, unreadable files and suggestions, and the page's path, `page`."""
    total, examined = sum(map(sum, facts.counts.values())), sum(facts.examined.values())
    coverage = "all examined" if examined == total else f"{examined:,} examined"
    classes = format_count(len(facts.class_names), "class", "classes")
    lines = [f"{shorten_name(facts.name, max_length=30)}: {format_count(total, 'image')} of {classes}, {coverage}"]
    lines += format_counts(facts.class_names, facts.counts)
    lines.append(_wrap("formats", f"{_list_counts(facts.formats)}; {_list_counts(facts.modes)}"))
    lines.append(_wrap("sizes", _format_sizes(facts)))
    lines.append(_wrap("duplicates", _format_duplicates(facts)))
    unreadable = [*facts.skipped, *facts.undecodable]
    lines.append(_wrap("unreadable", f"{len(unreadable):,}" if unreadable else "none"))
    lines += [_wrap("", line) for line in unreadable[:_MAX_UNREADABLE]]
    suggested = {f"{key}={value}" for suggestion in suggestions for key, value in suggestion.settings}
    notes = [note for note in facts.notes if not any(argument in note for argument in suggested)]
    lines += [_wrap("note", note) for note in notes[:_MAX_NOTES]]
    lines.append("suggestions" if suggestions else "no suggestions")
    for suggestion in suggestions:
        lines.append(_wrap("-", f"{suggestion.title}: {suggestion.reason}", width=2))
        lines += [f"      {suggestion.arguments}"] if suggestion.settings else []
    return "\n".join([*lines, f"page {page}"])
