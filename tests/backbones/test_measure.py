"""A head per fold on cached features, and the comparison as a command that is killed and continued."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.config.test_schema import tree
from tests.e2e.running import ROOT, program
from trainer.backbones.folds import plan_folds, pool_examples
from trainer.backbones.measure import (
    FrozenBackbone,
    measure_size_and_speed,
    open_backbone,
    select_features,
    train_and_score_fold,
)
from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.cluster.signals import StopFlag
from trainer.cluster.worker import Worker
from trainer.config.schema import RunConfig, validate_resolved_config
from trainer.data.images import ImageStore
from trainer.data.open import OpenedData, stage_and_open_run_dataset
from trainer.models.classifier import build_classifier
from trainer.types import Dataset

PHASE = {"thaw": "none", "epochs": 8, "features": "cached", "schedule": {"name": "cosine"},
         "optimizer": {"name": "adam", "learning_rate": 1e-2}}  # fmt: skip
MODEL = {"backbone": "MobileNetV2", "alpha": 0.35, "weights": "glyphs", "image_size": 32}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenBackbone, Dataset]:
    """A backbone with the features of 40 digits, and their dataset before the pool."""
    training = {"batch_size": 8, "ema": 0.9, "class_weights": "balanced"}
    changes = {"model": MODEL, "training": training, "debug": {"max_examples": 20}}
    cache = {"cache_dir": str(tmp_path_factory.mktemp("cache"))}
    config = validate_resolved_config(tree(**changes, phases={"head": PHASE}, runtime=cache))
    assert isinstance(config, RunConfig)
    data = stage_and_open_run_dataset(config, print, lambda _: None)
    images = ImageStore(OpenedData(pool_examples(data.dataset), {}, None, "glyphs"), config, 32, lambda _: None)
    classifier = build_classifier(config.model, 10, config.seed)
    worker = Worker(ControlChannel(discover({}), {}), tf.distribute.get_strategy(), StopFlag())
    return open_backbone(config, worker, images, classifier), data.dataset


def test_a_fold_is_a_function_of_the_data_and_not_of_the_folds_before(opened: tuple[FrozenBackbone, Dataset]) -> None:
    backbone, dataset = opened
    folds = plan_folds(dataset, 2, 1)
    first, second, again = (train_and_score_fold(backbone, folds, fold) for fold in (0, 1, 0))
    np.testing.assert_array_equal(first.predictions, again.predictions)
    assert sorted([*first.indices, *second.indices]) == list(range(40))
    labels = backbone.dataset.splits["train"].labels
    hits = sum((r.predictions == labels[r.indices]).sum() for r in (first, second))
    assert hits >= 8  # by chance 4
    measured = measure_size_and_speed(backbone, "here")
    assert measured.parameters == 410_208 + 1280 * 10 + 10
    assert measured.bytes == 4 * measured.parameters
    assert measured.single_ms > measured.batch_ms > 0


def test_rows_of_features_are_those_of_the_examples_and_unreadable_ones_remain_so(
    opened: tuple[FrozenBackbone, Dataset],
) -> None:
    features = replace(opened[0].features, unreadable={5: "broken"})
    indices = np.array([1, 5, 7])
    rows = select_features(features, indices, "validation")
    assert features.array is not None
    assert rows.array is not None
    np.testing.assert_array_equal(rows.array[:3], features.array[indices])
    assert not rows.array[3].any()
    assert rows.unreadable == {1: "broken"}
    np.testing.assert_array_equal(rows.split.labels, features.split.labels[indices])


NETWORKS = ("among=[mobilenet_v2:0.35@glyphs,mobilenet_v2:0.35@none]", "model.image_size=32", "folds=3",
            "data=digits", "debug.max_examples=40", "phases.head.epochs=2")  # fmt: skip


def read_predictions(folder: Path) -> dict[str, Any]:
    files = sorted((folder / "results").glob("*/fold-*.json"))
    return {str(path.relative_to(folder)): json.loads(path.read_text())["predictions"] for path in files}


@pytest.mark.slow
def test_a_killed_comparison_continues_and_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        return [*NETWORKS, f"output={tmp_path / name}", f"runtime.cache_dir={tmp_path / name}-cache"]

    call = [sys.executable, "-m", "trainer.backbones", *arguments("killed")]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while len(list((tmp_path / "killed").glob("results/*/*.json"))) < 5:  # one network, and a fold of the other
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("results/*/*.json")}
    assert 5 <= len(before) < 8
    assert not (tmp_path / "killed" / "backbones.json").exists()
    output = program("backbones", *arguments("killed")).stdout
    assert "computed before" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    program("backbones", *arguments("calm"))
    assert read_predictions(tmp_path / "killed") == read_predictions(tmp_path / "calm")
    assert len(read_predictions(tmp_path / "calm")) == 6
    summaries = [json.loads((tmp_path / name / "backbones.json").read_text()) for name in ("killed", "calm")]
    scores = [[(n["name"], n["accuracy"], n["p"], n["parameters"]) for n in s["networks"]] for s in summaries]
    assert scores[0] == scores[1]
    assert (tmp_path / "killed" / "index.html").exists()
