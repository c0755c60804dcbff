"""Drift as metrics, and every n-th prediction in the log."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.exporting.reference import compute_reference, draw_projection
from trainer.serving.export_files import Export, Prediction
from trainer.serving.metrics import MIN_PREDICTIONS, ServingMetrics, VersionMetrics
from trainer.serving.prediction_log import open_log
from trainer.serving.requests import EncodedImage
from trainer.serving.settings import parse_settings

CLASSES = ("a", "b", "c")
WIDTH = 20  # of an embedding; it is projected to 16


def predictions(count: int, seed: int, shift: float = 0.0, favourite: float = 0.0) -> list[Prediction]:
    """Normal embeddings, and equally probable classes if `favourite` is 0."""
    draw = np.random.default_rng(seed)
    logits = draw.standard_normal((count, 3)) + np.array([favourite, 0, 0])
    rows = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    embeddings = draw.standard_normal((count, WIDTH)) + shift
    return [Prediction(p.astype(np.float32), e.astype(np.float32)) for p, e in zip(rows, embeddings, strict=True)]


def reference() -> dict[str, Any]:
    rows = predictions(2000, 1)
    probabilities, embeddings = (np.array([getattr(row, x) for row in rows]) for x in ("probabilities", "embedding"))
    return compute_reference("test", CLASSES, probabilities, embeddings, 96, "stretch")


def make_metrics(*arguments: str, of: dict[str, Any] | None = None) -> ServingMetrics:
    settings = parse_settings({"model": "any"} | dict(a.split("=") for a in arguments))
    metrics = ServingMetrics(settings, open_log(settings.log, settings.log_seconds))
    metrics.current = VersionMetrics(metrics, Export("any", Path("any"), "1", CLASSES, of))
    return metrics


def record(metrics: ServingMetrics, rows: list[Prediction]) -> None:
    assert metrics.current
    metrics.current.record([EncodedImage(b"", f"{i}.jpg", 1, 1, "r1") for i in range(len(rows))], rows)


def drift(metrics: ServingMetrics) -> dict[str, float]:
    names = ("kubetune_serving_population_stability_index", "kubetune_serving_embedding_distance")
    samples = [s for family in metrics.registry.collect() if family.name in names for s in family.samples]
    return {s.labels.get("of", "embedding"): s.value for s in samples}


def test_each_measure_sees_its_own_shift() -> None:
    same, moved, other = (make_metrics(of=reference()) for _ in range(3))
    record(same, predictions(1000, 2))
    record(moved, predictions(1000, 2, shift=2.0))
    record(other, predictions(1000, 2, favourite=3.0))
    assert drift(same).keys() == {"classes", "confidence", "embedding"}
    assert max(drift(same).values()) < 0.1
    assert drift(moved)["embedding"] > 1
    assert drift(moved)["classes"] == drift(same)["classes"]
    assert drift(other)["classes"] > 0.25
    assert drift(other)["confidence"] > 0.25
    assert drift(other)["embedding"] == pytest.approx(drift(same)["embedding"])


def test_drift_is_of_the_latest_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.serving.metrics.WINDOW_PREDICTIONS", 500)
    metrics = make_metrics(of=reference())
    record(metrics, predictions(500, 2, favourite=5.0))
    assert drift(metrics)["classes"] > 1
    record(metrics, predictions(500, 3))
    assert drift(metrics)["classes"] < 0.1


def test_without_a_reference_or_enough_predictions_there_is_no_drift() -> None:
    metrics, without = make_metrics(of=reference()), make_metrics()
    record(metrics, predictions(MIN_PREDICTIONS - 1, 2))
    record(without, predictions(1000, 2))
    assert drift(metrics) == drift(without) == {}
    record(metrics, predictions(1, 3))
    assert len(drift(metrics)) == 3


def test_every_nth_prediction_is_logged(tmp_path: Path) -> None:
    file = tmp_path / "new" / "log.jsonl"
    metrics = make_metrics(f"log={file}", "log_sample=0.3", of=reference())
    recorded = predictions(100, 4)
    for at in range(0, 100, 7):
        record(metrics, recorded[at : at + 7])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 30
    first = recorded[3]  # 4 x 0.3 is the first number above 1
    assert first.embedding is not None
    projected = first.embedding @ draw_projection(WIDTH)
    assert {key: lines[0][key] for key in ("request", "name", "model_version")} == {
        "request": "r1",
        "name": "3.jpg",
        "model_version": "1",
    }
    assert lines[0]["class"] == CLASSES[first.probabilities.argmax()]
    assert lines[0]["confidence"] == float(first.probabilities.max())
    assert list(lines[0]["probabilities"]) == [CLASSES[i] for i in np.argsort(-first.probabilities)]
    np.testing.assert_allclose(lines[0]["embedding"], projected, atol=1e-5)
    record(make_metrics(f"log={file}", "log_sample=0"), recorded)
    assert len(file.read_text().splitlines()) == 30  # the file is appended to
    record(make_metrics(f"log={file}"), recorded[:1])
    assert "embedding" not in json.loads(file.read_text().splitlines()[-1])  # without a reference


def test_a_long_file_name_is_cut_in_the_log(tmp_path: Path) -> None:
    metrics = make_metrics(f"log={tmp_path}/log.jsonl")
    assert metrics.current
    metrics.current.record([EncodedImage(b"", "n" * 10**6, 1)], predictions(1, 5))
    assert len((tmp_path / "log.jsonl").read_text()) < 1000


def test_a_full_disk_ends_the_log_and_not_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = make_metrics("log=/dev/full")
    record(metrics, predictions(2, 5))
    record(metrics, predictions(2, 6))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("log=/dev/full: cannot be written (No space left on device)")
