"""The verdict on a log of predictions: numbers, exit codes, a figure; and what cannot be judged is one sentence."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.verbs import exit_code_of
from trainer import drift
from trainer.evaluation.drift import Measure, Window
from trainer.exporting.reference import reference_distribution
from trainer.report import figures as drawing
from trainer.report.drift import draw

NAMES = ("cat", "dog", "bird $x$")
MEAN, COVARIANCE = np.arange(5.0), np.diag([1.0, 2.0, 3.0, 0.5, 0.1])


def said(count: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, 3] and embeddings [n, 5] of a model that is less sure the more they are shifted."""
    draw = np.random.default_rng(seed)
    logits = draw.standard_normal((count, 3)) * (3 - 2 * shift) + np.array([1, 0, -1])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities.astype("float32"), draw.multivariate_normal(MEAN + shift, COVARIANCE, count)


def log_lines(probabilities: np.ndarray, embeddings: np.ndarray | None, hours_ago: float = 0.0) -> str:
    lines = []
    for place, row in enumerate(probabilities):
        line: dict[str, Any] = {
            "time": (datetime.now(UTC) - timedelta(hours=hours_ago)).isoformat(),
            "class": NAMES[int(row.argmax())],
            "confidence": float(row.max()),
            "probabilities": {name: float(p) for name, p in zip(NAMES, row, strict=True)},
        }
        if embeddings is not None and place % 2 == 0:  # sampled
            line["embedding"] = embeddings[place].tolist()
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    reference = reference_distribution("test", NAMES, *said(400, 1), 96, "stretch")
    (folder / "export").mkdir()
    (folder / "export" / "reference.json").write_text(json.dumps(reference))
    return folder


def command(*arguments: str) -> int:
    return exit_code_of(drift.main, *arguments)


def test_what_is_as_it_was_is_stable_and_exits_with_0(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text(log_lines(*said(300, 2)) + '{"time": "2026-')  # the server writes on
    figure = tmp_path / "made" / "drift.png"
    assert command(f"reference={run}", f"log={tmp_path}/log.jsonl", f"output={figure}") == 0
    told = capsys.readouterr().out
    assert told.startswith("verdict: stable\n  classes    stable    0.0")
    assert "(moderate from 0.1000, shifted from 0.2500; 300 predictions)" in told
    assert "150 predictions)  Frechet distance" in told
    assert "  1 lines of the log could not be read" in told
    with Image.open(figure) as image:
        assert image.size[0] == 880
        assert len(set(np.asarray(image.convert("L")).ravel().tolist())) > 20


def test_what_moved_is_shifted_and_exits_with_4(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").write_text(log_lines(*said(300, 2, shift=1.0)))
    assert command(f"reference={run}/export", f"log={tmp_path}/log.jsonl", f"output={tmp_path}/d.png") == 4
    told = capsys.readouterr()
    assert told.out.startswith("verdict: shifted\n")
    assert "error: confidence, embedding shifted against" in told.out + told.err


def test_each_level_has_a_colour_of_its_own(run: Path, tmp_path: Path) -> None:
    reference = json.loads((run / "export" / "reference.json").read_text())
    window = Window(len(NAMES))
    window.add(0, 0.9, None)
    seen = {}
    for level, value in (("stable", 0.1), ("moderate", 0.2), ("shifted", 0.4)):
        draw(tmp_path / f"{level}.png", reference, window, [Measure("classes", value, 0.15, 0.3, 1)])
        with Image.open(tmp_path / f"{level}.png") as image:
            pixels = {"#{:02x}{:02x}{:02x}".format(*pixel) for _, pixel in image.convert("RGB").getcolors(10**6) or ()}
        seen[level] = pixels & {drawing.RIGHT, drawing.DOUBTFUL, drawing.WRONG}
    assert seen == {"stable": {drawing.RIGHT}, "moderate": {drawing.DOUBTFUL}, "shifted": {drawing.WRONG}}


def test_a_log_without_embeddings_is_judged_by_the_rest(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text(log_lines(said(300, 2)[0], None))
    reference = f"reference={run}/export/reference.json"
    assert command(reference, f"log={tmp_path}/log.jsonl", f"output={tmp_path}/d.png") == 0
    assert "embedding  not measured: the log holds no embeddings" in capsys.readouterr().out


def test_a_folder_of_logs_is_read_and_old_predictions_are_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "old.jsonl").write_text(log_lines(*said(300, 2, shift=1.0), hours_ago=30))
    (logs / "new.jsonl").write_text(log_lines(*said(200, 3)))
    (logs / "notes.txt").write_text("not a log")
    arguments = (f"reference={run}", f"log={logs}", f"output={tmp_path}/d.png")
    assert command(*arguments, "hours=24") == 0
    assert "200 predictions)" in capsys.readouterr().out
    assert command(*arguments) == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("log=x.jsonl",), "python -m trainer.drift reference=RUN log=FILE.jsonl [hours=24] [output=FILE.png]"),
        (("reference=a", "log=b", "log=c"), "each once"),
        (("reference=a", "log=b", "hours=-1"), "hours=-1: must be a number above 0"),
        (("reference=a", "log=b", "output=x.jpg"), "output=x.jpg: must end in .png"),
        (("reference=/nowhere", "log=b"), "reference=/nowhere holds no reference.json; give a run that was exported"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    told = capsys.readouterr()
    assert sentence in told.out + told.err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no prediction"),
        ("{}\n[1]\nnull\n", "holds no prediction"),
        ('{"class": "fish", "confidence": 0.5}\n', "has the class fish, which the reference does not know"),
        ('{"class": "cat", "confidence": 0.5, "embedding": [1, 2]}\n', "has embeddings of 2 numbers, which the refe"),
    ],
)
def test_a_log_that_cannot_be_judged_is_one_sentence(
    content: str, sentence: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    assert command(f"reference={run}", f"log={tmp_path}/log.jsonl", f"output={tmp_path}/d.png") == 2
    told = capsys.readouterr()
    assert sentence in told.out + told.err
    assert not (tmp_path / "d.png").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": ["a"], "n": 3}'])
def test_a_damaged_reference_is_one_sentence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "reference.json").write_text(text)
    assert command(f"reference={tmp_path}", "log=x.jsonl") == 2
    told = capsys.readouterr()
    assert "its reference.json is damaged; export the run again" in told.out + told.err


def test_no_tensorflow_is_needed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(log_lines(*said(100, 2)))
    program = (
        "import sys; from trainer import drift\n"
        "try:\n    drift.main()\nfinally:\n    assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    arguments = (f"reference={run}", f"log={tmp_path}/log.jsonl", f"output={tmp_path}/d.png")
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
