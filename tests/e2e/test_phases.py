"""Learning-rate multipliers, phase weights and `auto` values in whole runs: killed, resumed, on several workers."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.e2e.running import SMALL, assert_same_run, kill_at, train, variables_of
from tests.e2e.workers import SHARED, start_workers, train_alone_and_by_two

pytestmark = pytest.mark.slow

MULTIPLIERS = tuple(
    f"phases.fine_tune.{value}" for value in ("layer_decay=0.8", "backbone_rate=0.5", "optimizer.name=adamw")
)
WITHOUT_PHASES = (
    "data=digits", "model=auto", "model.weights=none", "model.image_size=32", "debug.max_examples=40",
    "debug.max_steps=2", "export.formats=[]",
)  # fmt: skip
AUTO = (*WITHOUT_PHASES, "phases=auto", "phases.auto.domain=different")


def test_multipliers_are_restored_after_a_kill(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    train(*SMALL, *MULTIPLIERS, f"output_dir={calm}")
    output = kill_at("step 16/", *SMALL, *MULTIPLIERS, f"output_dir={killed}")  # within the second phase
    assert "learning rate x 0.5 in the backbone, x 0.8 per block down: head 1, block_16 0.4, block_15 0.32" in output
    train(*SMALL, *MULTIPLIERS, f"output_dir={killed}")
    assert_same_run(calm, killed)


@pytest.mark.timeout(900)
def test_a_phase_without_improvement_ends_with_the_weights_of_the_phase_before(tmp_path: Path) -> None:
    worse, head = tmp_path / "worse", tmp_path / "head"
    longer = ("runtime.keep_checkpoints=1", "phases.head.epochs=3")
    high_rate = ("phases.fine_tune.optimizer.name=sgd", "phases.fine_tune.optimizer.learning_rate=0.5")
    result = train(*SMALL, *longer, *high_rate, f"output_dir={worse}")
    train(*SMALL, *longer, "~phases.fine_tune", f"output_dir={head}")
    phases = json.loads((worse / "report" / "report.json").read_text())["phases"]
    assert phases["fine_tune"]["kept_from"] == "head"
    assert phases["fine_tune"]["own_val_accuracy"] < phases["fine_tune"]["val_accuracy"]
    assert phases["fine_tune"]["val_accuracy"] == phases["head"]["val_accuracy"]
    assert "the weights of head (epoch" in result.stdout
    assert (worse / "checkpoints" / "BEST").read_text() == (head / "checkpoints" / "BEST").read_text()
    predictions = [(folder / "report" / "predictions.csv").read_bytes() for folder in (worse, head)]
    assert predictions[0] == predictions[1]


@pytest.mark.timeout(900)
def test_a_kill_while_the_whole_validation_split_is_scored_changes_nothing(tmp_path: Path) -> None:
    calm, killed, whole = tmp_path / "calm", tmp_path / "killed", tmp_path / "whole"
    partial = (*SMALL, "training.validation_share=0.3")
    result = train(*partial, f"output_dir={calm}")
    scoring, scored = "scoring the best weights on the whole validation split", "on all 90 validation examples"
    assert result.stdout.count(scoring) == result.stdout.count(scored) == 2
    phases = json.loads((calm / "report" / "report.json").read_text())["phases"]
    for phase in phases.values():
        assert (phase["val_n"], phase["epoch_val_n"]) == (90, 32)
    after = f"n = 90); whole split, after its epoch {phases['head']['epoch_val_accuracy']:.4f} of 32"
    assert after in result.stdout

    output = kill_at(f"phase head: {scoring}", *partial, f"output_dir={killed}")
    assert scored not in output
    output = kill_at(f"phase fine_tune: {scoring}", *partial, f"output_dir={killed}")
    assert output.count(scored) == 1  # that of the head, which the second start repeats
    last = train(*partial, f"output_dir={killed}").stdout
    assert (last.count(scoring), last.count(scored)) == (1, 1)
    assert_same_run(calm, killed)

    train(*SMALL, f"output_dir={whole}")
    assert not any(
        "epoch_val_n" in p for p in json.loads((whole / "report" / "report.json").read_text())["phases"].values()
    )


def test_two_workers_with_multipliers_train_as_one_in_two_micro_batches(tmp_path: Path) -> None:
    train_alone_and_by_two(tmp_path, *SHARED, *MULTIPLIERS)


def test_two_workers_train_batch_norm_as_one_does(tmp_path: Path) -> None:
    """The last of 90 examples in batches of 12 has 6 examples: the second worker has padding only."""
    extra = ("phases.fine_tune.batch_norm=train", "phases.fine_tune.optimizer.name=sgd", "augmentation=none")
    one, two = tmp_path / "one", tmp_path / "two"
    train(*SHARED, *extra, f"output_dir={one}")
    workers = start_workers(tmp_path, 2, *SHARED, *extra, f"output_dir={two}")
    assert workers.wait(400) == [0, 0], workers.output(0)
    mine, theirs = variables_of(one, "LATEST"), variables_of(two, "LATEST")
    moved = [name for name in mine if "moving_" in name and "block_16" in name]
    assert len(moved) == 6
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_auto_values_are_resolved_once_and_equal_explicit_ones(tmp_path: Path) -> None:
    chosen, explicit = tmp_path / "chosen", tmp_path / "explicit"
    output = kill_at("phase head: val_accuracy", *AUTO, f"output_dir={chosen}")
    for text in ("model.backbone=auto: MobileNetV2", "phases=auto: few_different", "training.batch_size=auto: 16"):
        assert text in output
    config = yaml.safe_load((chosen / "config.yaml").read_text())
    assert (config["model"]["backbone"], config["training"]["batch_size"]) == ("MobileNetV2", 16)
    assert list(config["phases"]) == ["head", "fine_tune"]
    advice = json.loads((chosen / "run.json").read_text())["advice"]
    assert [line.split(":")[0] for line in advice] == ["model.backbone=auto", "phases=auto", "training.batch_size=auto"]

    refused = train(*WITHOUT_PHASES, "phases=head_only", f"output_dir={chosen}", code=2)
    assert "phases.fine_tune.thaw: percent:35 -> None" in refused.stderr

    assert "model.backbone=auto: MobileNetV2" in train(*AUTO, f"output_dir={chosen}").stdout
    assert json.loads((chosen / "run.json").read_text())["advice"] == advice
    assert "finished" in train(*AUTO, f"output_dir={chosen}").stdout

    values = ("model.backbone=MobileNetV2", "phases=two_phase", "training.batch_size=16")
    train(*WITHOUT_PHASES, *values, f"output_dir={explicit}")
    assert_same_run(chosen, explicit)


def test_workers_use_the_auto_values_of_the_chief(tmp_path: Path) -> None:
    out = tmp_path / "run"
    workers = start_workers(tmp_path, 2, *AUTO, f"output_dir={out}")
    assert workers.wait(400) == [0, 0], workers.output(0)
    for i in range(2):
        assert "training.batch_size=auto: 16" in workers.output(i)
    assert yaml.safe_load((out / "config.yaml").read_text())["training"]["batch_size"] == 16
