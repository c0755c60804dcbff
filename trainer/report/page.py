"""Write the page of a report: one self-contained HTML file for all screen sizes, with a light and a dark theme."""

import base64
import hashlib
import io
from collections import Counter
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

from trainer.config.diff import flatten
from trainer.errors import ConfigError, format_count
from trainer.names import encode_cell, escape_unprintable
from trainer.report import figures
from trainer.report.figures import Chart, FetchImages, to_svg
from trainer.report.schema import Report
from trainer.storage.local import delete_stale_temporary_files, write_atomically
from trainer.storage.path import StoragePath
from trainer.types import EvaluationResult

INDEX = "index.html"  # file name of the page in a command's output folder
TEMPLATES = Path(__file__).parent / "templates"
MISSING = "\u2013"  # en dash, shown instead of a missing value


def require_replaceable_page(folder: StoragePath, command: str, data_file: str) -> None:
    """Raise a ConfigError if `folder` has an index.html that `command` did not write, and which it would replace.

    The command writes `data_file` next to its page, so a page without this file is another page, such as a report.
    """
    if (folder / INDEX).exists() and not (folder / data_file).exists():
        problem = f"has an {INDEX} that {command} did not write"
        raise ConfigError(problem, key="output", value=str(folder), fix="choose another folder")


def write_output(folder: StoragePath, name: str, content: bytes | str) -> None:
    """Write a file of a command's output atomically, after deleting what killed processes left of it."""
    if folder.is_local:
        delete_stale_temporary_files(Path(str(folder)), name)
    (folder / name).write(content)


# The functions from here to `format_duration` are template filters, as `format_count` is. Templates output Markup
# unchanged, and escape all other values.


def shorten(name: object, max_length: int = 28) -> str:
    """Replace the middle of a long name by an ellipsis, and show the whole name in a tooltip."""
    full_name = escape_unprintable(str(name))
    shortened = figures.shorten_name(full_name, max_length)
    return full_name if shortened == full_name else Markup('<span title="{}">{}</span>').format(full_name, shortened)


def format_percent(fraction: float | None, digits: int = 1) -> Markup:
    """Format a fraction in percent, like "93.1 %", or None as a dash."""
    return Markup(MISSING if fraction is None else f"{100 * fraction:.{digits}f}\u202f%")


def format_interval(bounds: Sequence[float]) -> Markup:
    """Format an interval of fractions in percent, with an en dash between its bounds."""
    return Markup("{:.1f}\u2013{}").format(100 * bounds[0], format_percent(bounds[1]))


def format_number(value: float | None, digits: int = 3) -> str:
    """Format an int like "2,000", a float with `digits` decimals, or None as a dash."""
    return MISSING if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def format_duration(seconds: float | None) -> str:
    """Format seconds like "12.5 s", "5 min 3 s" or "2 h 10 min", or None as a dash."""
    if seconds is None:
        return MISSING
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {remainder} s"


@cache
def _create_environment() -> Environment:
    """Create the Jinja environment of the templates, with their filters, style sheet and script."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: v if isinstance(v, Markup) else escape_unprintable(str(v)),
    )
    environment.filters |= {
        "short": shorten,
        "percent": format_percent,
        "interval": format_interval,
        "flatten": flatten,
        "cell": encode_cell,
    }
    environment.filters |= {"number": format_number, "duration": format_duration, "plural": format_count}
    style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # With this Content-Security-Policy, the page sends no request and runs only report.js, even if a class or file name
    # with HTML were not escaped.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment.globals |= {"style": Markup(style), "script": Markup(script), "policy": policy}
    return environment


def render(template: str, **context: Any) -> str:
    """Render a template of this package with the variables in `context`; an undefined variable is an error."""
    return _create_environment().get_template(template).render(context)


GALLERY_SIDE = 224  # longest side, in pixels, of an image in the gallery
THUMBNAIL_PIXELS = 112  # longest side, in pixels, of an image in other sections
MAX_ENTRIES_WITH_IMAGES = 12  # maximum number of label errors, and of groups of duplicates, shown with images
MAX_IMAGES_PER_GROUP = 4  # images shown per group of duplicates
_MAX_PIXELATED_SIDE = 64  # pixels; an image up to this size is enlarged without interpolation
_HEATMAP_SIDE = 28  # height and width of a heatmap in pixels; the browser enlarges it with interpolation
_MAX_PNG_BYTES = 100_000  # a larger figure is embedded as JPEG, which takes a fifth of the size for photos


def _embed_image(image: Image.Image, image_format: str, alt: str = "", css_class: str = "", **options: Any) -> Markup:
    """Return an <img> element that contains the encoded image; `options` are passed to Pillow's encoder."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    tag = Markup('<img class="{}" alt="{}" src="data:image/{};base64,{}">')
    return tag.format(css_class, escape_unprintable(alt), image_format.lower(), data)


