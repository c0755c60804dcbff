"""Several workers train what one trains; they stop, fail and go on together."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import ROOT, assert_same_run, assert_same_weights, run, story, variables_of
from tests.e2e.workers import SHARED, start_workers, train_alone_and_by_two
from trainer.errors import GAVE_UP, INTERRUPTED, WRONG_INPUT

LONG = (*SHARED, "phases.fine_tune.epochs=12")


def train(folder: Path, workers: int, *overrides: str) -> Path:
    """A run to its end; returns its folder."""
    out = folder / "run"
    if workers == 1:
        result = run(*overrides, f"output_dir={out}")
        assert result.returncode == 0, result.stderr
        return out
    started = start_workers(folder, workers, *overrides, f"output_dir={out}")
    assert started.wait(400) == [0] * workers, started.said(0)
    return out


def assert_near(one: Path, other: Path, tolerance: float) -> None:
    mine, theirs = variables_of(one, "LATEST"), variables_of(other, "LATEST")
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=tolerance, err_msg=name)
    for line, expected in zip(story(one), story(other), strict=True):
        assert line.keys() == expected.keys()
        assert [line[k] for k in ("phase", "epoch", "step")] == [expected[k] for k in ("phase", "epoch", "step")]
        for key in {"loss", "val_loss"} & line.keys():
            assert line[key] == pytest.approx(expected[key], abs=1e-4)


@pytest.mark.slow
def test_two_workers_train_bit_for_bit_what_one_trains_in_two_pieces(tmp_path: Path) -> None:
    """Adam, EMA, dropout and augmentation on; 90 examples in batches of 12 leave padding in the last batch."""
    extra = ("training.clip_norm=1", "training.class_weights=balanced", "model.dropout=0.2")
    one, two = train_alone_and_by_two(tmp_path, *SHARED, *extra)
    predictions = [(p / "report" / "predictions.csv").read_text() for p in (one, two)]
    assert predictions[0].count("\n") == predictions[1].count("\n") == 91
    report = json.loads((two / "report" / "report.json").read_text())
    assert report["timing"]["workers"] == 2
    assert json.loads((two / "run.json").read_text())["attempts"][0]["found_by"] == "TF_CONFIG"


@pytest.mark.parametrize(
    ("own", "texts"),
    [
        (["training.batch_size=24"], ["training.batch_size: 12 on worker 0, 24 on worker 1"]),
        (["runtime.log_every='5 steps'", "seed=1"], ["runtime.log_every.count: 4.0 on worker 0, 5.0", "seed: 42 on worker 0, 1"]),
    ],
)  # fmt: skip
def test_workers_with_another_configuration_refuse_with_the_difference(
    tmp_path: Path, own: list[str], texts: list[str]
) -> None:
    out = tmp_path / "run"
    workers = start_workers(tmp_path, 2, *SHARED, f"output_dir={out}", own={1: own})
    assert workers.wait(60) == [WRONG_INPUT] * 2
    for i in range(2):
        assert "the workers do not have the same configuration; give all of them the same image" in workers.said(i)
        for text in texts:
            assert text in workers.said(i)
    assert not out.exists()


@pytest.mark.slow
def test_each_worker_may_have_a_cache_and_budgets_of_its_own_but_not_another_output(tmp_path: Path) -> None:
    own = {1: [f"runtime.cache_dir={tmp_path}/c1", "runtime.memory_budget_gb=1", f"output_dir={tmp_path}/b"]}
    workers = start_workers(tmp_path, 2, *SHARED, f"output_dir={tmp_path}/a", own=own)
    assert workers.wait(60) == [WRONG_INPUT] * 2
    said = workers.said(1)
    assert "output_dir: " in said
    assert "cache_dir" not in said
    assert "memory_budget" not in said


def test_several_workers_need_an_output_dir(tmp_path: Path) -> None:
    workers = start_workers(tmp_path, 1, *SHARED, size=2)
    assert workers.wait(60) == [WRONG_INPUT]
    assert "several workers need output_dir=..., a folder that names the run and outlives its workers" in workers.said(
        0
    )


@pytest.mark.slow
def test_a_finished_run_is_finished_for_a_worker_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = (*SHARED, "debug.max_steps=1", "export.formats=[]", f"output_dir={out}")
    assert run(*small).returncode == 0
    workers = start_workers(tmp_path, 1, *small, size=2)  # the others have ended long ago
    assert workers.wait(60) == [0]
    assert "is finished already" in workers.said(0)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "overrides",
    [
        ("phases.head.optimizer.name=sgd", "phases.fine_tune.optimizer.name=sgd",
         "phases.head.optimizer.momentum=0.9", "training.clip_norm=1", "training.accumulate=2", "training.class_weights=balanced"),
        # Adam divides by the root of its second moment: where a gradient is nearly zero, its default epsilon of 1e-7
        # makes a step of full length out of a rounding error.
        ("phases.head.optimizer.epsilon=1e-3", "phases.fine_tune.optimizer.epsilon=1e-3", "training.ema=0.95",
         "model.dropout=0.2", "training.label_smoothing=0.1"),
    ],
    ids=["sgd", "adam"],
)  # fmt: skip
def test_one_two_and_three_workers_agree(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    one = train(tmp_path / "1", 1, *SHARED, *overrides)
    for workers in (2, 3):
        assert_near(train(tmp_path / str(workers), workers, *SHARED, *overrides), one, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_devices_of_one_process_train_the_same_and_go_on(tmp_path: Path) -> None:
    pieces = train(tmp_path / "pieces", 1, *LONG, "training.accumulate=2")
    mirrored = (*LONG, "runtime.replicas=2", f"output_dir={tmp_path / 'run'}")
    first = start_workers(tmp_path / "first", 1, *mirrored)
    first.wait_for("step 40/")
    assert "devices: 2 CPUs mirrored (runtime.replicas), float32; a batch of 12 is 6 for each" in first.said(0)
    first[0].send_signal(signal.SIGTERM)
    assert first.wait(60) == [INTERRUPTED]
    second = start_workers(tmp_path / "second", 1, *mirrored)
    assert second.wait(300) == [0]
    assert_same_weights(tmp_path / "run", pieces)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_on_any_worker_stops_all_and_the_run_goes_on_bit_for_bit(tmp_path: Path, who: int) -> None:
    calm = train(tmp_path / "calm", 2, *LONG)
    out = tmp_path / "run"
    first = start_workers(tmp_path / "first", 2, *LONG, f"output_dir={out}")
    first.wait_for("step 40/")
    first[who].send_signal(signal.SIGTERM)
    assert first.wait(60) == [INTERRUPTED] * 2
    for i in range(2):
        assert "everything is saved. Start the same command again" in first.said(i)
    state = out / "checkpoints" / (out / "checkpoints" / "LATEST").read_text().strip() / "state.json"
    stopped_at = json.loads(state.read_text())["step"]
    assert f"at step {stopped_at};" in first.said(0)
    assert f"at step {stopped_at};" in first.said(1)
    second = start_workers(tmp_path / "second", 2, *LONG, f"output_dir={out}")
    assert second.wait(400) == [0, 0]
    assert_same_run(calm, out)
    ledger = json.loads((out / "ledger.json").read_text())["seconds"]
    assert ledger["down"] > 0
    assert ledger["lost"] < 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_lost_worker_costs_steps_but_no_bits_and_another_number_of_workers_goes_on(tmp_path: Path) -> None:
    steady = ("phases.head.optimizer.epsilon=1e-3", "phases.fine_tune.optimizer.epsilon=1e-3")
    calm = train(tmp_path / "calm", 2, *LONG, *steady)
    out = tmp_path / "run"
    for number, (workers, lost) in enumerate([(2, 1), (3, 0)]):
        started = start_workers(tmp_path / str(number), workers, *LONG, *steady, f"output_dir={out}")
        started.wait_for(f"step {24 + 24 * number}/")
        started[lost].send_signal(signal.SIGKILL)
        codes = started.wait(60)
        assert codes == [-9 if i == lost else INTERRUPTED for i in range(workers)]
    result = run(*LONG, *steady, f"output_dir={out}")
    assert result.returncode == 0, result.stderr
    assert_near(out, calm, 1e-5)
    attempts = json.loads((out / "checkpoints" / "attempts.json").read_text())
    assert attempts[0]["reason"].startswith("lost worker 1 (127.0.0.1:")
    assert attempts[1]["reason"] is None  # it was the chief that was killed
    ledger = json.loads((out / "ledger.json").read_text())["seconds"]
    assert ledger["lost"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_by_file_another_number_of_workers_is_refused_inside_an_epoch(tmp_path: Path) -> None:
    prepared = tmp_path / "digits"
    command = [sys.executable, "-m", "trainer.prepare", "data=digits", f"output={prepared}", "data.shards=4"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    data = ("data=tfds", f"data.root={prepared}", "data.shard_by=file")
    overrides = (
        *SHARED,
        *data,
        "debug.max_examples=null",
        "training.batch_size=48",
        "runtime.checkpoint_every='8 steps'",
    )
    calm, out = train(tmp_path / "calm", 2, *overrides), tmp_path / "run"
    first = start_workers(tmp_path / "first", 2, *overrides, f"output_dir={out}")
    first.wait_for("step 36/")
    assert "sharding: by file (data.shard_by); worker 1 has 2 of 4 shards with 628 of 1,257 records" in first.said(1)
    first[1].send_signal(signal.SIGTERM)
    assert first.wait(60) == [INTERRUPTED] * 2
    result = run(*overrides, f"output_dir={out}")
    assert result.returncode == WRONG_INPUT
    assert "the run shared its data by file among 2 workers, and now would by record among 1" in result.stderr
    assert "steps inside one); go on with 2 workers" in result.stderr
    second = start_workers(tmp_path / "second", 2, *overrides, f"output_dir={out}")
    assert second.wait(200) == [0, 0]
    assert_same_run(calm, out)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_never_gets_anywhere_gives_up_with_3(tmp_path: Path) -> None:
    out = tmp_path / "run"
    overrides = (*SHARED, "runtime.checkpoint_every='1000 steps'", "phases.head.epochs=40",
                 "runtime.max_restarts_without_progress=2", f"output_dir={out}")  # fmt: skip
    for number in range(3):  # the first start and two restarts
        started = start_workers(tmp_path / str(number), 2, *overrides)
        started.wait_for("phase head: ", index=1)
        started[1].send_signal(signal.SIGKILL)
        assert started.wait(60) == [INTERRUPTED, -9]
    last = start_workers(tmp_path / "last", 2, *overrides)
    assert last.wait(60) == [GAVE_UP] * 2
    for i in range(2):
        assert "2 restarts in a row made no step of progress beyond step 0; mend the cause" in last.said(i)
    assert "lost worker 1 (" in last.said(0)
