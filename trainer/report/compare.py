"""Compare runs on the examples that they have in common, in a table and on an HTML page."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from os.path import commonpath
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image, ImageOps
from rich.markup import escape
from rich.table import Table

from trainer.config.diff import flatten
from trainer.data.records import RecordLocation, index_shard, read_image
from trainer.errors import DataError, TrainerError
from trainer.evaluation.intervals import compute_wilson_interval
from trainer.evaluation.paired import PairedComparison, adjust_p_values, compare_paired
from trainer.monitoring.console import PatientConsole, get_width
from trainer.names import decode_cell
from trainer.report.figures import SERIES, Line, draw_line_chart, to_svg
from trainer.report.page import (
    MAX_IMAGES_PER_TAB,
    MISSING,
    THUMBNAIL_PIXELS,
    embed_thumbnail,
    format_number,
    format_percent,
    render,
)
from trainer.storage.local import write_atomically
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import CONTENT_ERRORS, require_json_object

SIGNIFICANCE_LEVEL = 0.05  # a run is better or worse than the first one if its p-value is below this level
_IGNORED_KEYS = {"output_dir", "runtime.cache_dir", "resume"}  # configuration keys that have no effect on the scores


@dataclass(frozen=True)
class ScoredRun:
    """The scores and predictions of a run, of an evaluation of a run, or of a version of a served model."""

    name: str  # for display, unique among the compared runs
    address: str  # output_dir, or the folder of the evaluation or version, as given by the user
    report: Mapping[str, Any]  # content of report.json
    predictions: Mapping[str, tuple[str, str]]  # class names (truth, prediction) by file
    config: Mapping[str, Any]  # content of config.yaml; empty if there is none
    history: Sequence[Mapping[str, Any]]  # a row per epoch (`trainer.report.schema.Epoch`)


@dataclass(frozen=True)
class Comparison:
    """Comparison of runs with the first run, the reference, on the examples that all runs have in common."""

    runs: Sequence[ScoredRun]
    files: Sequence[str]  # for each common example, a name that is the same in all runs
    names: Sequence[Sequence[str]]  # for each run, the keys of these examples in `ScoredRun.predictions`
    correct: np.ndarray  # whether the prediction is correct, bool [runs, files]
    pairs: Sequence[PairedComparison]  # comparison of each later run with the first one
    p: Sequence[float]  # p-value of each pair, adjusted for the number of pairs (Holm 1979)


def read_scored_run(address: str, name: str) -> ScoredRun:
    """Read a run, an evaluation or a version of a served model from its folder, local or in a bucket.

    Raises:
        DataError: report.json or predictions.csv is missing, or a file is corrupt.
        Interrupted: the bucket does not respond.
    """
    root = storage_path(address)
    folder = root if (root / "report.json").exists() else root / "report"
    report_json, predictions_csv = (folder / "report.json").fetch(), (folder / "predictions.csv").fetch()
    if report_json is None or predictions_csv is None:
        raise DataError(
            f"{address} has no report (report/report.json and predictions.csv)",
            fix="give the output_dir of a finished run or a folder written by python -m trainer.evaluate",
        )
    try:
        report = json.loads(report_json[0])
        _require_scores(report)
        rows = csv.DictReader(io.StringIO(predictions_csv[0].decode()))
        cells = ([decode_cell(line[key]) for key in ("file", "truth", "prediction")] for line in rows)
        predictions = {file: (truth, prediction) for file, truth, prediction in cells}
        history = report.get("history") or _read_epochs(root)
        return ScoredRun(name, address, report, predictions, _read_configuration(root), history)
    except (*CONTENT_ERRORS, yaml.YAMLError, csv.Error) as error:
        raise DataError(f"{address} is corrupt: {error}", fix="evaluate the run again") from None


def _require_scores(report: Any) -> None:
    """Raise one of `CONTENT_ERRORS` unless the content of report.json has everything that a comparison reads."""
    set(report["data"]["class_names"])
    for row in report["test"]["per_class"]:
        require_json_object(row)["name"], row["f1"]
    for section in {section for section, *_ in _REPORTED_SCORES}:
        require_json_object(report[section])


def _read_epochs(root: StoragePath) -> list[dict[str, Any]]:
    """Read a run's epochs from metrics.jsonl; return [] if the file does not exist."""
    metrics = (root / "metrics.jsonl").fetch()
    rows = [json.loads(line) for line in metrics[0].decode().splitlines()] if metrics else []
    return [row for row in rows if row["kind"] == "epoch"]


