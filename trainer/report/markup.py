"""What the sections of a page share: escaped text, numbers as people read them, tables, pictures inside the page."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from trainer.config.diff import flat
from trainer.evaluation.predictions import printable

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --sheet: #ffffff; --ink: #1f2937; --soft: #5b6472; --rule: #dfe3e8;
  --lead: #1d4ed8; --faint: #94a3b8; --right: #15803d; --wrong: #b91c1c; --note: #fff7e0; --note-ink: #704a00;
  --s0: #1d4ed8; --s1: #c2410c; --s2: #15803d; --s3: #7e22ce; --s4: #b91c1c; --s5: #0e7490;
  --s6: #a16207; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --sheet: #181e26; --ink: #e5e9ef; --soft: #9aa5b4;
  --rule: #2d3642; --lead: #8ab4ff; --faint: #64748b; --right: #4ade80; --wrong: #f87171; --note: #33290f;
  --note-ink: #f3d58a; --s0: #8ab4ff; --s1: #fdba74; --s2: #4ade80; --s3: #d8b4fe; --s4: #f87171; --s5: #67e8f9;
  --s6: #fde047; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
header p, footer, figcaption, small { color: var(--soft); }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
h3 { font-size: .98rem; margin: 1.25rem 0 .5rem; }
p, li { overflow-wrap: anywhere; }
header p { margin: .25rem 0 .75rem; }
a { color: var(--lead); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; margin: 0 0 1rem; }
nav a { text-decoration: none; padding: .25rem 0; }
section { margin: 0 0 1.25rem; scroll-margin-top: .5rem; }
section:not(.cards) { background: var(--sheet); border: 1px solid var(--rule); border-radius: 12px; padding: 1.1rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; }
.card { flex: 1 1 9.5rem; background: var(--sheet); border: 1px solid var(--rule); border-radius: 12px;
  padding: .8rem 1rem; }
section:not(.cards) .card { background: var(--page); }
.card span, .card small { display: block; color: var(--soft); font-size: .82rem; line-height: 1.4; }
.card span::first-letter { text-transform: uppercase; }
.card strong { font-size: 1.5rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
.card .before { border-top: 1px solid var(--rule); margin-top: .45rem; padding-top: .35rem; }
.card.lead { flex-basis: 100%; }
.card.lead strong { font-size: 2.8rem; line-height: 1.15; color: var(--lead); }
.note { background: var(--note); color: var(--note-ink); border-radius: 8px; padding: .6rem .9rem; margin: 0 0 1rem; }
.wide { overflow-x: auto; }
.tall { max-height: 36rem; overflow: auto; }
.tall thead th { position: sticky; top: 0; background: var(--sheet); z-index: 1; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); font-size: .82rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
td:first-child { overflow-wrap: break-word; min-width: 7rem; }
.number { text-align: right; white-space: nowrap; }
th.number { white-space: normal; }
thead th { vertical-align: bottom; }
.none { color: var(--soft); opacity: .7; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: .3rem 0; cursor: pointer;
  white-space: nowrap; }
th button::after { content: "\\2195"; opacity: .35; padding-left: .25rem; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
input.filter { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--rule);
  border-radius: 8px; padding: .35rem .6rem; margin: 0 0 .6rem; width: min(100%, 18rem); }
.bar { display: inline-block; width: 5.5rem; height: .6rem; border-radius: 3px; background: var(--page);
  margin-left: .5rem; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--lead); }
.bar.bad i { background: var(--wrong); }
.stack { display: flex; height: 1.1rem; border-radius: 5px; overflow: hidden; margin: .9rem 0 .4rem; }
.stack i { display: block; min-width: 1px; }
.confusion { width: auto; }
.confusion th, .confusion td { border: 1px solid var(--rule); padding: .3rem .4rem; min-width: 2.6rem; }
.confusion td { text-align: center; }
.confusion thead th { vertical-align: bottom; text-align: center; }
.confusion thead span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 11rem; }
.confusion tbody th { text-align: right; white-space: nowrap; }
.hit { background: color-mix(in srgb, var(--lead) var(--p), transparent); }
.miss { background: color-mix(in srgb, var(--wrong) var(--p), transparent); }
.deep { color: var(--sheet); }
.matrix { width: min(100%, 40rem); image-rendering: pixelated; border: 1px solid var(--rule); display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.chart { width: 100%; max-width: 29rem; height: auto; display: block; }
.chart text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.chart .head { fill: var(--ink); font-weight: 600; font-size: 13px; }
.chart .grid { stroke: var(--rule); } .chart .mark { stroke: var(--soft); stroke-dasharray: 4 3; }
.chart .line { fill: none; stroke-width: 2; } .chart .ring { fill: none; stroke: var(--wrong); stroke-width: 1.6; }
.chart .count { fill: var(--faint); opacity: .45; }
.training { stroke: var(--faint); --c: var(--faint); } .validation { stroke: var(--lead); --c: var(--lead); }
.s0 { stroke: var(--s0); --c: var(--s0); } .s1 { stroke: var(--s1); --c: var(--s1); }
.s2 { stroke: var(--s2); --c: var(--s2); } .s3 { stroke: var(--s3); --c: var(--s3); }
.s4 { stroke: var(--s4); --c: var(--s4); } .s5 { stroke: var(--s5); --c: var(--s5); }
.dot { fill: var(--c); stroke: none; }
.legend { font-size: .85rem; color: var(--soft); margin: .25rem 0 .5rem; display: flex; flex-wrap: wrap;
  gap: .2rem 1rem; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; background: var(--c);
  margin-right: .35rem; vertical-align: -.06rem; }
.key.ring { background: none; border: 2px solid var(--wrong); }
.tabs { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 .6rem; }
.tabs button { font: inherit; font-size: .9rem; color: var(--ink); background: var(--page); cursor: pointer;
  border: 1px solid var(--rule); border-radius: 999px; padding: .35rem .9rem; }
.tabs button[aria-pressed=true] { background: var(--lead); border-color: var(--lead); color: var(--sheet); }
.shots { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem .9rem; }
.shot { margin: 0; font-size: .82rem; line-height: 1.35; overflow-wrap: anywhere; }
.shot strong { color: var(--ink); } .shot .yes { color: var(--right); } .shot .no { color: var(--wrong); }
.picture { display: block; position: relative; width: 100%; aspect-ratio: 1; padding: 0; border: 3px solid var(--rule);
  border-radius: 8px; overflow: hidden; background: none; cursor: pointer; margin-bottom: .3rem; }
.picture.right { border-color: var(--right); } .picture.wrong { border-color: var(--wrong); }
.picture img { position: absolute; inset: 0; width: 100%; height: 100%; }
.sharp { image-rendering: pixelated; }
.heat { opacity: 0; transition: opacity .12s; }
.picture[aria-pressed=true] .heat, .picture:focus-visible .heat { opacity: 1; }
@media (hover: hover) { .picture:hover .heat { opacity: 1; } }
.found { display: flex; flex-wrap: wrap; gap: .5rem .9rem; padding: .7rem 0; border-bottom: 1px solid var(--rule); }
.found img { width: 5.5rem; height: 5.5rem; border-radius: 6px; }
.found ul { margin: 0; padding-left: 1.1rem; font-size: .88rem; flex: 1 1 16rem; overflow-wrap: anywhere; }
.found p { margin: 0; flex-basis: 100%; font-size: .88rem; }
.tag { display: inline-block; border-radius: 999px; font-size: .76rem; padding: 0 .55rem; background: var(--note);
  color: var(--note-ink); margin-right: .3rem; }
figure.figure { margin: 1rem 0; }
.figure .wide { background: #ffffff; border: 1px solid var(--rule); border-radius: 8px; padding: .5rem; }
.figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: .85rem; margin-top: .35rem; }
details { border-top: 1px solid var(--rule); padding: .5rem 0; }
.shots + details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; }
code { font: .86em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: var(--page); border: 1px solid var(--rule); border-radius: 8px; padding: .7rem .9rem; margin: 0;
  margin-bottom: 1rem; white-space: pre-wrap; }
.files { font-size: .88rem; overflow-wrap: anywhere; padding-left: 1.2rem; }
footer { font-size: .82rem; text-align: center; }
@media (max-width: 40rem) { main { padding: 1rem .6rem 2rem; } section:not(.cards) { padding: .8rem; }
  .figure img { max-width: none; width: max(100%, 34rem); } .card.lead strong { font-size: 2.3rem; }
  .shots { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); } .bar { width: 3rem; }
  th, td { padding: .35rem .4rem; } td:first-child { min-width: 5.5rem; } }
@media print { body { background: none; } section { break-inside: avoid; } details, nav, .tabs { display: none; }
  .tall { max-height: none; } }
"""


