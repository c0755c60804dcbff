"""Number of examples of the parity check and of the reference."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from trainer.config.schema import RunConfig, validate_config
from trainer.data.images import ImageStore
from trainer.data.open import OpenedData
from trainer.errors import DataError
from trainer.exporting.export import BATCH_SIZE, MAX_PARITY_EXAMPLES, export_classifier, record_exports, score_all
from trainer.exporting.verify import load_export
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.grad_cam import Explainer, make_explainer
from trainer.runs.stored_run import StoredRun
from trainer.storage.path import storage_path
from trainer.types import Dataset, Split, SplitPredictions


def make_config(on_error: str = "fail") -> RunConfig:
    return validate_config({
        "data": {"source": "digits", "cache": "none", "on_error": on_error},
        "model": {"backbone": "MobileNetV2", "alpha": 0.35, "image_size": 32, "weights": "none"},
        "phases": {"head": {"thaw": "none", "epochs": 1}}, "export": {"formats": ["keras"]},
    })  # fmt: skip


def image_store(folder: Path, count: int, config: RunConfig) -> ImageStore:
    """Return `count` small images of three classes, as the train and the test split."""
    rng, files = np.random.default_rng(0), [folder / f"{i:04}.png" for i in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    labels = rng.integers(0, 3, count).astype(np.int32)
    splits = {name: Split(name, labels, files=tuple(map(str, files))) for name in ("train", "test")}
    data = OpenedData(Dataset("x", ("a", "b", "c"), splits, ""), {}, None, "none")
    return ImageStore(data, config, 32, lambda _: None)


def test_a_report_that_a_killed_export_left_half_written_is_deleted(tmp_path: Path) -> None:
    left = tmp_path / "report" / ".report.json.17-000000000004711"
    left.parent.mkdir()
    left.touch()
    run = StoredRun("x", storage_path(tmp_path), make_config(), ("a", "b"), {})
    record_exports(run, tmp_path / "export", in_run=False, exports={})
    assert left.exists()
    record_exports(run, tmp_path / "export", in_run=True, exports={})
    assert not left.exists()


@pytest.fixture(scope="module")
def explained() -> tuple[Classifier, Explainer]:
    classifier = build_classifier(make_config().model, 3, 1)
    return classifier, make_explainer(classifier)


def test_the_reference_is_of_all_examples_and_parity_is_checked_on_a_thousand(
    explained: tuple[Classifier, Explainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, count = make_config(), MAX_PARITY_EXAMPLES + 100
    images = image_store(tmp_path, count + 5, config)
    (classifier, explainer), labels = explained, images.dataset.splits["test"].labels[5:]
    probabilities = np.full((count, 3), 0.1, np.float32)
    probabilities[np.arange(count), labels] = 0.8
    scored = SplitPredictions("test", np.arange(5, count + 5), labels, probabilities)
    read: list[tuple[str, Any]] = []
    rows = images.read_images
    monkeypatch.setattr(images, "read_images", lambda name, some: read.append((name, some)) or rows(name, some))
    facts = export_classifier(tmp_path / "export", classifier, images, scored, explainer)
    reference = json.loads((tmp_path / "export" / "reference.json").read_text())
    assert (facts["keras"]["examples"], reference["embedding"]["n"]) == (MAX_PARITY_EXAMPLES, MAX_PARITY_EXAMPLES)
    assert reference["n"] == count
    np.testing.assert_allclose(reference["class_frequencies"], np.bincount(labels) / count)
    ((split, indices),) = read  # training images are read for int8 only
    assert (split, indices.min() >= 5, len(set(indices.tolist()))) == ("test", True, MAX_PARITY_EXAMPLES)
    assert (tmp_path / "export" / "labels.txt").read_text() == "a\nb\nc\n"


def test_every_example_that_can_be_decoded_is_scored(
    explained: tuple[Classifier, Explainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier, explainer = explained
    images = image_store(tmp_path, BATCH_SIZE + 4, make_config("skip"))
    split = images.dataset.splits["test"]
    Path(split.files[7]).write_bytes(b"no image")
    scored = score_all(explainer, images, "test")
    assert scored.indices.tolist() == [i for i in range(split.count) if i != 7]
    assert capsys.readouterr().out.count("skipped ") == 1
    np.testing.assert_array_equal(scored.labels, np.delete(split.labels, 7))
    some = images.read_images("test", [6, BATCH_SIZE + 2])
    np.testing.assert_allclose(scored.probabilities[[6, BATCH_SIZE + 1]], classifier.probabilities(some), atol=1e-6)
    failing = ImageStore(OpenedData(images.dataset, {}, None, "none"), make_config(), 32, lambda _: None)
    with pytest.raises(DataError, match=r"cannot decode .*0007\.png"):
        score_all(explainer, failing, "test")


def test_a_run_in_half_precision_is_compared_in_the_precision_of_the_file(tmp_path: Path) -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        classifier = build_classifier(make_config().model, 3, 1)
    finally:
        keras.config.set_dtype_policy("float32")
    rng = np.random.default_rng(0)
    for layer in classifier.backbone.layers:  # statistics with which rounding to bfloat16 changes the probabilities
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_variance.assign(rng.uniform(0.02, 0.1, layer.moving_variance.shape))
    images, explainer = image_store(tmp_path, 20, make_config()), make_explainer(classifier)
    scored = score_all(explainer, images, "test")
    facts = export_classifier(tmp_path / "export", classifier, images, scored, explainer)["keras"]
    predicted = load_export(tmp_path / "export" / "model.keras")(images.read_images("test", scored.indices))
    assert np.abs(predicted - scored.probabilities).max() > 0.01  # compared with the precision of the run
    assert facts["largest_difference"] < 1e-3
    assert (facts["lost"], facts["gained"], facts["accuracy"]) == (0, 0, facts["trainer_accuracy"])
    assert classifier.backbone.layers[1].compute_dtype == "bfloat16"
