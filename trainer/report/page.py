"""The page of a run: one HTML file that needs nothing beside it, on a laptop or a phone, in light or dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.report.charts import calibration_chart, history_charts
from trainer.report.markup import POLICY, SCRIPT, STYLE, duration, embedded, percent, plural, text
from trainer.report.sections import (
    PagePictures,
    class_table,
    confusion_part,
    data_part,
    duplicate_part,
    export_part,
    gallery_part,
    group_part,
    headline,
    how_part,
    label_part,
    phase_table,
    speed_part,
)
from trainer.storage.local import write_whole
from trainer.types import EvaluationResult

_FIGURES = {
    "samples": "Training examples with their class.",
    "augmentation": "What one training example looks like in several epochs.",
}
_LARGE = 100_000  # bytes; a figure above this is embedded as JPEG, a fifth of the size where it shows photos


def _figure(folder: Path, report: Mapping[str, Any], name: str) -> str:
    """A figure of photos, which stays what the PNG is."""
    file = report["figures"].get(name)
    if file is None:
        return ""
    content, kind = (folder / file).read_bytes(), "png"
    if len(content) > _LARGE:
        packed = io.BytesIO()
        Image.open(io.BytesIO(content)).convert("RGB").save(packed, "JPEG", quality=85)
        content, kind = packed.getvalue(), "jpeg"
    words = text(_FIGURES[name])
    picture = f'<img alt="{words}" src="{embedded(content, kind)}">'
    return f'<figure class="figure"><div class="wide">{picture}</div><figcaption>{words}</figcaption></figure>'


def assemble(title: str, heading: str, subtitle: str, top: str, parts: Sequence[tuple[str, str]], footer: str) -> str:
    """A whole page from HTML; parts without content are left out.

    Args:
        title: of the window.
        heading: of the page.
        subtitle: below it.
        top: what comes before the first section.
        parts: (name, content) of each section.
        footer: the last line.
    """
    parts = [(name, content) for name, content in parts if content]
    links = "".join(f'<a href="#{name.lower().replace(" ", "-")}">{name}</a>' for name, _ in parts)
    body = "\n".join(
        f'<section id="{name.lower().replace(" ", "-")}"><h2>{name}</h2>\n{content}</section>'
        for name, content in parts
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{heading}</h1><p>{subtitle}</p></header>
<nav aria-label="sections">{links}</nav>
{top}
{body}
<footer>{footer}</footer>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def write_page(
    path: Path,
    report: Mapping[str, Any],
    config: Mapping[str, Any],
    result: EvaluationResult,
    pictures: PagePictures,
) -> Path:
    """Write the page beside the figures it embeds.

    Args:
        path: index.html in the folder of the figures.
        report: what `report.write_report` returns.
        config: the resolved configuration.
        result: what was scored.
        pictures: what it shows of the images.
    """
    folder, test = path.parent, report["test"]
    title = text(report["title"])
    spent = sum(phase["seconds"] for phase in report["phases"].values())
    trained = f" · trained in {duration(spent)}" if report["phases"] else ""
    subtitle = f"{plural(len(test['per_class']), 'class', 'classes')} · seed {text(report['seed'])}{trained}"
    parts = [
        ("Training", phase_table(report["phases"]) + history_charts(report["history"], report["phases"])),
        ("Gallery", gallery_part(result, pictures)),
        (
            "Classes",
            confusion_part(test["confusion"], result.class_names) + class_table(test["per_class"], test["confusion"]),
        ),
        ("Groups", group_part(test["groups"]) if "groups" in test else ""),
        (
            "Calibration",
            "<p>Below the diagonal the model is surer than it is right. The bars count examples.</p>"
            + calibration_chart(test["calibration_bins"]),
        ),
        ("Possible label errors", label_part(report["label_errors"], pictures, test["n"])),
        ("Duplicates", duplicate_part(report["duplicates"], pictures) if report["duplicates"] else ""),
        ("Data", data_part(report["data"]) + "".join(_figure(folder, report, name) for name in _FIGURES)),
        ("Speed", speed_part(report["timing"])),
        ("Export", export_part(report["export"])),
        ("How it was made", how_part(report, config)),
    ]
    page = assemble(
        f"{title}: {percent(test['accuracy'])} {text(test['split'])} accuracy",
        title,
        subtitle,
        headline(test, report["phases"]),
        parts,
        f"kubetune · written {text(report['timing']['written'])}",
    )
    write_whole(path, page)
    return path
