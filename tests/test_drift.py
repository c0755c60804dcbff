"""`python -m trainer.drift`: verdict, exit codes, figure, and errors."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.verbs import exit_code_of
from tests.processes import run_python
from trainer import drift
from trainer.evaluation.drift import DriftMeasure, PredictionWindow
from trainer.exporting.reference import compute_reference
from trainer.report import figures as drawing
from trainer.report.drift import draw
from trainer.storage.local import LocalPath

Call = Callable[..., tuple[int, str, str]]  # exit code, stdout and stderr
NAMES = ("cat", "dog", "bird $x$")
MEAN, COVARIANCE = np.arange(5.0), np.diag([1.0, 2.0, 3.0, 0.5, 0.1])


def predictions(count: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, 3] and embeddings [n, 5] of a model whose confidence falls with the shift."""
    draw = np.random.default_rng(seed)
    logits = draw.standard_normal((count, 3)) * (3 - 2 * shift) + np.array([1, 0, -1])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities.astype("float32"), draw.multivariate_normal(MEAN + shift, COVARIANCE, count)


def log_lines(probabilities: np.ndarray, embeddings: np.ndarray | None, hours_ago: float = 0.0) -> str:
    lines = []
    for index, row in enumerate(probabilities):
        line: dict[str, Any] = {
            "time": (datetime.now(UTC) - timedelta(hours=hours_ago)).isoformat(),
            "class": NAMES[int(row.argmax())],
            "confidence": float(row.max()),
            "probabilities": {name: float(p) for name, p in zip(NAMES, row, strict=True)},
        }
        if embeddings is not None and index % 2 == 0:
            line["embedding"] = embeddings[index].tolist()
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    reference = compute_reference("test", NAMES, *predictions(400, 1), 96, "stretch")
    (folder / "export").mkdir()
    (folder / "export" / "reference.json").write_text(json.dumps(reference))
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the verb with some arguments."""
    return lambda *arguments: (exit_code_of(drift.main, *arguments), *capsys.readouterr())


@pytest.fixture
def compare(command: Call, tmp_path: Path) -> Call:
    """Compare the text of a log with a reference; the figure is d.png."""

    def call(reference: Path, log: str) -> tuple[int, str, str]:
        (tmp_path / "log.jsonl").write_text(log)
        return command(f"reference={reference}", f"log={tmp_path}/log.jsonl", f"output={tmp_path}/d.png")

    return call


def test_predictions_like_the_reference_are_stable_and_exit_with_0(run: Path, tmp_path: Path, compare: Call) -> None:
    code, out, _ = compare(run, log_lines(*predictions(300, 2)) + '{"time": "2026-')  # being written
    assert code == 0
    assert out.startswith("verdict: stable\n  classes    stable    0.0")
    assert "(moderate from 0.1000, shifted from 0.2500; 300 predictions)" in out
    assert "150 predictions)  Frechet distance" in out
    assert "  1 invalid lines" in out
    with Image.open(tmp_path / "d.png") as image:
        assert image.size[0] == 880
        assert len(set(np.asarray(image.convert("L")).ravel().tolist())) > 20


def test_other_predictions_are_shifted_and_exit_with_4(run: Path, compare: Call) -> None:
    code, out, err = compare(run / "export", log_lines(*predictions(300, 2, shift=1.0)))
    assert (code, out.splitlines()[0]) == (4, "verdict: shifted")
    assert f"drift: confidence, embedding shifted from reference={run}/export; " in err


def test_each_level_has_its_own_colour(run: Path, tmp_path: Path) -> None:
    reference = json.loads((run / "export" / "reference.json").read_text())
    window = PredictionWindow(len(NAMES))
    window.add(0, 0.9, None)
    colours = {}
    for level, value in (("stable", 0.1), ("moderate", 0.2), ("shifted", 0.4)):
        draw(tmp_path / f"{level}.png", reference, window, [DriftMeasure("classes", value, 0.15, 0.3, 1)])
        with Image.open(tmp_path / f"{level}.png") as image:
            pixels = {"#{:02x}{:02x}{:02x}".format(*pixel) for _, pixel in image.convert("RGB").getcolors(10**6) or ()}
        colours[level] = pixels & {drawing.RIGHT, drawing.MODERATE, drawing.WRONG}
    assert colours == {"stable": {drawing.RIGHT}, "moderate": {drawing.MODERATE}, "shifted": {drawing.WRONG}}


def test_a_log_without_embeddings_is_judged_by_the_other_measures(run: Path, compare: Call) -> None:
    code, out, _ = compare(run / "export" / "reference.json", log_lines(predictions(300, 2)[0], None))
    assert (code, "embedding  not measured" in out) == (0, True)


def test_a_folder_of_logs_is_read_without_old_predictions(run: Path, tmp_path: Path, command: Call) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "old.jsonl").write_text(log_lines(*predictions(300, 2, shift=1.0), hours_ago=30))
    (logs / "new.jsonl").write_text(log_lines(*predictions(200, 3)))
    (logs / "notes.txt").write_text("not a log")
    arguments = (f"reference={run}", f"log={logs}", f"output={tmp_path}/d.png")
    code, out, _ = command(*arguments, "hours=24")
    assert (code, "200 predictions)" in out) == (0, True)
    assert command(*arguments)[0] == 4


def test_the_parts_of_a_time_range_are_read_from_the_folders_of_its_days(
    run: Path, tmp_path: Path, command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 predictions at noon on each of 10 days, of which those of 3 and 4 January are shifted."""
    read: list[str] = []
    fetch = LocalPath.fetch
    monkeypatch.setattr(LocalPath, "fetch", lambda self: (read.append(self.parent.name), fetch(self))[1])
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    for day in range(10):
        time = noon + timedelta(days=day)
        hours_ago = (datetime.now(UTC) - time) / timedelta(hours=1)
        text = log_lines(*predictions(300, day + 2, shift=float(day in (2, 3))), hours_ago=hours_ago)
        part = tmp_path / "log" / f"{time:%Y-%m-%d}" / "part-000001.jsonl"
        part.parent.mkdir(parents=True)
        part.write_text(text)
    arguments = (f"reference={run}", f"log={tmp_path}/log", f"output={tmp_path}/d.png")
    codes = {f"{day:%d}": command(*arguments, "hours=24", f"until={day:%Y-%m-%d}")[0]
             for day in (noon + timedelta(days=index) for index in (2, 3, 5))}  # fmt: skip
    assert codes == {"03": 0, "04": 4, "06": 0}
    read.clear()
    code, out, _ = command(*arguments, "hours=24", "until=2026-01-08T18:00:00+06:00")  # noon in UTC
    assert (code, "300 predictions" in out) == (0, True)
    assert set(read) <= {"2026-01-06", "2026-01-07", "2026-01-08", "run0", "export", run.name}
    code, _, err = command(*arguments, "hours=24", "until=2027-01-01")
    assert (code, "has no predictions since 2026-12-31 00:00 UTC until 2027-01-01 00:00 UTC" in err) == (2, True)


