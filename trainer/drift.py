"""`python -m trainer.drift reference=RUN log=FILE.jsonl`: has what a model sees and says moved since it was exported?

    reference=...   a run's output_dir, its export/, a SavedModel, or a reference.json; local or gs://
    log=...         predictions that the server logged, JSON lines; a file, or a folder with *.jsonl; local or gs://
    hours=24        only predictions of the last so many hours
    output=FILE.png the figure; drift.png where it is left out; local or gs://

Exit codes: 0 nothing has shifted; 4 something has; 2 the reference or the log cannot be used; 75 the bucket is away.
docs/drift.md says what is measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError, DataError, Drifted
from trainer.evaluation.drift import BINS, Measure, Window, measures, verdict
from trainer.monitoring.log import say
from trainer.storage.path import place

KEYS = ("reference", "log", "hours", "output")
SHOWN = 15  # classes in the figure, those that moved most
WHAT = {
    "classes": "population stability index of the predicted classes",
    "confidence": "population stability index of the largest probability",
    "embedding": "Frechet distance of the embeddings, as a share of the reference's variance",
}


def read_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """The arguments by key.

    Raises:
        ConfigError: one is unknown, given twice or missing.
    """
    pairs = [argument.partition("=")[::2] for argument in arguments]
    told = dict(pairs)
    if len(told) != len(pairs) or not {"reference", "log"} <= told.keys() <= set(KEYS) or not all(told.values()):
        raise ConfigError(
            "write python -m trainer.drift reference=RUN log=FILE.jsonl [hours=24] [output=FILE.png], each once"
        )
    try:
        if float(told.get("hours", 1)) <= 0:
            raise ValueError
    except ValueError:
        raise ConfigError(f"hours={told['hours']}: must be a number above 0") from None
    if not told.get("output", ".png").endswith(".png"):
        raise ConfigError(f"output={told['output']}: must end in .png")
    return told


def read_reference(address: str) -> dict[str, Any]:
    """What reference.json holds, of a run, an export, a SavedModel, or the file itself.

    Raises:
        DataError: there is none, or it is damaged.
    """
    home = place(address)
    below = ("export/reference.json", "reference.json", "assets/reference.json", "saved_model/1/assets/reference.json")
    files = [home] if address.endswith(".json") else [home / name for name in below]
    found = next((content for file in files if (content := file.fetch())), None)
    if found is None:
        raise DataError(
            f"reference={address} holds no reference.json; give a run that was exported, or the file itself"
        )
    try:
        reference: dict[str, Any] = json.loads(found[0])
        assert len(reference["classes"]) == len(reference["class_frequencies"])
        assert len(reference["confidence_histogram"]["counts"]) == BINS
        assert reference["n"] > 0
    except (ValueError, KeyError, TypeError, AssertionError):
        raise DataError(f"reference={address}: its reference.json is damaged; export the run again") from None
    return reference


def lines_of(address: str) -> Iterator[str]:
    """The lines of a log, or of all logs in a folder.

    Raises:
        DataError: there is none.
    """
    home = place(address)
    files = [home] if home.exists() else []
    if not files:
        files = [e.place for e in home.list(recursive=False) if e.place.name.endswith(".jsonl")]
    if not files:
        raise DataError(f"log={address}: there is no such file, and no folder with *.jsonl")
    for file in sorted(files, key=str):
        yield from file.read().decode("utf-8", "replace").splitlines()


def read_log(address: str, reference: Mapping[str, Any], since: datetime | None) -> tuple[Window, int]:
    """The predictions of a log, and how many of its lines say nothing (a server may be writing one).

    Raises:
        DataError: no prediction is there, or they are of another model.
    """
    places = {name: at for at, name in enumerate(reference["classes"])}
    width = len(reference["embedding"]["mean"]) if "embedding" in reference else 0
    window, strange = Window(len(places)), 0
    for line in lines_of(address):
        try:
            told = json.loads(line)
            name, confidence, vector = told["class"], float(told["confidence"]), told.get("embedding")
            if since and datetime.fromisoformat(told["time"]).astimezone(UTC) < since:
                continue
            if vector is not None and not np.isfinite(np.asarray(vector, np.float64)).all():
                raise ValueError
            if not 0 <= confidence <= 1.001:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            strange += 1
            continue
        if name not in places or (vector is not None and len(vector) != width):
            what = f"the class {name}" if name not in places else f"embeddings of {len(vector)} numbers"
            raise DataError(f"log={address} has {what}, which the reference does not know: it is of another model")
        window.add(places[name], confidence, vector)
    if not window.n:
        raise DataError(f"log={address} holds no prediction" + (f" since {since:%Y-%m-%d %H:%M} UTC" if since else ""))
    return window, strange


def draw(path: Path, reference: Mapping[str, Any], window: Window, found: Sequence[Measure]) -> None:
    """The figure: predicted classes, confidence, and each measure beside its limit."""
    from trainer.report import figures as drawing
    from trainer.report.figures import INK, TRAINING, VALIDATION, canvas, heading, label, save, tidy

    levels = {"stable": drawing.RIGHT, "moderate": drawing.DOUBTFUL, "shifted": drawing.WRONG}
    before = np.asarray(reference["class_frequencies"])
    now = window.classes / window.n
    shown = np.argsort(-np.abs(now - before), kind="stable")[:SHOWN]
    figure = canvas(2.4 + 0.3 * len(shown) + 2.6)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.2 + 0.3 * len(shown), 3.6])
    axes = figure.add_subplot(grid[0, :])
    rows = np.arange(len(shown))
    axes.barh(rows - 0.2, before[shown], 0.38, color=TRAINING, label=f"reference ({reference['n']:,})")
    axes.barh(rows + 0.2, now[shown], 0.38, color=VALIDATION, label=f"log ({window.n:,})")
    axes.set_yticks(rows, [label(reference["classes"][i]) for i in shown])
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    heading(axes, "Share of each predicted class" + (", those that moved most" if len(before) > SHOWN else ""))
    tidy(axes, "x")
    left, right = (figure.add_subplot(grid[1, column]) for column in (0, 1))
    counts = np.asarray(reference["confidence_histogram"]["counts"])
    edges = np.arange(BINS) / BINS
    left.bar(edges, counts / counts.sum(), 1 / BINS, align="edge", color=TRAINING)
    left.step([*edges, 1.0], [*(now_ := window.confidences / window.n), now_[-1]], where="post", color=VALIDATION)
    left.set_xlim(0, 1)
    heading(left, "Largest probability")
    tidy(left, "y")
    shares = [min(measure.value / measure.shifted, 3.0) for measure in found]
    right.barh(range(len(found)), shares, 0.5, color=[levels[measure.level] for measure in found])
    right.axvline(1, color=INK, linewidth=1)
    right.set_yticks(range(len(found)), [measure.name for measure in found])
    right.invert_yaxis()
    right.set_xlim(0, max(1.5, *shares) * 1.1)
    heading(right, "Measure / its limit (cut at 3)")
    tidy(right, "x")
    save(figure, path)


def words(found: Sequence[Measure], strange: int) -> list[str]:
    """What was measured, one line each."""
    lines = [
        f"  {m.name:10} {m.level:9} {m.value:.4f}  (moderate from {m.moderate:.4f}, shifted from {m.shifted:.4f}; "
        f"{m.n:,} predictions)  {WHAT[m.name]}"
        for m in found
    ]
    if "embedding" not in {m.name for m in found}:
        lines.append("  embedding  not measured: the log holds no embeddings")
    return [*lines, *([f"  {strange:,} lines of the log could not be read"] if strange else [])]


def _run(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    told = read_arguments(arguments)
    reference = read_reference(told["reference"])
    since = datetime.now(UTC) - timedelta(hours=float(told["hours"])) if "hours" in told else None
    window, strange = read_log(told["log"], reference, since)
    found = measures(reference, window)
    output = told.get("output", "drift.png")
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "drift.png"
        draw(drawn, reference, window, found)
        place(output).write(drawn.read_bytes())
    level = verdict(found)
    say("\n".join([f"verdict: {level}", *words(found, strange), f"  figure   {output}"]))
    if level == "shifted":
        moved = ", ".join(m.name for m in found if m.level == "shifted")
        raise Drifted(
            f"{moved} shifted against {told['reference']}: look at {output}, label some of what is new, retrain"
        )


def main() -> None:
    """Entry point of `python -m trainer.drift`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        _run(sys.argv[1:])


if __name__ == "__main__":
    main()
