"""The page of a report: one self-contained HTML file for a laptop or a phone, in light or dark."""

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image

from trainer.config.diff import flat
from trainer.evaluation.predictions import printable
from trainer.report import figures
from trainer.report.figures import Chart, Images, svg
from trainer.report.schema import Report
from trainer.storage.local import write_whole
from trainer.types import EvaluationResult

TEMPLATES = Path(__file__).parent / "templates"
NONE = "\u2013"

# Filters that format numbers and names. A template outputs Markup unchanged and escapes everything else.


def short(name: object, longest: int = 28) -> str:
    """Cut a name in the middle if it is too long; the tooltip has the whole name."""
    whole = printable(str(name))
    cut = figures.shortened(whole, longest)
    return whole if cut == whole else Markup('<span title="{}">{}</span>').format(whole, cut)


def percent(fraction: float | None, digits: int = 1) -> Markup:
    return Markup(NONE if fraction is None else f"{100 * fraction:.{digits}f}\u202f%")


def interval(bounds: Sequence[float]) -> Markup:
    """Format an interval of fractions in percent."""
    return Markup("{:.1f}{}{}").format(100 * bounds[0], NONE, percent(bounds[1]))


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def plural(count: int, singular: str, many: str | None = None) -> str:
    """Format a count: "1 image", "2,000 images"."""
    return f"{count:,} {singular if count == 1 else many or singular + 's'}"


@cache
def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True,
                              finalize=lambda v: v if isinstance(v, Markup) else printable(str(v)))  # fmt: skip
    environment.filters |= {f.__name__: f for f in (short, percent, interval, number, duration, plural, flat)}
    style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page sends no request and runs no other script, whatever the names of classes and files contain.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment.globals |= {"style": Markup(style), "script": Markup(script), "policy": policy}
    return environment


def render(template: str, **context: Any) -> str:
    """Render a template with the variables that it uses."""
    return _environment().get_template(template).render(context)


LARGE_SIDE, SMALL_SIDE = 224, 112  # longest sides of thumbnails, pixels
SHOWN = 12  # label errors, and groups of duplicates, that are shown with their images
MEMBERS_SHOWN = 4  # images per group
_SHARP = 64  # pixels; a smaller image is enlarged without interpolation
_HEAT_SIDE = 28  # pixels of an overlay, which the browser enlarges smoothly
_LARGE = 100_000  # bytes from which a figure is embedded as JPEG, a fifth of the size for photos