# ---------------------------------------------------------------------------------------------------------------
# The script of the page: tables that sort and filter, tabs, and pictures that show where the model looked

SCRIPT = """
"use strict";
for (const head of document.querySelectorAll("table.sorts th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => { const cell = row.cells[column]; return cell.dataset.value ?? cell.textContent; };
    const numeric = head.classList.contains("number");
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => (numeric ? a - b : a.localeCompare(b, undefined, {numeric: true})) * (up ? 1 : -1));
    body.append(...rows.map(([, row]) => row));
  });
}
for (const field of document.querySelectorAll("input.filter")) {
  field.hidden = false;
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    for (const row of field.parentNode.querySelectorAll("tbody tr"))
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
}
for (const tabs of document.querySelectorAll(".tabs")) {
  tabs.hidden = false;
  const show = (chosen) => {
    for (const button of tabs.children) {
      button.setAttribute("aria-pressed", button === chosen);
      document.getElementById(button.dataset.shows).hidden = button !== chosen;
    }
  };
  for (const button of tabs.children) button.addEventListener("click", () => show(button));
  show(tabs.children[0]);
}
for (const picture of document.querySelectorAll("button.picture"))
  picture.addEventListener("click", () =>
    picture.setAttribute("aria-pressed", picture.getAttribute("aria-pressed") !== "true"));
"""

# No request leaves the page, and no other script runs in it, whatever a class or a file is called.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'",
    )
)


# ---------------------------------------------------------------------------------------------------------------
# What the sections of a page share: escaped text, numbers as people read them, tables, pictures inside the page

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
