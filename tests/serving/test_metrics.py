"""What is seen of predictions: drift as metrics, every n-th in the log."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.evaluation.drift import BINS, Window
from trainer.serving.export_files import Answer, Export
from trainer.serving.metrics import LEAST, Observed
from trainer.serving.settings import read_settings

CLASSES = ("a", "b", "c")
WIDE, NARROW = 6, 2  # of an embedding, and of what is compared of it


def answers(count: int, seed: int, shift: float = 0.0, favourite: float = 0.0) -> list[Answer]:
    """Of a model whose embeddings are normal, and whose classes are as probable as each other."""
    draw = np.random.default_rng(seed)
    logits = draw.standard_normal((count, 3)) + np.array([favourite, 0, 0])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    embeddings = draw.standard_normal((count, WIDE)) + shift
    return [Answer(p.astype(np.float32), e.astype(np.float32)) for p, e in zip(shares, embeddings, strict=True)]


def reference() -> dict[str, Any]:
    window = Window(3)
    projection = np.eye(WIDE)[:, :NARROW]
    for answer in answers(2000, 1):
        assert answer.embedding is not None
        chosen = int(answer.probabilities.argmax())
        window.add(chosen, float(answer.probabilities[chosen]), answer.embedding @ projection)
    mean, covariance = window.gaussian()
    return {
        "n": window.n,
        "class_frequencies": (window.classes / window.n).tolist(),
        "confidence_histogram": {"edges": np.linspace(0, 1, BINS + 1).tolist(), "counts": window.confidences.tolist()},
        "embedding": {"mean": mean.tolist(), "covariance": covariance.tolist(), "projection": projection.tolist()},
    }


def observed(*arguments: str, of: dict[str, Any] | None = None) -> Observed:
    export = Export("any", Path("any"), "1", CLASSES, of)
    return Observed(
        read_settings({"model": "any"} | dict(a.split("=") for a in arguments)), export, lambda: 3, lambda: 4
    )


def drift(seen: Observed) -> dict[str, float]:
    names = ("kubetune_serving_population_stability_index", "kubetune_serving_embedding_distance")
    return {
        s.labels.get("of", "embedding"): s.value
        for family in seen.registry.collect() if family.name in names for s in family.samples
    }  # fmt: skip


def test_what_is_like_the_reference_is_told_from_what_is_not() -> None:
    same, moved, other = (observed(of=reference()) for _ in range(3))
    same.predicted(answers(1000, 2))
    moved.predicted(answers(1000, 2, shift=2.0))
    other.predicted(answers(1000, 2, favourite=3.0))
    assert drift(same).keys() == {"classes", "confidence", "embedding"}
    assert max(drift(same).values()) < 0.1
    assert drift(moved)["embedding"] > 1
    assert drift(moved)["classes"] == drift(same)["classes"]
    assert drift(other)["classes"] > 0.25
    assert drift(other)["confidence"] > 0.25
    assert drift(other)["embedding"] == pytest.approx(drift(same)["embedding"])


def test_drift_is_of_the_last_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.serving.metrics.RECENT", 500)
    seen = observed(of=reference())
    seen.predicted(answers(500, 2, favourite=5.0))
    assert drift(seen)["classes"] > 1
    seen.predicted(answers(500, 3))
    assert drift(seen)["classes"] < 0.1


def test_too_few_predictions_and_no_reference_tell_nothing() -> None:
    seen, without = observed(of=reference()), observed()
    seen.predicted(answers(LEAST - 1, 2))
    without.predicted(answers(1000, 2))
    assert drift(seen) == drift(without) == {}
    seen.predicted(answers(1, 3))
    assert len(drift(seen)) == 3


def test_every_nth_prediction_is_logged(tmp_path: Path) -> None:
    file = tmp_path / "new" / "log.jsonl"
    seen = observed(f"log={file}", "log_sample=0.3", of=reference())
    given = answers(100, 4)
    for at in range(0, 100, 7):
        seen.predicted(given[at : at + 7])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 30
    first = given[3]  # the first one at which 0.3 a prediction make a whole
    assert first.embedding is not None
    assert lines[0]["class"] == CLASSES[first.probabilities.argmax()]
    assert lines[0]["confidence"] == float(first.probabilities.max())
    assert list(lines[0]["probabilities"]) == [CLASSES[i] for i in np.argsort(-first.probabilities)]
    np.testing.assert_allclose(lines[0]["embedding"], first.embedding[:NARROW], atol=1e-5)
    again = observed(f"log={file}", "log_sample=0")
    again.predicted(given)
    assert len(file.read_text().splitlines()) == 30  # what was there stays
    nothing = observed(f"log={file}")
    nothing.predicted(given[:1])
    assert "embedding" not in json.loads(file.read_text().splitlines()[-1])  # without a reference none is compared


def test_a_full_disk_ends_the_log_and_not_the_answers(capsys: pytest.CaptureFixture[str]) -> None:
    seen = observed("log=/dev/full")
    seen.predicted(answers(2, 5))
    seen.predicted(answers(2, 6))
    told = capsys.readouterr().err
    assert told == "log=/dev/full cannot be written (No space left on device); it ends here\n"
