"""An evaluation scores the model that was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.models.efficient_net import IMAGENET, normalized, set_normalization
from tests.processes import run_python
from trainer.config.schema import load
from trainer.errors import DataError
from trainer.models.classifier import build_classifier
from trainer.runs.checkpoints import CheckpointFolder
from trainer.runs.stored_run import StoredRun, check_classes
from trainer.storage.path import storage_path
from trainer.training import variables
from trainer.training.state import RunState
from trainer.types import Dataset, Split

CLASSES = [str(digit) for digit in range(10)]
# Runs in its own process, since a strategy must be created before the first tensor.
PROGRAM = """
import sys
import numpy as np
from tests.models.efficient_net import normalized
from trainer.runs.stored_run import find_run, load_checkpoint, open_classifier
folder, images, output = sys.argv[1:]
run = find_run(folder)
np.save(output, normalized(open_classifier(run, load_checkpoint(run, "last")), np.load(images)))
"""


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (("rust", "spot", "moss", "rot", "mould"), "5.*'rust', 'spot', 'moss' and 2 more.*'daisy', 'rose'"),
        (("rose", "daisy", "tulip"), "3.*'tulip'"),
        (("daisy",), "1.*'rose'"),
        (("rose", "daisy"), "order.*'rose'.*'daisy'"),
    ],
)
def test_data_of_other_classes_is_refused_by_name(classes: tuple[str, ...], names: str, tmp_path: Path) -> None:
    phases = {"head": {"thaw": "none", "epochs": 1}}
    tree = {"data": {"source": "digits"}, "model": {"backbone": "MobileNetV2"}, "phases": phases}
    run = StoredRun("runs/1", storage_path(str(tmp_path)), load(tree), ("daisy", "rose"), "")
    data = Dataset("leaves", classes, {"train": Split("train", np.arange(len(classes), dtype=np.int32))}, "")
    with pytest.raises(DataError, match=names):
        check_classes(run, data)


def test_an_efficient_net_of_imagenet_weights_has_the_same_input_as_in_training(tmp_path: Path) -> None:
    model = {"backbone": "EfficientNetB0", "weights": "none", "image_size": 32}
    tree = {"data": {"source": "digits"}, "model": model, "phases": {"head": {"thaw": "none", "epochs": 1}}}
    source = build_classifier(load(tree).model, len(CLASSES), 1)
    set_normalization(source, *IMAGENET)
    source.backbone.save_weights(tmp_path / "efficient.weights.h5")
    config = load(tree | {"model": model | {"weights": str(tmp_path / "efficient.weights.h5")}})
    trained = build_classifier(config.model, len(CLASSES), 1)

    run, images, output = tmp_path / "run", tmp_path / "images.npy", tmp_path / "output.npy"
    values = variables.read(trained.variables)
    CheckpointFolder(run / "checkpoints", 1, print).save(RunState(step=1).to_json(), values, None)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (run / "run.json").write_text(json.dumps({"classes": CLASSES, "data_fingerprint": ""}))
    np.save(images, np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("float32"))
    run_python(PROGRAM, run, images, output, timeout=120)
    expected = normalized(trained, np.load(images))
    np.testing.assert_allclose(np.load(output), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 4  # normalised twice, as the published weights require
