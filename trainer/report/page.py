"""The page of a run: one HTML file that needs nothing beside it, on a laptop or a phone, in light or dark."""

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

# Filters: numbers and names as people read them. A template shows Markup as it is and escapes all else.


def short(name: object, longest: int = 28) -> str:
    """A name, cut in the middle where it is too long; the whole is its tooltip."""
    whole = printable(str(name))
    cut = figures.shortened(whole, longest)
    return whole if cut == whole else Markup('<span title="{}">{}</span>').format(whole, cut)


def percent(fraction: float | None, digits: int = 1) -> Markup:
    return Markup(NONE if fraction is None else f"{100 * fraction:.{digits}f}\u202f%")


def span(interval: Sequence[float]) -> Markup:
    """An interval of fractions, in percent."""
    return Markup("{:.1f}{}{}").format(100 * interval[0], NONE, percent(interval[1]))


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


def _finalize(value: object) -> str:
    """The text of a value in a template, before it is escaped: class and file names may hold anything."""
    return value if isinstance(value, Markup) else printable(str(value))


@cache
def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, finalize=_finalize)  # fmt: skip
    environment.filters |= {f.__name__: f for f in (short, percent, span, number, duration, plural, flat)}
    style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # No request leaves the page, and no other script runs in it, whatever a class or a file is called.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment.globals |= {"style": Markup(style), "script": Markup(script), "policy": policy}
    return environment


def render(template: str, **context: Any) -> str:
    """A page out of a template and the variables that it names."""
    return _environment().get_template(template).render(context)


SHOT, SMALL = 224, 112  # longest sides of thumbnails, pixels
SHOWN = 12  # label errors and groups of duplicates that are shown with their pictures
MEMBERS_SHOWN = 4  # pictures of a group
_SHARP = 64  # pixels; a smaller picture keeps its pixels when it is enlarged
_HEAT_SIDE = 28  # pixels of an overlay, which the browser enlarges smoothly
_LARGE = 100_000  # bytes; a figure above this is embedded as JPEG, a fifth of the size where it shows photos


def _image(content: bytes, kind: str, words: str = "", name: str = "") -> Markup:
    """<img> with the picture inside; `name` is a class of the style sheet."""
    data = base64.b64encode(content).decode("ascii")
    return Markup('<img class="{}" alt="{}" src="data:image/{};base64,{}">').format(name, printable(words), kind, data)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def _thumbnail(picture: np.ndarray, longest: int, words: str) -> Markup:
    """<img> of uint8 [S, S, 3], made smaller where it is larger than `longest`; tiny ones keep their pixels."""
    image = Image.fromarray(picture)
    if max(image.size) <= _SHARP:
        return _image(_encoded(image, "PNG", optimize=True), "png", words, "sharp")
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _image(_encoded(image, "JPEG", quality=82), "jpeg", words)


def _overlay(heat: np.ndarray) -> Markup:
    """A heatmap, float [h, w] in 0..1, as a coloured picture, more opaque where it is higher."""
    size = (_HEAT_SIDE, _HEAT_SIDE)
    smooth = Image.fromarray(np.asarray(heat, np.float32)).resize(size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(smooth), 0, 1)
    pixels = colormaps["inferno"](0.25 + 0.75 * level, bytes=True)
    pixels[..., 3] = np.rint(255 * (0.25 + 0.5 * level))
    return _image(_encoded(Image.fromarray(pixels), "PNG", optimize=True), "png", name="heat")


def _figure(file: Path, words: str) -> Markup:
    """<img> of a PNG file, as JPEG where it is large."""
    content = file.read_bytes()
    if len(content) <= _LARGE:
        return _image(content, "png", words)
    return _image(_encoded(Image.open(file).convert("RGB"), "JPEG", quality=85), "jpeg", words)


