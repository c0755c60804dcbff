"""Write docs/performance.md, its bar chart, and the table of README.md from the results of the rows.

python -m benchmarks.page FOLDER

The table of README.md has the whole recipe of the widest network, if that was measured with all seeds.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import FixedLocator, FuncFormatter

from benchmarks.processes import ROOT
from benchmarks.results import Result, amount, read
from benchmarks.whole_recipe import AUGMENTATIONS, WHOLE
from trainer.report.figures import ACCENT, GRID_LINE, INK, MUTED, create_figure, save, style_axes

PAGE, CHART, README = Path("docs", "performance.md"), Path("docs", "images", "performance.png"), Path("README.md")
BEGIN, END = "<!-- Made by `make bench` -->\n\n", "<!-- The end of what it makes -->\n"
SEEDS = 3  # of a table of README.md
OURS = "ours"  # our side in README.md: the defaults
ORDER = ("recipe", "input", "step", "features", "start", "recipe-memory", "growth")  # of sections, by file name
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
INTRODUCTION = f"""# Performance

Written by `make bench`. Every ratio is of interleaved runs, per round: the median, then the range. Above 1, ours is
better (faster, or smaller). The columns "ours" and "against" hold medians.

![Ratios, each with its range]({CHART.relative_to("docs").as_posix()})"""


def sort_key(result: Result) -> tuple[int, str]:
    """Sort key of sections: their order, then the widths of one row."""
    stem = result.name.split("-alpha-")[0]
    return ORDER.index(stem) if stem in ORDER else len(ORDER), result.name


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(result: Result) -> str:
    rows = [
        [c.what, amount(c.ours, c.unit), c.against, amount(c.other, c.unit), f"**{c.ratio:.2f}**",
         f"{min(c.ratios):.2f} to {max(c.ratios):.2f}", str(len(c.ratios))]
        for c in result.comparisons
    ]  # fmt: skip
    header = ["", "ours", "against", "", "ratio", "range", "rounds"]
    parts = [f"## {result.title}", table(header, rows)]
    for extra in result.tables:
        parts += [f"{extra.title}:", table(extra.header, extra.rows)]
    return "\n\n".join([*parts, f"{result.how} {result.machine}; {result.date}. `{result.command}`"])


def page(results: Sequence[Result]) -> str:
    """The whole page as Markdown."""
    return "\n\n".join([INTRODUCTION, *map(section, results)]) + "\n"


def speed_table(recipe: Result) -> str:
    """The table of README.md: whole processes against each peer, with the accuracies of both."""
    (accuracies,) = (extra for extra in recipe.tables if extra.title == "Validation accuracy")
    scores = {(row[0], row[1]): f"{row[3]} ({row[4]})" for row in accuracies.rows if row[2] == "from layer 100"}
    (examples,) = {row[5] for row in accuracies.rows}
    rows = []
    for label in AUGMENTATIONS:
        for c in (c for c in recipe.comparisons if c.what == f"{label}, {OURS}: {WHOLE}"):
            ratio = f"{c.ratio:.1f} ({min(c.ratios):.1f} to {max(c.ratios):.1f})"
            times = [amount(c.other, c.unit), amount(c.ours, c.unit)]
            rows.append([label, c.against, *times, ratio, scores[label, c.against], scores[label, OURS]])
    accuracy = f"accuracy, n = {examples}, 95 % interval"
    header = ["", "peer", "its time", "kubetune", "ratio (range)", f"its {accuracy}", f"kubetune's {accuracy}"]
    note = f"{recipe.title}; medians of {SEEDS} interleaved seeds. {recipe.machine}; {recipe.date}. `{recipe.command}`"
    return f"{table(header, rows)}\n\n{note}\n"


def readme(text: str, results: Sequence[Result]) -> str:
    """README.md with the table of the widest network that was measured with all seeds; without one, as it is."""
    recipes = [r for r in results if r.name.startswith("recipe-alpha-") and len(r.comparisons[0].ours) >= SEEDS]
    if not recipes:
        return text
    widest = max(recipes, key=lambda r: float(r.name.removeprefix("recipe-alpha-")))
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + speed_table(widest) + END + after


def draw(results: Sequence[Result], file: Path) -> None:
    """Draw one bar per ratio, on a logarithmic axis from 1, with its range."""
    bars = [(f"{c.what}, against {c.against}", c.ratios, c.ratio) for r in results for c in r.comparisons]
    figure = create_figure(1.0 + 0.24 * (len(bars) + 1.6 * len(results)), width=11.0)
    axes = figure.subplots()
    axes.set_xscale("log")
    style_axes(axes, grid="x")
    at, names, positions = 0.0, [], []
    for result in results:
        axes.text(0, at, result.title, transform=axes.get_yaxis_transform(), fontsize=9, fontweight="bold",
                  color=INK, va="center")  # fmt: skip
        at += 1.2
        for _ in result.comparisons:
            positions.append(at)
            at += 1
        at += 0.4
    for position, (name, ratios, median) in zip(positions, bars, strict=True):
        axes.barh(position, median - 1, left=1, height=0.7, color=ACCENT if median >= 1 else MUTED)
        axes.plot([min(ratios), max(ratios)], [position, position], color=INK, linewidth=1.2)
        axes.annotate(f"{median:.2f}", (max(*ratios, 1), position), (4, 0), textcoords="offset points", fontsize=8,
                      color=INK, va="center")  # fmt: skip
        names.append(name)
    axes.axvline(1, color=GRID_LINE, linewidth=1)
    axes.set_yticks(positions, names, fontsize=8)
    axes.set_ylim(at, -1)
    extremes = [ratio for _, ratios, _ in bars for ratio in ratios]
    axes.set_xlim(min(*extremes, 0.5) * 0.9, max(*extremes, 2) * 1.3)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    save(figure, file)


def write(folder: Path, root: Path = ROOT) -> None:
    """Write page, chart, and the table of README.md.

    Raises:
        SystemExit: the folder has no results.
    """
    results = sorted(read(folder), key=sort_key)
    if not results:
        sys.exit(f"{folder}: has no results; run python -m benchmarks --out {folder}")
    (root / CHART).parent.mkdir(parents=True, exist_ok=True)
    draw(results, root / CHART)
    (root / PAGE).write_text(page(results))
    (root / README).write_text(readme((root / README).read_text(), results))
    print(f"{PAGE} and {CHART} are written from {len(results)} results")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