def test_only_the_predictions_of_the_newest_version_are_compared_with_its_reference(
    run: Path, tmp_path: Path, command: Call
) -> None:
    for version in ("8", "10"):
        (tmp_path / "models" / version / "assets").mkdir(parents=True)
        (tmp_path / "models" / version / "saved_model.pb").touch()
    shutil.copy(run / "export" / "reference.json", tmp_path / "models" / "10" / "assets")
    rows = [json.loads(line) for line in log_lines(*predictions(300, 2, shift=1.0)).splitlines()]
    old = [json.dumps(row | {"model_version": "8", "class": "of version 8"}) for row in rows]
    new = [line[:-1] + ', "model_version": "10"}' for line in log_lines(*predictions(200, 3)).splitlines()]
    (tmp_path / "log.jsonl").write_text("\n".join([*old, *new]))
    arguments = (f"reference={tmp_path}/models", f"log={tmp_path}/log.jsonl", f"output={tmp_path}/d.png")
    code, out, _ = command(*arguments)
    assert (code, "200 predictions)" in out) == (0, True)
    (tmp_path / "log.jsonl").write_text("\n".join(old))
    code, _, err = command(*arguments)
    assert (code, "has no predictions of version 10" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("log=x.jsonl",),
            "python -m trainer.drift reference=RUN log=FILE.jsonl [hours=24] [until=TIME] [output=FILE.png]",
        ),
        (("reference=a", "log=b", "log=c"), "error: log=c: "),
        (("reference=a", "log=b", "hours=-1"), "error: hours=-1: "),
        (("reference=a", "log=b", "until=yesterday"), "error: until=yesterday: "),
        (("reference=a", "log=b", "output=x.jpg"), "error: output=x.jpg: "),
        (("reference=/nowhere", "log=b"), "error: reference=/nowhere: "),
        (("reference={run}", "log=/nowhere"), "error: log=/nowhere: "),
    ],
)
def test_a_wrong_argument_exits_with_2(run: Path, arguments: tuple[str, ...], message: str, command: Call) -> None:
    code, _, err = command(*(argument.replace("{run}", str(run)) for argument in arguments))
    assert (code, message in err) == (2, True), err


@pytest.mark.parametrize(
    ("log", "problem"),
    [
        ("", "no predictions"),
        ("{}\n[1]\nnull\n", "no predictions"),
        ('{"class": "fish", "confidence": 0.5}\n', "the class fish"),
        ('{"class": "cat", "confidence": 0.5, "embedding": [1, 2]}\n', "embeddings of 2 numbers"),
    ],
)
def test_an_unusable_log_exits_with_2(log: str, problem: str, run: Path, tmp_path: Path, compare: Call) -> None:
    code, _, err = compare(run, log)
    assert code == 2
    assert f"error: log={tmp_path}/log.jsonl: has {problem}" in err
    assert not (tmp_path / "d.png").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": ["a"], "n": 3}'])
def test_a_damaged_reference_exits_with_2(text: str, tmp_path: Path, command: Call) -> None:
    (tmp_path / "reference.json").write_text(text)
    code, _, err = command(f"reference={tmp_path}", "log=x.jsonl")
    assert code == 2
    assert f"error: reference={tmp_path}: its reference.json is corrupt" in err


def test_tensorflow_is_not_imported(run: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(log_lines(*predictions(100, 2)))
    program = (
        "import sys; from trainer import drift\n"
        "try:\n    drift.main()\nfinally:\n    assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    run_python(program, f"reference={run}", f"log={tmp_path}/log.jsonl", f"output={tmp_path}/d.png")
