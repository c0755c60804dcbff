"""An evaluation scores the model that was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.errors import raises
from tests.models.efficient_net import IMAGENET, normalized, set_normalization
from tests.processes import run_python
from trainer.config.schema import load
from trainer.errors import DataError
from trainer.evaluate import apply_changes
from trainer.models.classifier import build_classifier
from trainer.runs.checkpoints import CheckpointFolder
from trainer.runs.stored_run import StoredRun, map_to_run_classes
from trainer.storage.path import storage_path
from trainer.training import variables
from trainer.training.state import RunState
from trainer.types import Dataset, Split

CLASSES = [str(digit) for digit in range(10)]
# Runs in its own process, since a strategy must be created before the first tensor.
PROGRAM = """
import sys
import numpy as np
from tests.errors import raises
from tests.models.efficient_net import normalized
from trainer.runs.stored_run import find_run, load_checkpoint, open_classifier
folder, images, output = sys.argv[1:]
run = find_run(folder)
np.save(output, normalized(open_classifier(run, load_checkpoint(run, "last")), np.load(images)))
"""


def stored_run(folder: Path) -> StoredRun:
    phases = {"head": {"thaw": "none", "epochs": 1}}
    tree = {"data": {"source": "digits"}, "model": {"backbone": "MobileNetV2"}, "phases": phases}
    return StoredRun("runs/1", storage_path(str(folder)), load(tree), ("daisy", "rose", "tulip"), "")


def data_of(classes: tuple[str, ...]) -> Dataset:
    return Dataset("leaves", classes, {"train": Split("train", np.arange(len(classes), dtype=np.int32))}, "")


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (("rust", "spot", "moss", "rot", "mould", "mites"), "'rust', 'spot', 'moss', 'rot', 'mould', and 1 more"),
        (("rose", "daisy", "dahlia"), "'dahlia'"),
    ],
)
def test_data_of_unknown_classes_is_refused_by_name(classes: tuple[str, ...], names: str, tmp_path: Path) -> None:
    with raises(DataError, key="run", value="runs/1", problem=names, fix="'daisy', 'rose', 'tulip'"):
        map_to_run_classes(stored_run(tmp_path), data_of(classes))


@pytest.mark.parametrize(
    ("classes", "labels", "absent"),
    [(("daisy", "rose", "tulip"), [0, 1, 2], ""), (("tulip", "rose", "daisy"), [2, 1, 0], ""),
     (("tulip", "daisy"), [2, 0], "rose"), (("rose",), [1], "daisy, tulip")],
)  # fmt: skip
def test_labels_are_mapped_by_name_and_absent_classes_are_named(
    classes: tuple[str, ...], labels: list[int], absent: str, tmp_path: Path
) -> None:
    data = map_to_run_classes(stored_run(tmp_path), data_of(classes))
    assert data.class_names == ("daisy", "rose", "tulip")
    assert data.splits["train"].labels.tolist() == labels
    assert [absent in note for note in data.notes] == [True] * bool(absent)


@pytest.mark.parametrize(
    ("changes", "fractions", "moved"),
    [
        (["data.root=other"], (0.0, 0.0), (0.25, 0.1)),
        (["data=image_folder", "data.root=other"], (0.0, 0.0), (0.25, 0.1)),
        (["data.root=other", "data.validation_fraction=0.5"], (0.5, 0.1), None),
        (["data.on_error=skip"], (0.25, 0.1), None),
        ([], (0.25, 0.1), None),
    ],
)
def test_other_data_is_scored_as_a_whole_unless_a_fraction_is_given(
    changes: list[str], fractions: tuple[float, float], moved: tuple[float, float] | None
) -> None:
    data = {"source": "image_folder", "root": "photos", "validation_fraction": 0.25, "test_fraction": 0.1}
    phases = {"head": {"thaw": "none", "epochs": 1}}
    tree = load({"data": data, "model": {"backbone": "MobileNetV2"}, "phases": phases}).model_dump(mode="json")
    scored, divided = apply_changes(tree, changes)
    assert (scored.data.validation_fraction, scored.data.test_fraction) == fractions
    assert (divided and (divided.data.validation_fraction, divided.data.test_fraction)) == moved
    assert divided is None or divided.data.root == "other"


def test_an_efficient_net_of_imagenet_weights_has_the_same_input_as_in_training(tmp_path: Path) -> None:
    model = {"backbone": "EfficientNetB0", "weights": "none", "image_size": 32}
    tree = {"data": {"source": "digits"}, "model": model, "phases": {"head": {"thaw": "none", "epochs": 1}}}
    source = build_classifier(load(tree).model, len(CLASSES), 1)
    set_normalization(source, *IMAGENET)
    source.backbone.save_weights(tmp_path / "efficient.weights.h5")
    config = load(tree | {"model": model | {"weights": str(tmp_path / "efficient.weights.h5")}})
    trained = build_classifier(config.model, len(CLASSES), 1)

    run, images, output = tmp_path / "run", tmp_path / "images.npy", tmp_path / "output.npy"
    values = variables.copy_values(trained.variables)
    CheckpointFolder(run / "checkpoints", 1, print).save(RunState(step=1).to_json(), values, None)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (run / "run.json").write_text(json.dumps({"classes": CLASSES, "data_fingerprint": ""}))
    np.save(images, np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("float32"))
    run_python(PROGRAM, run, images, output, timeout=120)
    expected = normalized(trained, np.load(images))
    np.testing.assert_allclose(np.load(output), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 4  # normalised twice, as the published weights require