# Heatmaps of examples of the evaluated split for the predicted classes: indices [k] -> float32 [k, h, w] in 0..1.
Explanations = Callable[[Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Samples:
    """Training pictures for the report. Empty arrays leave their figure out."""

    pictures: np.ndarray  # uint8 [k, S, S, 3]
    class_names: Sequence[str]  # of each picture
    augmented: np.ndarray | None = None  # uint8 [v, S, S, 3]: the first picture in v epochs; None: no augmentation


@dataclass(frozen=True)
class Repeats:
    """Pictures that occur more than once."""

    facts: dict[str, Any]  # `duplicates.described`
    pictures: Sequence[Sequence[np.ndarray]]  # uint8 [S, S, 3], the first of the first groups


@dataclass(frozen=True)
class Pictures:
    """The pictures of a report; all but `images` may be left out."""

    images: Images  # of the evaluated split, by example index
    samples: Samples | None = None
    explain: Explanations | None = None  # for the gallery
    repeats: Repeats | None = None


IN_GALLERY = 24  # pictures of a tab
_FIGURES = {
    "samples": "Training examples with their class.",
    "augmentation": "What one training example looks like in several epochs.",
}
# Category of time -> its name, and the custom property of its colour.
CATEGORY_COLOURS = {
    "train": ("training", "--s0"), "wait": ("waiting for data", "--s1"),
    "features": ("features of frozen layers", "--s6"), "compile": ("compiling", "--s3"),
    "start": ("starting", "--faint"), "checkpoint": ("checkpoints", "--s5"),
    "evaluation": ("evaluation", "--s2"), "finish": ("export and report", "--soft"),
    "lost": ("lost with a process", "--s4"), "down": ("no process there", "--rule"),
}  # fmt: skip


def _shot(result: EvaluationResult, index: int, picture: np.ndarray, heat: np.ndarray | None) -> dict[str, Any]:
    """An example of the gallery."""
    label, probabilities, names = int(result.labels[index]), result.probabilities[index], result.class_names
    answer = int(probabilities.argmax())
    return {
        "picture": _thumbnail(picture, SHOT, f"{names[answer]}, truth {names[label]}"),
        "heat": "" if heat is None else _overlay(heat),
        "right": label == answer,
        "answer": names[answer],
        "probability": float(probabilities[answer]),
        "truth": names[label],
        "truth_probability": float(probabilities[label]),
        "file": result.names[index],
    }


def write_page(
    path: Path,
    report: Report,
    config: Mapping[str, Any],
    result: EvaluationResult,
    pictures: Pictures,
    charts: Mapping[str, Sequence[Chart]],
) -> Path:
    """Write the page beside the figures it embeds.

    Args:
        path: index.html in the folder of the figures.
        report: as `write_report` returns it.
        config: the resolved configuration.
        pictures: read once; how many are shown does not depend on the split's size.
        charts: curves, confusion, calibration, as `figures` draws them.
    """
    confusion, per_class = np.asarray(report["test"]["confusion"]), report["test"]["per_class"]
    few, wrong = len(confusion) <= figures.NUMBERED, figures.mistakes(confusion)
    taken_for = wrong.argmax(axis=1)
    weakest_first = sorted(range(len(per_class)), key=lambda i: (not per_class[i]["support"], per_class[i]["f1"]))
    tabs = {
        "most_wrong": figures.find_most_wrong(result, IN_GALLERY),
        "least_sure": figures.find_least_sure(result, IN_GALLERY),
        "random": figures.find_random(result, report["seed"]),
    }
    explained = sorted({index for indices in tabs.values() for index in indices})
    suspects = report["label_errors"]["rows"][:SHOWN]
    wanted = sorted({*explained, *(row["index"] for row in suspects)})
    images = dict(zip(wanted, pictures.images(wanted), strict=True))
    heat = dict(zip(explained, pictures.explain(explained), strict=True)) if pictures.explain and explained else {}
    shots = {i: _shot(result, i, images[i], heat.get(i)) for i in explained}
    seconds = report["timing"].get("seconds", {})
    groups = report["duplicates"].get("groups", [])[:SHOWN]
    seen = [*(pictures.repeats.pictures if pictures.repeats else ()), *[()] * len(groups)]
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
        per_class=[(per_class[i], per_class[taken_for[i]]["name"], int(wrong[i, taken_for[i]])) for i in weakest_first],
        tabs={name: [shots[i] for i in indices] for name, indices in tabs.items()},
        explained=bool(heat),
        suspects={row["index"]: _thumbnail(images[row["index"]], SMALL, row["label"]) for row in suspects},
        copied=[
            [_thumbnail(p, SMALL, m["file"]) for p, m in zip(shown, group["members"], strict=False)]
            for shown, group in zip(seen, groups, strict=False)
        ],
        figures=[
            (_figure(path.parent / report["figures"][name], words), words)
            for name, words in _FIGURES.items()
            if name in report["figures"]
        ],
        spent=[
            (*CATEGORY_COLOURS.get(category, (category, "--soft")), s) for category, s in seconds.items() if s >= 0.05
        ],
        timing={key: value for key, value in report["timing"].items() if key != "command"},
    )
    write_whole(path, page)
    return path