def embed_thumbnail(pixels: np.ndarray, max_side: int, alt: str) -> Markup:
    """Return an <img> element for an image, uint8 [S, S, 3], reduced to `max_side` pixels per side if it is larger.

    An image of at most `_MAX_PIXELATED_SIDE` pixels per side is not reduced.
    """
    image = Image.fromarray(pixels)
    if max(image.size) <= _MAX_PIXELATED_SIDE:
        return _embed_image(image, "PNG", alt, "sharp", optimize=True)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return _embed_image(image, "JPEG", alt, quality=82)


def _embed_heatmap(heatmap: np.ndarray) -> Markup:
    """Return an <img> element for a heatmap, float [h, w] in 0..1, whose opacity grows with its values."""
    size = (_HEATMAP_SIDE, _HEATMAP_SIDE)
    smooth = Image.fromarray(np.asarray(heatmap, np.float32)).resize(size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(smooth), 0, 1)
    pixels = colormaps["inferno"](0.25 + 0.75 * level, bytes=True)
    pixels[..., 3] = np.rint(255 * (0.25 + 0.5 * level))
    return _embed_image(Image.fromarray(pixels), "PNG", css_class="heat", optimize=True)


def _embed_figure(file: Path, alt: str) -> Markup:
    """Return an <img> element for a PNG file; a large one is converted to JPEG."""
    image = Image.open(file)
    is_small = file.stat().st_size <= _MAX_PNG_BYTES
    return _embed_image(image, "PNG", alt) if is_small else _embed_image(image.convert("RGB"), "JPEG", alt, quality=85)


@dataclass(frozen=True)
class TrainingSamples:
    """Training images that the report shows, as the model reads them."""

    images: np.ndarray  # uint8 [k, S, S, 3], k >= 1
    class_names: Sequence[str]  # class name of each image
    augmented: np.ndarray | None  # uint8 [v, S, S, 3]: the first image in v epochs; None if it is not augmented


@dataclass(frozen=True)
class DuplicateImages:
    """The groups of images that occur more than once, and the pixels of some of them."""

    summary: dict[str, Any]  # `duplicates` of report.json
    images: Sequence[Sequence[np.ndarray]]  # by group, uint8 [S, S, 3]: first members of the first groups in `summary`


@dataclass(frozen=True)
class ReportImages:
    """Access to the images of the scored split, and the images of optional sections of the report."""

    fetch: FetchImages  # reads images of the scored split
    samples: TrainingSamples | None = None
    # Computes Grad-CAM heatmaps for the predicted classes of k rows of the scored split, float32 [k, h, w] in 0..1.
    explain: Callable[[Sequence[int]], np.ndarray] | None = None
    duplicates: DuplicateImages | None = None


MAX_IMAGES_PER_TAB = 24  # images in a tab of the gallery
# Name of each figure that the page embeds -> its caption.
_FIGURES = {"samples": "Training examples with their class.", "augmentation": "One training example in several epochs."}
# Category of the time breakdown -> its label, and the CSS custom property (report.css) of its color.
CATEGORY_COLORS = {
    "train": ("training", "--s0"), "wait": ("waiting for data", "--s1"),
    "features": ("features of frozen layers", "--s6"), "compile": ("compiling", "--s3"),
    "start": ("starting", "--faint"), "checkpoint": ("checkpoints", "--s5"),
    "evaluation": ("evaluation", "--s2"), "finish": ("export and report", "--soft"),
    "lost": ("lost with a process", "--s4"), "down": ("not running", "--rule"),
}  # fmt: skip


def _make_gallery_entry(
    result: EvaluationResult, index: int, pixels: np.ndarray, heatmap: np.ndarray | None
) -> dict[str, Any]:
    """Return the template variables for an example in the gallery.

    `index` is the example's row in `result`, and `pixels` is its image, uint8 [S, S, 3].
    """
    label = int(result.labels[index])
    probabilities = result.probabilities[index]
    names = result.class_names
    prediction = int(probabilities.argmax())
    return {
        "image": embed_thumbnail(pixels, GALLERY_SIDE, f"{names[prediction]}, truth {names[label]}"),
        "heat": "" if heatmap is None else _embed_heatmap(heatmap),
        "right": label == prediction,
        "prediction": names[prediction],
        "probability": float(probabilities[prediction]),
        "truth": names[label],
        "truth_probability": float(probabilities[label]),
        "file": result.names[index],
    }


