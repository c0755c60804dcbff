"""On how many examples an export is tried, and how many its reference is of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.config.schema import load
from trainer.data.images import Pixels
from trainer.export import READ_AT_ONCE, score_all
from trainer.exporting.export import EXAMPLES, Scored, write_exports
from trainer.models.classifier import build_classifier
from trainer.models.grad_cam import looker
from trainer.types import Dataset, Split

COUNT = EXAMPLES + 100
TOLD = load({
    "data": {"source": "digits"}, "model": {"backbone": "MobileNetV2", "alpha": 0.35, "image_size": 32, "weights": "none"},
    "phases": {"head": {"thaw": "none", "epochs": 1}}, "export": {"formats": ["keras"]},
})  # fmt: skip


def test_the_reference_is_of_all_examples_and_the_files_are_tried_on_a_thousand(tmp_path: Path) -> None:
    rng, classifier = np.random.default_rng(0), build_classifier(TOLD.model, 3, 1)
    labels = rng.integers(0, 3, COUNT).astype(np.int32)
    answers = np.full((COUNT, 3), 0.1, np.float32)
    answers[np.arange(COUNT), labels] = 0.8
    dataset = Dataset("x", ("a", "b", "c"), {"train": Split("train", labels), "test": Split("test", labels)}, "")
    scored = Scored("test", np.arange(5, COUNT + 5), labels, answers)
    asked = []

    def pictures(split: str, indices: np.ndarray) -> np.ndarray:
        asked.append((split, indices))
        return rng.integers(0, 256, (len(indices), 32, 32, 3), dtype=np.uint8)

    facts = write_exports(tmp_path, TOLD, classifier, dataset, scored, pictures, looker(classifier))
    reference = json.loads((tmp_path / "reference.json").read_text())
    assert (facts["keras"]["examples"], reference["embedding"]["n"], reference["n"]) == (EXAMPLES, EXAMPLES, COUNT)
    np.testing.assert_allclose(reference["class_frequencies"], np.bincount(labels) / COUNT)
    ((split, indices),) = asked  # by no other format than int8 are training images wanted
    assert (split, indices.min() >= 5, len(set(indices.tolist()))) == ("test", True, EXAMPLES)
    assert (tmp_path / "labels.txt").read_text() == "a\nb\nc\n"


def test_every_example_that_can_be_decoded_is_scored(tmp_path: Path) -> None:
    classifier, rng = build_classifier(TOLD.model, 3, 1), np.random.default_rng(0)
    files = [tmp_path / f"{i:03}.png" for i in range(READ_AT_ONCE + 4)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    files[7].write_bytes(b"no picture")
    split = Split("test", rng.integers(0, 3, len(files)).astype(np.int32), files=tuple(map(str, files)))
    said: list[str] = []
    scored = score_all(looker(classifier), Pixels(split, 32, "stretch", "skip", 2, said.append))
    assert scored.indices.tolist() == [i for i in range(split.count) if i != 7]
    assert len(said) == 1
    np.testing.assert_array_equal(scored.labels, np.delete(split.labels, 7))
    some = Pixels(split, 32, "stretch", "fail", 2, print).rows(np.array([6, READ_AT_ONCE + 2]))
    np.testing.assert_allclose(scored.probabilities[[6, READ_AT_ONCE + 1]], classifier.probabilities(some), atol=1e-6)