def _read_configuration(root: StoragePath) -> dict[str, Any]:
    """Read a run's config.yaml from `root`, or from RUN if `root` is RUN/evaluations/NAME; return {} if missing."""
    for folder in (root, root.parent.parent):
        if content := (folder / "config.yaml").fetch():
            return dict(yaml.safe_load(content[0]))
    return {}


def make_distinct_names(addresses: Sequence[str]) -> list[str]:
    """Shorten addresses to their last path components, as few as keep them distinct.

    For example, `outputs/a` and `outputs/b` become "a" and "b", and `out/a/x` and `out/b/x` become "a/x" and "b/x".
    """
    components = [address.rstrip("/").split("/") for address in addresses]
    for count in range(1, max(map(len, components)) + 1):
        names = ["/".join(parts[-count:]) for parts in components]
        if len(set(names)) == len(names):
            return names
    return list(addresses)


def _map_common_names(runs: Sequence[ScoredRun]) -> list[dict[str, str]]:
    """Return, for each run, a mapping from each example's common name to its key in `ScoredRun.predictions`.

    The common name is the key, a file, if at least one file occurs in all runs. Otherwise the runs may have read the
    same dataset from different paths, so the name is the path relative to the common folder of all the run's files.
    """
    file_maps = [{file: file for file in run.predictions} for run in runs]
    if set.intersection(*map(set, file_maps)):
        return file_maps
    path_maps = []
    for run in runs:
        parents = [str(PurePosixPath(file).parent) for file in run.predictions]
        root = commonpath(parents) if len({p.startswith("/") for p in parents}) == 1 else ""
        path_maps.append({file.removeprefix(root).lstrip("/") if root else file: file for file in run.predictions})
    return path_maps


def compare_runs(runs: Sequence[ScoredRun]) -> Comparison:
    """Compare runs with the first run, on the examples that all runs have in common.

    Raises:
        DataError: the classes of the runs or the labels of an example differ, or the runs have no example in common.
    """
    first = runs[0]
    for run in runs[1:]:
        class_sets = (set(compared.report["data"]["class_names"]) for compared in (first, run))
        if unmatched := sorted(set.symmetric_difference(*class_sets)):
            raise DataError(
                f"{first.address} and {run.address} cannot be compared: their classes differ (only one of them has "
                f"{unmatched[0]!r})",
                fix="compare runs on data of the same classes",
            )
    name_maps = _map_common_names(runs)
    common_names = sorted(set.intersection(*map(set, name_maps)))
    if not common_names:
        raise DataError(
            f"{' and '.join(run.address for run in runs)} cannot be compared: no example was scored in all of them",
            fix="evaluate them on the same data with python -m trainer.evaluate",
        )
    file_lists = [[name_map[name] for name in common_names] for name_map in name_maps]
    outcomes = [[run.predictions[file] for file in run_files] for run, run_files in zip(runs, file_lists, strict=True)]
    for run, predictions in zip(runs, outcomes, strict=True):
        for name, (first_truth, _), (truth, _) in zip(common_names, outcomes[0], predictions, strict=True):
            if truth != first_truth:
                raise DataError(
                    f"{first.address} and {run.address} cannot be compared: the label of {name} is {first_truth!r} in "
                    f"one and {truth!r} in the other",
                    fix="evaluate both on the same labels",
                )
    correct = np.array([[truth == prediction for truth, prediction in predictions] for predictions in outcomes], bool)
    pairs = [compare_paired(correct[0], row) for row in correct[1:]]
    return Comparison(runs, common_names, file_lists, correct, pairs, adjust_p_values([pair.p for pair in pairs]))


