"""The style sheet of the report page."""

from __future__ import annotations

STYLE = """
:root { --page: #f6f7f9; --sheet: #ffffff; --ink: #1f2937; --soft: #5b6472; --rule: #dfe3e8; --lead: #1d4ed8;
  --note: #fff7e0; --note-ink: #704a00; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --sheet: #181e26; --ink: #e5e9ef; --soft: #9aa5b4;
  --rule: #2d3642; --lead: #8ab4ff; --note: #33290f; --note-ink: #f3d58a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
header p, footer, figcaption, small { color: var(--soft); }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
header p { margin: .25rem 0 1.25rem; }
section { margin: 0 0 1.25rem; }
section:not(.cards) { background: var(--sheet); border: 1px solid var(--rule); border-radius: 12px; padding: 1.1rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; }
.card { flex: 1 1 9.5rem; background: var(--sheet); border: 1px solid var(--rule); border-radius: 12px;
  padding: .8rem 1rem; }
.card span, .card small { display: block; color: var(--soft); font-size: .82rem; line-height: 1.35; }
.card span::first-letter { text-transform: uppercase; }
.card strong { font-size: 1.5rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
.card.lead { flex-basis: 100%; }
.card.lead strong { font-size: 2.8rem; line-height: 1.15; color: var(--lead); }
.note { background: var(--note); color: var(--note-ink); border-radius: 8px; padding: .6rem .9rem; margin: 0 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); font-size: .82rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
td:first-child { overflow-wrap: anywhere; min-width: 7rem; }
.number { text-align: right; white-space: nowrap; }
.none { color: var(--soft); opacity: .7; }
figure { margin: 1rem 0; }
figure .wide { background: #ffffff; border: 1px solid var(--rule); border-radius: 8px; padding: .5rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: .85rem; margin-top: .35rem; }
details { border-top: 1px solid var(--rule); padding: .5rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; }
code { font: .86em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.files { font-size: .88rem; overflow-wrap: anywhere; padding-left: 1.2rem; }
footer { font-size: .82rem; text-align: center; }
@media (max-width: 40rem) { main { padding: 1rem .6rem 2rem; } section:not(.cards) { padding: .8rem; }
  figure img { max-width: none; width: max(100%, 34rem); } .card.lead strong { font-size: 2.3rem; } }
@media print { body { background: none; } section { break-inside: avoid; } details { display: none; } }
"""