def _embed(image: Image.Image, kind: str, alt: str = "", css_class: str = "", **options: Any) -> Markup:
    """Encode an image and embed it as <img>."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    tag = Markup('<img class="{}" alt="{}" src="data:image/{};base64,{}">')
    return tag.format(css_class, printable(alt), kind.lower(), data)


def _thumbnail(pixels: np.ndarray, longest: int, alt: str) -> Markup:
    """Embed uint8 [S, S, 3], at most `longest` pixels a side; tiny images retain their pixels."""
    image = Image.fromarray(pixels)
    if max(image.size) <= _SHARP:
        return _embed(image, "PNG", alt, "sharp", optimize=True)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _embed(image, "JPEG", alt, quality=82)


def _overlay(heatmap: np.ndarray) -> Markup:
    """Embed a heatmap, float [h, w] in 0..1, in colours whose opacity grows with it."""
    size = (_HEAT_SIDE, _HEAT_SIDE)
    smooth = Image.fromarray(np.asarray(heatmap, np.float32)).resize(size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(smooth), 0, 1)
    pixels = colormaps["inferno"](0.25 + 0.75 * level, bytes=True)
    pixels[..., 3] = np.rint(255 * (0.25 + 0.5 * level))
    return _embed(Image.fromarray(pixels), "PNG", css_class="heat", optimize=True)


def _figure(file: Path, alt: str) -> Markup:
    """Embed a PNG file, as JPEG if it is large."""
    image = Image.open(file)
    small = file.stat().st_size <= _LARGE
    return _embed(image, "PNG", alt) if small else _embed(image.convert("RGB"), "JPEG", alt, quality=85)


# Heatmaps of examples of the scored split for their predicted classes: indices [k] -> float32 [k, h, w] in 0..1.
Explanations = Callable[[Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Samples:
    """Training images of the report."""

    images: np.ndarray  # uint8 [k, S, S, 3], k >= 1
    class_names: Sequence[str]  # of each image
    augmented: np.ndarray | None = None  # uint8 [v, S, S, 3]: the first image in v epochs; None: no augmentation


@dataclass(frozen=True)
class DuplicateImages:
    """Images that occur more than once."""

    facts: dict[str, Any]  # `find_duplicates`
    images: Sequence[Sequence[np.ndarray]]  # uint8 [S, S, 3], the first members of the first groups


@dataclass(frozen=True)
class ReportImages:
    """The images of a report; all but `fetch` are optional."""

    fetch: Images  # of the scored split, by example index
    samples: Samples | None = None
    explain: Explanations | None = None  # for the gallery
    duplicates: DuplicateImages | None = None


IN_GALLERY = 24  # images of a tab
_FIGURES = {"samples": "Training examples with their class.", "augmentation": "One training example in several epochs."}
# Category of time -> its name, and the custom property of its colour.
CATEGORY_COLOURS = {
    "train": ("training", "--s0"), "wait": ("waiting for data", "--s1"),
    "features": ("features of frozen layers", "--s6"), "compile": ("compiling", "--s3"),
    "start": ("starting", "--faint"), "checkpoint": ("checkpoints", "--s5"),
    "evaluation": ("evaluation", "--s2"), "finish": ("export and report", "--soft"),
    "lost": ("lost with a process", "--s4"), "down": ("not running", "--rule"),
}  # fmt: skip


def _shot(result: EvaluationResult, index: int, pixels: np.ndarray, heatmap: np.ndarray | None) -> dict[str, Any]:
    """Return an example of the gallery."""
    label, probabilities, names = int(result.labels[index]), result.probabilities[index], result.class_names
    prediction = int(probabilities.argmax())
    return {
        "image": _thumbnail(pixels, LARGE_SIDE, f"{names[prediction]}, truth {names[label]}"),
        "heat": "" if heatmap is None else _overlay(heatmap),
        "right": label == prediction,
        "prediction": names[prediction],
        "probability": float(probabilities[prediction]),
        "truth": names[label],
        "truth_probability": float(probabilities[label]),
        "file": result.names[index],
    }


def write_page(
    path: Path,
    report: Report,
    config: Mapping[str, Any],
    result: EvaluationResult,
    images: ReportImages,
    charts: Mapping[str, Sequence[Chart]],
) -> Path:
    """Write the page to `path`, index.html in the folder of the figures that it embeds.

    Args:
        report: as `write_report` returns it.
        config: the resolved configuration.
        images: each is read once; their number does not depend on the size of the split.
        charts: curves, confusion and calibration of `figures`.
    """
    confusion, per_class = np.asarray(report["test"]["confusion"]), report["test"]["per_class"]
    few, wrong = len(confusion) <= figures.NUMBERED, figures.mistakes(confusion)
    predicted = wrong.argmax(axis=1)  # the most frequent wrong prediction per class
    weakest_first = sorted(range(len(per_class)), key=lambda i: (not per_class[i]["support"], per_class[i]["f1"]))
    tabs = {
        "most_wrong": figures.find_most_wrong(result, IN_GALLERY),
        "least_sure": figures.find_least_sure(result, IN_GALLERY),
        "random": figures.find_random(result, report["seed"]),
    }
    explained = sorted({index for indices in tabs.values() for index in indices})
    suspects = report["label_errors"]["rows"][:SHOWN]
    shown = sorted({*explained, *(row["index"] for row in suspects)})
    pixels = dict(zip(shown, images.fetch(shown), strict=True))
    heatmaps = dict(zip(explained, images.explain(explained), strict=True)) if images.explain and explained else {}
    shots = {i: _shot(result, i, pixels[i], heatmaps.get(i)) for i in explained}
    seconds = report["timing"].get("seconds", {})
    groups = report["duplicates"].get("groups", [])[:SHOWN]
    members = [*(images.duplicates.images if images.duplicates else ()), *[()] * len(groups)]
    page = render(
        "report.html.j2",
        report=report,
        config=config,
        charts={
            "curves": [svg(f"curve{i}", chart) for i, chart in enumerate(charts.get("curves", ()))],
            "confusion": None if few else svg("confusion", charts["confusion"][0]),
            "calibration": svg("calibration", charts["calibration"][0]),
        },
        mistakes=figures.top_confusions(confusion, 8 if few else 15),
        per_class=[(per_class[i], per_class[predicted[i]]["name"], int(wrong[i, predicted[i]])) for i in weakest_first],
        tabs={name: [shots[i] for i in indices] for name, indices in tabs.items()},
        explained=bool(heatmaps),
        suspects={row["index"]: _thumbnail(pixels[row["index"]], SMALL_SIDE, row["label"]) for row in suspects},
        copied=[
            [_thumbnail(p, SMALL_SIDE, m["file"]) for p, m in zip(first, group["members"], strict=False)]
            for first, group in zip(members, groups, strict=False)
        ],
        figures=[
            (_figure(path.parent / report["figures"][name], text), text)
            for name, text in _FIGURES.items()
            if name in report["figures"]
        ],
        spent=[(*CATEGORY_COLOURS.get(name, (name, "--soft")), s) for name, s in seconds.items() if s >= 0.05],
        timing={key: value for key, value in report["timing"].items() if key != "command"},
    )
    write_whole(path, page)
    return path
