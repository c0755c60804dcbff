"""Write docs/performance.md, its bar chart, and the table in README.md from the results of the benchmarks.

python -m benchmarks.page FOLDER

FOLDER has the JSON files of `benchmarks.results`. The table in README.md shows the whole recipe with the widest
network, if it was measured with all seeds.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import FixedLocator, FuncFormatter

from benchmarks.processes import ROOT
from benchmarks.results import Result, format_median, read_results
from benchmarks.whole_recipe import AUGMENTATIONS, WHOLE
from trainer.report.figures import ACCENT, GRID_LINE, INK, MUTED, create_figure, save, style_axes

PAGE, CHART, README = Path("docs", "performance.md"), Path("docs", "images", "performance.png"), Path("README.md")
BEGIN, END = "<!-- Made by `make bench` -->\n\n", "<!-- The end of what it makes -->\n"
SEEDS = 3  # minimum number of seeds of the results in README.md
OURS = "ours"  # our side in README.md: the defaults
ORDER = ("recipe", "input", "step", "features", "start", "recipe-memory", "growth")  # file names of the sections
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
INTRODUCTION = f"""# Performance

Written by `make bench`. Every ratio is of interleaved runs, per round: the median, then the range. Above 1, ours is
better (faster, or smaller). The columns "ours" and "against" hold medians.

![Ratios, each with its range]({CHART.relative_to("docs").as_posix()})"""


def sort_key(result: Result) -> tuple[int, str]:
    """Return a sort key for sections: their order in `ORDER`, then the width of the network."""
    stem = result.name.split("-alpha-")[0]
    return ORDER.index(stem) if stem in ORDER else len(ORDER), result.name


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_section(result: Result) -> str:
    """Format a section of docs/performance.md: the comparisons, further tables, and how they were measured."""
    rows = []
    for comparison in result.comparisons:
        ours, other = (format_median(side, comparison.unit) for side in (comparison.ours, comparison.other))
        ratio, ratio_range = (
            f"**{comparison.ratio:.2f}**",
            f"{min(comparison.ratios):.2f} to {max(comparison.ratios):.2f}",
        )
        num_rounds = str(len(comparison.ratios))
        rows.append([comparison.what, ours, comparison.against, other, ratio, ratio_range, num_rounds])
    header = ["", "ours", "against", "", "ratio", "range", "rounds"]
    paragraphs = [f"## {result.title}", format_table(header, rows)]
    for extra_table in result.tables:
        paragraphs += [f"{extra_table.title}:", format_table(extra_table.header, extra_table.rows)]
    return "\n\n".join([*paragraphs, f"{result.how} {result.machine}; {result.date}. `{result.command}`"])


def format_page(results: Sequence[Result]) -> str:
    """Format docs/performance.md."""
    return "\n\n".join([INTRODUCTION, *map(format_section, results)]) + "\n"


def format_speed_table(recipe: Result) -> str:
    """Format the table in README.md: time of the whole process and accuracy of each peer and of this package."""
    (accuracies,) = (extra_table for extra_table in recipe.tables if extra_table.title == "Validation accuracy")
    scores = {(row[0], row[1]): f"{row[3]} ({row[4]})" for row in accuracies.rows if row[2] == "from layer 100"}
    (examples,) = {row[5] for row in accuracies.rows}
    rows = []
    for label in AUGMENTATIONS:
        for comparison in (
            comparison for comparison in recipe.comparisons if comparison.what == f"{label}, {OURS}: {WHOLE}"
        ):
            ratio = f"{comparison.ratio:.1f} ({min(comparison.ratios):.1f} to {max(comparison.ratios):.1f})"
            times = [format_median(comparison.other, comparison.unit), format_median(comparison.ours, comparison.unit)]
            rows.append(
                [label, comparison.against, *times, ratio, scores[label, comparison.against], scores[label, OURS]]
            )
    accuracy = f"accuracy, n = {examples}, 95 % interval"
    header = ["", "peer", "its time", "kubetune", "ratio (range)", f"its {accuracy}", f"kubetune's {accuracy}"]
    note = f"{recipe.title}; medians of {SEEDS} interleaved seeds. {recipe.machine}; {recipe.date}. `{recipe.command}`"
    return f"{format_table(header, rows)}\n\n{note}\n"


def update_readme(text: str, results: Sequence[Result]) -> str:
    """Return README.md with a new table, of the widest network that was measured with all seeds.

    Return `text` unchanged if there is no such result.
    """
    recipes = [
        result
        for result in results
        if result.name.startswith("recipe-alpha-") and len(result.comparisons[0].ours) >= SEEDS
    ]
    if not recipes:
        return text
    widest = max(recipes, key=lambda result: float(result.name.removeprefix("recipe-alpha-")))
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + format_speed_table(widest) + END + after


def draw_chart(results: Sequence[Result], file: Path) -> None:
    """Draw a bar chart of the ratios: a bar from 1 to the median on a logarithmic axis, with a line for the range."""
    bars = [
        (f"{comparison.what}, against {comparison.against}", comparison.ratios, comparison.ratio)
        for result in results
        for comparison in result.comparisons
    ]
    figure = create_figure(1.0 + 0.24 * (len(bars) + 1.6 * len(results)), width=11.0)
    axes = figure.subplots()
    axes.set_xscale("log")
    style_axes(axes, grid="x")
    y, names, positions = 0.0, [], []
    for result in results:
        axes.text(0, y, result.title, transform=axes.get_yaxis_transform(), fontsize=9, fontweight="bold",
                  color=INK, va="center")  # fmt: skip
        y += 1.2
        for _ in result.comparisons:
            positions.append(y)
            y += 1
        y += 0.4
    for position, (name, ratios, median) in zip(positions, bars, strict=True):
        axes.barh(position, median - 1, left=1, height=0.7, color=ACCENT if median >= 1 else MUTED)
        axes.plot([min(ratios), max(ratios)], [position, position], color=INK, linewidth=1.2)
        axes.annotate(f"{median:.2f}", (max(*ratios, 1), position), (4, 0), textcoords="offset points", fontsize=8,
                      color=INK, va="center")  # fmt: skip
        names.append(name)
    axes.axvline(1, color=GRID_LINE, linewidth=1)
    axes.set_yticks(positions, names, fontsize=8)
    axes.set_ylim(y, -1)
    extremes = [ratio for _, ratios, _ in bars for ratio in ratios]
    axes.set_xlim(min(*extremes, 0.5) * 0.9, max(*extremes, 2) * 1.3)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    save(figure, file)


def write_pages(folder: Path, root: Path = ROOT) -> None:
    """Write docs/performance.md, its chart, and the table in README.md.

    Args:
        folder: folder with the results.
        root: folder of the repository.

    Raises:
        SystemExit: the folder has no results.
    """
    results = sorted(read_results(folder), key=sort_key)
    if not results:
        sys.exit(f"{folder}: has no results; run python -m benchmarks --out {folder}")
    (root / CHART).parent.mkdir(parents=True, exist_ok=True)
    draw_chart(results, root / CHART)
    (root / PAGE).write_text(format_page(results))
    (root / README).write_text(update_readme((root / README).read_text(), results))
    print(f"{PAGE} and {CHART} are written from {len(results)} results")


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
