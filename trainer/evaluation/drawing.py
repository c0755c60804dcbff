"""What the figures share: size, colours, plain text, and how they are saved. No pyplot, no global state."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.evaluation.names import printable
from trainer.storage.files import write_whole

DPI = 110
COMPRESSION = 2  # of 9: photos take half the time of the usual 6, and a tenth more bytes
WIDTH = 8.0  # inches; 880 pixels
INK, MUTED, RULE = "#1f2937", "#6b7280", "#d1d5db"
TRAINING, VALIDATION = "#94a3b8", "#2563eb"
RIGHT, DOUBTFUL, WRONG = "#15803d", "#d97706", "#b91c1c"


def canvas(height: float, width: float = WIDTH, laid_out: bool = True) -> Figure:
    """An empty white figure; sizes in inches. Laid out, it finds room for its labels, which takes a second drawing."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained" if laid_out else None, facecolor="white")


def label(name: str, longest: int = 24) -> str:
    """A class or file name as text of a figure: one line, not mathematics, cut in the middle where too long."""
    name = printable(name)
    if len(name) > longest:
        tail = longest // 2
        name = name[: longest - tail - 1] + "…" + name[-tail:]
    return name.replace("$", r"\$")


def tidy(axes: Axes, grid: str | None = None) -> None:
    """Light frame, and grid lines along one axis ("x" or "y") behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.set_axisbelow(True)
    if grid in ("x", "y"):
        axes.grid(axis="x" if grid == "x" else "y", color=RULE, linewidth=0.6)


def heading(axes: Axes, title: str, pad: float = 8) -> None:
    """A title at the left edge."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=pad)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG, whole or not at all."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that matplotlib's font lacks is drawn as boxes; the page and the CSV show it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(content, format="png", dpi=DPI, pil_kwargs={"compress_level": COMPRESSION})
    write_whole(path, content.getvalue())
    return path