def _map_to_source_names(result: EvaluationResult) -> dict[str, str]:
    """Map a record's name, SHARD#RECORD, to the file name that the record stores, if that is unique in the split.

    corrections.csv uses the stored file name, which stays valid if the shards are written again.
    """
    counts = Counter(result.sources)
    pairs = zip(result.names, result.sources, strict=True) if result.sources else ()
    return {name: source for name, source in pairs if source and counts[source] == 1}


def write_page(
    path: Path,
    report: Report,
    config: Mapping[str, Any],
    result: EvaluationResult,
    images: ReportImages,
    charts: Mapping[str, Sequence[Chart]],
) -> None:
    """Write the page of a report as one self-contained HTML file.

    Only a limited number of images is read, so the page does not grow with the number of examples.

    Args:
        path: path of the page; the PNG figures that it embeds must be in the same folder.
        report: content of report.json.
        config: the resolved configuration; {} if it is not known.
        result: the predictions for the scored split.
        images: access to the images that the page shows.
        charts: the charts of the sections "curves" (can be empty), "confusion", "f1" and "calibration".
    """
    confusion, per_class = np.asarray(report["test"]["confusion"]), report["test"]["per_class"]
    many_classes = len(confusion) > figures.MAX_NUMBERED_CLASSES
    wrong_counts = figures.zero_diagonal(confusion)
    confused_with = wrong_counts.argmax(axis=1)  # index of the most frequent wrong prediction for each class
    weakest_first = sorted(range(len(per_class)), key=lambda i: (not per_class[i]["support"], per_class[i]["f1"]))
    tabs = {
        "most_wrong": figures.select_most_wrong(result, MAX_IMAGES_PER_TAB),
        "least_sure": figures.select_least_confident(result, MAX_IMAGES_PER_TAB),
        "random": figures.select_random(result, report["seed"]),
    }
    in_gallery = sorted({index for indices in tabs.values() for index in indices})
    suspects = report["label_errors"].get("rows", [])[:MAX_ENTRIES_WITH_IMAGES]
    shown_rows = sorted({*in_gallery, *(row["index"] for row in suspects)})
    pixels = dict(zip(shown_rows, images.fetch(shown_rows), strict=True))
    heatmaps = dict(zip(in_gallery, images.explain(in_gallery), strict=True)) if images.explain and in_gallery else {}
    gallery = {i: _make_gallery_entry(result, i, pixels[i], heatmaps.get(i)) for i in in_gallery}
    seconds = report["timing"].get("seconds", {})
    groups = report["duplicates"].get("groups", [])[:MAX_ENTRIES_WITH_IMAGES]
    group_images = [*(images.duplicates.images if images.duplicates else ()), *[()] * len(groups)]
    page = render(
        "report.html.j2",
        report=report,
        config=config,
        charts={key: [to_svg(f"{key}{i}", chart) for i, chart in enumerate(group)] for key, group in charts.items()},
        many_classes=many_classes,
        confusions=figures.find_top_confusions(confusion, 15 if many_classes else 8),
        per_class=[
            (per_class[i], per_class[confused_with[i]]["name"], int(wrong_counts[i, confused_with[i]]))
            for i in weakest_first
        ],
        tabs={name: [gallery[i] for i in indices] for name, indices in tabs.items()},
        has_heatmaps=bool(heatmaps),
        names_in_list=_map_to_source_names(result),
        suspects={
            row["index"]: embed_thumbnail(pixels[row["index"]], THUMBNAIL_PIXELS, row["label"]) for row in suspects
        },
        group_images=[
            [embed_thumbnail(p, THUMBNAIL_PIXELS, m["file"]) for p, m in zip(members, group["members"], strict=False)]
            for members, group in zip(group_images, groups, strict=False)
        ],
        figures=[
            (_embed_figure(path.parent / report["figures"][name], text), text)
            for name, text in _FIGURES.items()
            if name in report["figures"]
        ],
        time_breakdown=[(*CATEGORY_COLORS.get(name, (name, "--soft")), s) for name, s in seconds.items() if s >= 0.05],
        timing={key: value for key, value in report["timing"].items() if key != "command"},
    )
    write_atomically(path, page)
