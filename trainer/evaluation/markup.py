"""What the sections of a page share: escaped text, numbers as people read them, tables, pictures inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from trainer.config_differences import flat
from trainer.evaluation.names import printable

NONE = "\u2013"
_SHARP = 64  # pixels; a smaller picture keeps its pixels when it is enlarged


def text(value: object) -> str:
    """Escaped text; class and file names may hold anything."""
    return escape(printable(str(value)), quote=True)


def short(name: object, longest: int = 28) -> str:
    """Escaped text, cut in the middle where it is too long; the whole is its tooltip."""
    whole = printable(str(name))
    if len(whole) <= longest:
        return text(whole)
    tail = longest // 2
    return f'<span title="{text(whole)}">{text(whole[: longest - tail - 1])}…{text(whole[-tail:])}</span>'


def percent(share: float | None, digits: int = 1) -> str:
    return NONE if share is None else f"{100 * share:.{digits}f}\u202f%"


def span(interval: Sequence[float]) -> str:
    """An interval of shares."""
    return f"{100 * interval[0]:.1f}{NONE}{percent(interval[1])}"


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plural(count: int, one: str, many: str | None = None) -> str:
    """ "1 picture", "2,000 pictures"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1, kind: str = "") -> str:
    """A table of cells that are HTML already; columns from `numeric_from` on are numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ["" if i < numeric_from else ' class="number"' for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{cell}</{tag}>" for k, cell in zip(kinds, cells, strict=True)) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    named = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{named}><thead>{line("th", head)}</thead><tbody>\n{body}\n</tbody></table></div>'


def fold(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n{content}\n</details>"


def facts(tree: Mapping[str, Any]) -> str:
    """A nested mapping as a table of dotted keys."""
    rows = [(f"<code>{text(key)}</code>", f"<code>{text(value)}</code>") for key, value in flat(dict(tree)).items()]
    return table(("key", "value"), rows, numeric_from=2)


def card(name: str, value: str, below: str, lead: bool = False) -> str:
    kind = "card lead" if lead else "card"
    return f'<div class="{kind}"><span>{name}</span><strong>{value}</strong><small>{below}</small></div>'


def bar(share: float, kind: str = "") -> str:
    """A bar that fills a share of its cell."""
    return f'<span class="bar {kind}"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></span>'


def embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def encoded(picture: Image.Image, kind: str, **options: Any) -> str:
    """A picture as an address that holds it."""
    out = io.BytesIO()
    picture.save(out, kind.upper(), **options)
    return embedded(out.getvalue(), kind)


def thumbnail(picture: np.ndarray, longest: int, words: str) -> str:
    """<img> of uint8 [S, S, 3], made smaller where it is larger than `longest`; tiny ones keep their pixels."""
    image = Image.fromarray(picture)
    if max(image.size) <= _SHARP:
        return f'<img class="sharp" alt="{text(words)}" src="{encoded(image, "png", optimize=True)}">'
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return f'<img alt="{text(words)}" src="{encoded(image, "jpeg", quality=82)}">'