def describe_outcome(pair: PairedComparison, p: float) -> str:
    """Return "better", "worse" or "no significant difference" for the second run of a pair.

    `p` is the pair's p-value, adjusted if several pairs are compared.
    """
    return "no significant difference" if p >= SIGNIFICANCE_LEVEL else "better" if pair.difference > 0 else "worse"


def compare_configurations(runs: Sequence[ScoredRun]) -> list[tuple[str, list[str]]]:
    """Return (key, value in each run) for each configuration key whose values differ.

    If only some runs have a phase, its keys are left out, and a row `phases` lists each run's phases.
    """
    configs = [flatten(dict(run.config)) for run in runs]
    phases = [list(run.config.get("phases", {})) for run in runs]
    prefixes = tuple(f"phases.{name}." for names in phases for name in names if any(name not in p for p in phases))
    keys = [key for key in sorted(set().union(*configs) - _IGNORED_KEYS) if not key.startswith(prefixes)]
    if prefixes:
        configs = [config | {"phases": p} for config, p in zip(configs, phases, strict=True)]
        keys = ["phases", *keys]
    rows = [(key, [_format_argument(config[key]) if key in config else MISSING for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _format_argument(value: Any) -> str:
    """Format a configuration value as it is written on the command line, such as null, true or [a,b]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(_format_argument, value))}]" if isinstance(value, list) else str(value)


def _compute_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row per run for the table and the page, computed from the common examples.

    `pair` is None in the first run's row. `changed` lists a title and indices into `Comparison.files`: for the examples
    that only this run predicts correctly, and for those that only the first run predicts correctly.
    """
    rows = []
    n = len(comparison.files)
    first = comparison.correct[0]
    for i, (run, correct) in enumerate(zip(comparison.runs, comparison.correct, strict=True)):
        num_correct = int(correct.sum())
        row: dict[str, Any] = {"name": run.name, "address": run.address, "pair": None}
        row |= {"accuracy": num_correct / n, "interval": compute_wilson_interval(num_correct, n)}
        if i > 0:
            pair, p = comparison.pairs[i - 1], comparison.p[i - 1]
            row |= {"pair": pair, "p": p, "verdict": describe_outcome(pair, p)}
        masks = (correct & ~first, first & ~correct)
        titles = ("correct here, wrong in the first", "wrong here, correct in the first")
        row["changed"] = [(title, np.flatnonzero(mask).tolist()) for title, mask in zip(titles, masks, strict=True)]
        rows.append(row)
    return rows


# (section of report.json, key in the section, label, function that formats the value)
_REPORTED_SCORES: list[tuple[str, str, str, Callable[..., str]]] = [
    ("test", "n", "examples", format_number), ("test", "accuracy", "accuracy", partial(format_percent, digits=2)),
    ("test", "top_5", "top-5 accuracy", partial(format_percent, digits=2)),
    ("test", "macro_f1", "macro F1", format_number), ("test", "loss", "loss", format_number),
    ("test", "calibration_error", "calibration error", format_number), ("test", "split", "split", str),
    ("timing", "images_per_second", "images per second", partial(format_number, digits=0)),
    ("timing", "goodput", "goodput", format_percent),
]  # fmt: skip


def _collect_reported_scores(runs: Sequence[ScoredRun]) -> list[tuple[str, list[str]]]:
    """Return (label, value in each run) for the scores in the reports, which cover all scored examples of a run."""
    rows = [
        (name, show, [run.report[section].get(key) for run in runs]) for section, key, name, show in _REPORTED_SCORES
    ]
    return [(name, [show(v) for v in values]) for name, show, values in rows if any(v is not None for v in values)]


_index_shard_cached = lru_cache(maxsize=8)(index_shard)  # indexing reads all headers of a shard


def _read_image(run: ScoredRun, file: str) -> Markup | None:
    """Return an <img> element for an image file or a record (SHARD#RECORD); None if it cannot be read."""
    path, _, record = file.rpartition("#")
    try:
        if record.isdigit() and path:
            index, k = _index_shard_cached(path), int(record)
            field = run.config.get("data", {}).get("image_field", "image")
            content = read_image(RecordLocation(path, k, int(index.offsets[k]), int(index.lengths[k]), field))
        else:
            content = storage_path(file).read()
        with Image.open(io.BytesIO(content)) as image:
            # Show the image in the orientation in which the run's model reads it.
            ignores_orientation = run.config.get("data", {}).get("orientation", "ignore") == "ignore"
            rgb = image.convert("RGB") if ignores_orientation else ImageOps.exif_transpose(image.convert("RGB"))
        return embed_thumbnail(
            np.asarray(ImageOps.fit(rgb, (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))), THUMBNAIL_PIXELS, file
        )
    except (OSError, IndexError, ValueError, TrainerError, Image.DecompressionBombError):
        return None


def _collect_changes(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the page's sections of changed predictions: at most two per later run and `MAX_IMAGES_PER_TAB` images."""
    first = comparison.runs[0]
    sections = []
    for row, run, run_files in zip(rows[1:], comparison.runs[1:], comparison.names[1:], strict=True):
        for title, examples in row["changed"]:
            shots = []
            example_names = [comparison.files[k] for k in examples]
            for k in examples[:MAX_IMAGES_PER_TAB]:
                name = comparison.names[0][k]
                if image := _read_image(first, name) or _read_image(run, run_files[k]):
                    truth, prediction = first.predictions[name]
                    shots.append({"image": image, "file": comparison.files[k], "truth": truth,
                                  "first": prediction, "prediction": run.predictions[run_files[k]][1]})  # fmt: skip
            if examples:
                sections.append({"run": run.name, "title": title, "files": example_names, "shots": shots})
    return sections


def _draw_curves(runs: Sequence[ScoredRun]) -> list[Markup]:
    """Draw validation accuracy and loss over the epochs, one line per run; a chart without values is left out."""
    charts = []
    for key, title in (("val_accuracy", "Validation accuracy"), ("val_loss", "Validation loss")):
        lines = []
        for i, run in enumerate(runs):
            epochs, values = [row["epoch"] for row in run.history], [row.get(key) for row in run.history]
            lines.append(Line(run.name, SERIES[i % len(SERIES)], epochs, values))
        if chart := draw_line_chart(title, lines, fractions=key == "val_accuracy"):
            charts.append(to_svg(key, chart))
    return charts


def print_comparison(comparison: Comparison) -> None:
    """Print a table of the runs, and the configuration keys whose values differ."""
    console = PatientConsole(highlight=False, width=get_width(120))
    table = Table(title=f"on {len(comparison.files):,} common examples", title_justify="left")
    table.add_column("run")
    for name in ("accuracy", "difference", "95 %", "only first correct", "only this correct", "p"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in _compute_rows(comparison):
        cells = [escape(row["name"]), f"{row['accuracy']:.4f}"]
        if pair := row["pair"]:
            interval = "{:+.4f} to {:+.4f}".format(*pair.interval)
            cells += [f"{pair.difference:+.4f}", interval, f"{pair.lost:,}", f"{pair.won:,}"]
            cells += [f"{row['p']:.3g}", row["verdict"]]
        table.add_row(*cells)
    console.print(table)
    for key, values in compare_configurations(comparison.runs):
        console.print(f"  {key}: {' | '.join(values)}", markup=False, soft_wrap=True)


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the comparison to a self-contained HTML page. The class with the largest loss of F1 comes first."""
    runs = comparison.runs
    f1 = [{row["name"]: row["f1"] for row in run.report["test"]["per_class"]} for run in runs]
    names = sorted(f1[0], key=lambda name: min(scores[name] - f1[0][name] for scores in f1[1:]))
    rows = _compute_rows(comparison)
    page = render(
        "compare.html.j2",
        runs=rows,
        changed=_collect_changes(comparison, rows),
        n=len(comparison.files),
        scores=_collect_reported_scores(runs),
        charts=_draw_curves(runs),
        classes=[(name, [scores[name] for scores in f1]) for name in names],
        differences=compare_configurations(runs),
        significance_level=SIGNIFICANCE_LEVEL,
        color_count=len(SERIES),
    )
    write_atomically(path, page)
