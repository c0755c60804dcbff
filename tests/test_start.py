"""Imports and input preprocessing at the start of a run."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.models.efficient_net import IMAGENET, normalize, set_normalization
from tests.processes import run_python
from trainer.cli.process import _hide_packages
from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.config.schema import Model
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.weights import refresh_normalization
from trainer.runs.checkpoints import CheckpointFolder
from trainer.runs.restore import assign_values, load_warm_start
from trainer.training import variables
from trainer.training.state import RunState

MODEL = Model(backbone="EfficientNetB0", weights="none", image_size=32)


@pytest.fixture(scope="module")
def normalizing() -> Classifier:
    """An EfficientNet with the input normalization of ImageNet."""
    classifier = build_classifier(MODEL, 3, 1)
    set_normalization(classifier, *IMAGENET)
    refresh_normalization(classifier.backbone)
    return classifier


@pytest.mark.parametrize("resumed", [False, True])
def test_an_efficient_net_from_values_gets_their_input_normalization(
    resumed: bool, normalizing: Classifier, tmp_path: Path
) -> None:
    other, values = build_classifier(MODEL, 3, 2), variables.copy_values(normalizing.variables)
    if resumed:
        assign_values(other, other.variables, values, "a checkpoint")
    else:
        CheckpointFolder(tmp_path / "checkpoints", 1, print).save(RunState(step=1).to_json(), values, None)
        _, count = load_warm_start(ControlChannel(discover({}), {}), other, str(tmp_path), tmp_path)
        assert count == len(values)
    image = np.full((1, 32, 32, 3), 200, "float32")
    np.testing.assert_allclose(normalize(normalizing, image), normalize(other, image), rtol=1e-5)


def test_packages_of_the_report_are_imported_with_the_report() -> None:
    program = """
import sys
from trainer.cli.process import suppress_import_noise
with suppress_import_noise():
    from trainer import train
print(sorted({"sklearn", "scipy.stats", "matplotlib"} & set(sys.modules)))
import matplotlib.pyplot, sklearn.metrics, trainer.report.build
print(matplotlib.pyplot.figure, sklearn.metrics.f1_score)
"""
    early, later = run_python(program).stdout.splitlines()
    assert early == "[]"
    assert "None" not in later


def test_a_package_is_hidden_unless_it_is_imported_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_later.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with _hide_packages(["json", "imported_later"]):
        assert importlib.import_module("json") is json
        with pytest.raises(ImportError):
            importlib.import_module("imported_later")
    assert importlib.import_module("imported_later").__file__ == str(tmp_path / "imported_later.py")
    assert sys.modules["json"] is json
