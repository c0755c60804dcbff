"""The page of a run: one HTML file that needs nothing beside it, on a laptop or a phone, in light or dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.config_differences import flat
from trainer.evaluation.names import printable
from trainer.evaluation.style import STYLE
from trainer.storage.files import write_whole

_FIGURES = {
    "curves": "Loss and accuracy over all phases; rings mark each phase's best epoch.",
    "predictions": "Random examples. Green is right, red is wrong.",
    "most_wrong": "The mistakes the model was most sure of. Wrong labels show up here first.",
    "confusion": "Rows are the truth, columns the predictions.",
    "f1": "The weakest classes first.",
    "calibration": "Bars below the diagonal: the model is surer than it is right.",
    "samples": "Training examples with their class.",
    "augmentation": "What one training example looks like in several epochs.",
}
_LARGE = 300_000  # bytes; a figure above this is embedded as JPEG, a fifth of the size where it shows photos
_ROWS_SHOWN = 20  # a longer table is folded


def _text(value: object) -> str:
    """Escaped text; class and file names may hold anything."""
    return escape(printable(str(value)), quote=True)


def _percent(share: float | None, digits: int = 1) -> str:
    return "\u2013" if share is None else f"{100 * share:.{digits}f}\u202f%"


def _range(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f}\u2013{_percent(interval[1])}"


def _number(value: float | None, digits: int = 3) -> str:
    return "\u2013" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "\u2013"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    """A table of cells that are HTML already; columns from `numeric_from` on are numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ["" if i < numeric_from else ' class="number"' for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{cell}</{tag}>" for k, cell in zip(kinds, cells, strict=True)) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{line("th", head)}</thead><tbody>\n{body}\n</tbody></table></div>'


def _fold(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n{content}\n</details>"


def _facts(tree: Mapping[str, Any]) -> str:
    """A nested mapping as a table of dotted keys."""
    rows = [(f"<code>{_text(key)}</code>", f"<code>{_text(value)}</code>") for key, value in flat(dict(tree)).items()]
    return _table(("key", "value"), rows, numeric_from=2)


def _figure(folder: Path, report: Mapping[str, Any], name: str) -> str:
    file = report["figures"].get(name)
    if file is None:
        return ""
    content, kind = (folder / file).read_bytes(), "png"
    if len(content) > _LARGE:
        packed = io.BytesIO()
        Image.open(io.BytesIO(content)).convert("RGB").save(packed, "JPEG", quality=90, subsampling=0)
        content, kind = packed.getvalue(), "jpeg"
    text = _FIGURES[name]
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    picture = f'<img alt="{_text(text)}" src="{source}">'
    return f'<figure><div class="wide">{picture}</div><figcaption>{_text(text)}</figcaption></figure>'


def _card(name: str, value: str, below: str, lead: bool = False) -> str:
    kind = "card lead" if lead else "card"
    return f'<div class="{kind}"><span>{name}</span><strong>{value}</strong><small>{below}</small></div>'


def _headline(test: Mapping[str, Any]) -> str:
    n, split = test["n"], test["split"]
    found = f"95 % interval {_range(test['interval'])}; {test['correct']:,} of {n:,} {_text(split)} examples"
    cards = [_card(f"{_text(split)} accuracy", _percent(test["accuracy"], 2), found, lead=True)]
    if "top_5" in test:
        cards.append(_card("top-5 accuracy", _percent(test["top_5"]), f"95 %: {_range(test['top_5_interval'])}"))
    cards += [
        _card("macro F1", _number(test["macro_f1"]), "mean over classes"),
        _card("loss", _number(test["loss"]), "cross entropy, nats"),
        _card(
            "calibration error",
            _number(test["calibration_error"]),
            f"mean confidence {_percent(test['mean_confidence'])}",
        ),
        _card("most frequent class", _percent(test["majority"]), "accuracy of always answering it"),
    ]
    note = f'<p class="note">{_text(test["note"])}</p>' if "note" in test else ""
    return f'<section class="cards">{"".join(cards)}</section>\n{note}'


def _phase_table(phases: Mapping[str, Mapping[str, Any]]) -> str:
    def score(phase: Mapping[str, Any]) -> str:
        interval = f" <small>({_range(phase['val_interval'])})</small>" if phase.get("val_interval") else ""
        return _percent(phase["val_accuracy"], 2) + interval

    head = ("phase", "epochs", "best epoch", "validation accuracy", "validation loss", "trainable parameters", "time")
    rows = [
        (
            _text(name),
            _number(phase["epochs"], 1),
            _number(phase.get("best_epoch")),
            score(phase),
            _number(phase.get("val_loss")),
            _number(phase.get("trainable_parameters")),
            _duration(phase["seconds"]),
        )
        for name, phase in phases.items()
    ]
    return _table(head, rows) if rows else ""


def _class_table(per_class: Sequence[Mapping[str, Any]]) -> str:
    def cell(row: Mapping[str, Any], what: str) -> str:
        if what in row["undefined"]:
            return '<span class="none" title="nothing to divide by: counted as 0">0.000</span>'
        return _number(float(row[what]))

    rows = [
        (_text(row["name"]), *(cell(row, what) for what in ("precision", "recall", "f1")), f"{row['support']:,}")
        for row in per_class
    ]
    table = _table(("class", "precision", "recall", "F1", "examples"), rows)
    undefined = [row for row in per_class if row["undefined"]]
    if undefined:
        table += (
            f"<p><small>{len(undefined)} classes have a score of 0 because there was nothing to divide by: no example "
            "of the class, or no prediction of it (shown grey).</small></p>"
        )
    return table if len(rows) <= _ROWS_SHOWN else _fold(f"All {len(rows)} classes", table)


def _group_table(groups: Mapping[str, Any]) -> str:
    """Fairness: how each group fares, and the largest gap."""
    rows = [
        (
            _text(row["name"]),
            f"{row['n']:,}",
            f"{_percent(row['accuracy'])} <small>({_range(row['interval'])})</small>",
            _number(float(row["macro_f1"])),
        )
        for row in groups["rows"]
    ]
    table = _table((_text(groups["field"]), "examples", "accuracy (95 %)", "macro F1"), rows)
    gap = groups.get("gap")
    if gap is None:
        return table
    sure = "the two intervals overlap" if gap["overlap"] else "the two intervals do not overlap: these groups differ"
    words = f"{_text(gap['highest'])} and {_text(gap['lowest'])}; {sure}"
    return f"<p>Largest gap: {100 * gap['accuracy']:.1f} points of accuracy, between {words}.</p>{table}"


def _data_section(data: Mapping[str, Any]) -> str:
    parts = []
    counts = data.get("counts", {})
    if "name" in data:
        whole = ", ".join(f"{count:,} {_text(split)}" for split, count in counts.items())
        parts.append(f"<p><strong>{_text(data['name'])}</strong>: {whole or 'no counts given'}.</p>")
    for note in data.get("notes", []):
        parts.append(f'<p class="note">{_text(note)}</p>')
    missing = [*data.get("skipped", []), *data.get("undecodable", [])]
    if missing:
        lines = "\n".join(f"<li>{_text(line)}</li>" for line in missing)
        parts.append(f'<p class="note">Could not be read and counted for nothing: {len(missing):,} examples.</p>')
        parts.append(_fold("Skipped files", f'<ul class="files">{lines}</ul>'))
    by_class, names = data.get("class_counts"), data.get("class_names")
    if by_class and names:
        columns = list(by_class)
        rows = [(_text(name), *(f"{by_class[s][i]:,}" for s in columns)) for i, name in enumerate(names)]
        parts.append(_fold("Examples of each class", _table(("class", *map(_text, columns)), rows)))
    if "fingerprint" in data:
        parts.append(f'<p><small>fingerprint <code class="long">{_text(data["fingerprint"])}</code></small></p>')
    return "\n".join(parts)


def write_page(path: Path, report: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """Write the page beside the figures it embeds.

    Args:
        path: index.html in the folder of the figures.
        report: what `report.write_report` returns.
        config: the resolved configuration.
    """
    folder, test, timing = path.parent, report["test"], report["timing"]

    def figures(*names: str) -> str:
        return "\n".join(_figure(folder, report, name) for name in names)

    title = _text(report["title"])
    spent = sum(phase["seconds"] for phase in report["phases"].values())
    subtitle = f"{len(test['per_class']):,} classes · seed {_text(report['seed'])} · trained in {_duration(spent)}"
    sections = [
        ("Training", _phase_table(report["phases"]) + figures("curves")),
        ("Predictions", figures("predictions", "most_wrong")),
        ("Classes", figures("confusion", "f1") + _class_table(test["per_class"])),
        ("Groups", _group_table(test["groups"]) if "groups" in test else ""),
        ("Calibration", figures("calibration")),
        ("Data", _data_section(report["data"]) + figures("samples", "augmentation")),
        ("Export", _facts(report["export"]) if report["export"] else ""),
    ]
    folds = [("Configuration", config), ("Versions", report["versions"]), ("Timing", timing)]
    how = "\n".join(_fold(name, _facts(tree)) for name, tree in folds if tree)
    body = "\n".join(f"<section><h2>{name}</h2>\n{content}</section>" for name, content in sections if content)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: {_percent(test["accuracy"])} {_text(test["split"])} accuracy</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><p>{subtitle}</p></header>
{_headline(test)}
{body}
<section><h2>How it was made</h2>
{how}
</section>
<footer>kubetune · written {_text(timing["written"])}</footer>
</main>
</body>
</html>
"""
    write_whole(path, page)
    return path
