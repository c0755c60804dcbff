"""Rates of their own and what is `auto`, in whole runs: killed, continued, and on several workers."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.e2e.running import SMALL, assert_same_run, run, start, variables_of
from tests.e2e.workers import SHARED, start_workers, train_alone_and_by_two

OWN_RATES = (
    "phases.fine_tune.layer_decay=0.8",
    "phases.fine_tune.backbone_rate=0.5",
    "phases.fine_tune.optimizer.name=adamw",
)
AUTO = (
    "data=digits",
    "model=auto",
    "model.weights=none",
    "model.image_size=32",
    "phases=auto",
    "phases.auto.domain=different",
    "debug.max_examples=40",
    "debug.max_steps=2",
    "export.formats=[]",
)


WITHOUT_PHASES = tuple(a for a in AUTO if not a.startswith("phases"))


@pytest.mark.slow
def test_rates_of_their_own_outlive_kill_9(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert run(*SMALL, *OWN_RATES, f"output_dir={calm}").returncode == 0
    child = start(*SMALL, *OWN_RATES, f"output_dir={killed}")
    said = ""
    for line in child.stdout or ():
        said += line
        if "\nphase fine_tune:" in said and "step 1" in line:  # steps 12 to 19: within the second phase
            break
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert "learning rate x 0.5 in the backbone, x 0.8 a block down: head 1, block_16 0.4, block_15 0.32" in said
    assert run(*SMALL, *OWN_RATES, f"output_dir={killed}").returncode == 0
    assert_same_run(calm, killed)


@pytest.mark.slow
def test_a_phase_that_spoils_the_weights_hands_on_what_it_began_with(tmp_path: Path) -> None:
    spoilt, head = tmp_path / "spoilt", tmp_path / "head"
    longer = ("runtime.keep_checkpoints=1", "phases.head.epochs=3")
    ruin = ("phases.fine_tune.optimizer.name=sgd", "phases.fine_tune.optimizer.learning_rate=3")
    result = run(*SMALL, *longer, *ruin, f"output_dir={spoilt}")
    assert result.returncode == 0, result.stderr
    assert run(*SMALL, *longer, "~phases.fine_tune", f"output_dir={head}").returncode == 0
    phases = json.loads((spoilt / "report" / "report.json").read_text())["phases"]
    assert phases["fine_tune"]["kept_from"] == "head"
    assert phases["fine_tune"]["own_val_accuracy"] < phases["fine_tune"]["val_accuracy"]
    assert phases["fine_tune"]["val_accuracy"] == phases["head"]["val_accuracy"]
    assert "the weights of head (epoch" in result.stdout
    assert (spoilt / "checkpoints" / "BEST").read_text() == (head / "checkpoints" / "BEST").read_text()
    predictions = [(folder / "report" / "predictions.csv").read_bytes() for folder in (spoilt, head)]
    assert predictions[0] == predictions[1]


@pytest.mark.slow
def test_two_workers_with_rates_of_their_own_train_bit_for_bit_what_one_trains_in_two_pieces(tmp_path: Path) -> None:
    train_alone_and_by_two(tmp_path, *SHARED, *OWN_RATES)


@pytest.mark.slow
def test_two_workers_train_batch_norm_as_one_does(tmp_path: Path) -> None:
    """90 examples in batches of 12: the last batch is half padding, which is all of the second worker's part."""
    extra = ("phases.fine_tune.batch_norm=train", "phases.fine_tune.optimizer.name=sgd", "augmentation=none")
    one, two = tmp_path / "one", tmp_path / "two"
    result = run(*SHARED, *extra, f"output_dir={one}")
    assert result.returncode == 0, result.stderr
    workers = start_workers(tmp_path, 2, *SHARED, *extra, f"output_dir={two}")
    assert workers.wait(400) == [0, 0], workers.said(0)
    mine, theirs = variables_of(one, "LATEST"), variables_of(two, "LATEST")
    moved = [name for name in mine if "moving_" in name and "block_16" in name]
    assert len(moved) == 6
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_what_auto_chose_is_the_run(tmp_path: Path) -> None:
    chosen, by_hand = tmp_path / "chosen", tmp_path / "by-hand"
    child = start(*AUTO, f"output_dir={chosen}")
    said = ""
    for line in child.stdout or ():
        said += line
        if line.startswith("phase fine_tune:"):
            break
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert "model.backbone=auto: MobileNetV2, for 40 training images of 10 classes (the small one" in said
    assert "phases=auto: few_different, that is head (none), fine_tune (percent:35), for 40 training" in said
    assert "training.batch_size=auto: 16, for 40 training images" in said
    config = yaml.safe_load((chosen / "config.yaml").read_text())
    assert (config["model"]["backbone"], config["training"]["batch_size"]) == ("MobileNetV2", 16)
    assert list(config["phases"]) == ["head", "fine_tune"]
    advice = json.loads((chosen / "run.json").read_text())["advice"]
    assert [line.split(":")[0] for line in advice] == ["model.backbone=auto", "phases=auto", "training.batch_size=auto"]

    refused = run(*WITHOUT_PHASES, "phases=head_only", f"output_dir={chosen}")
    assert refused.returncode == 2
    assert "phases.fine_tune.thaw: percent:35 -> None" in refused.stderr

    result = run(*AUTO, f"output_dir={chosen}")
    assert result.returncode == 0, result.stderr
    assert "model.backbone=auto: MobileNetV2, as this run began" in result.stdout
    assert json.loads((chosen / "run.json").read_text())["advice"] == advice
    again = run(*AUTO, f"output_dir={chosen}")
    assert (again.returncode, "is finished already" in again.stdout) == (0, True)

    values = ("model.backbone=MobileNetV2", "phases=two_phase", "training.batch_size=16")
    result = run(*WITHOUT_PHASES, *values, f"output_dir={by_hand}")
    assert result.returncode == 0, result.stderr
    assert_same_run(chosen, by_hand)


@pytest.mark.slow
def test_workers_take_what_the_chief_chose(tmp_path: Path) -> None:
    out = tmp_path / "run"
    workers = start_workers(tmp_path, 2, *AUTO, f"output_dir={out}")
    assert workers.wait(400) == [0, 0], workers.said(0)
    for i in range(2):
        assert "training.batch_size=auto: 16, for 40 training images" in workers.said(i)
    assert yaml.safe_load((out / "config.yaml").read_text())["training"]["batch_size"] == 16
