"""Whole runs on cached features: the weights of a live run, whatever kills them, on any number of workers."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import SMALL, assert_same_run, run, start, story, variables_of
from tests.e2e.workers import SHARED, train_alone_and_by_two
from trainer.errors import INTERRUPTED, WRONG_INPUT

STILL = ("augmentation=none", "model.dropout=0.2", "export.formats=[]")
LIVE = ("phases.head.features=live", "phases.fine_tune.features=live")
VIEWS = ("augmentation=light", "phases.head.augmented_views=2", "phases.head.epochs=3", "export.formats=[]")
KILLS = 3


def assert_near(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    mine, theirs = variables_of(one, "LATEST"), variables_of(other, "LATEST")
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=tolerance, err_msg=name)
    for line, expected in zip(story(one), story(other), strict=True):
        assert [line[k] for k in ("phase", "epoch", "step")] == [expected[k] for k in ("phase", "epoch", "step")]
        for key in {"loss", "val_loss", "val_accuracy"} & line.keys():
            assert line[key] == pytest.approx(expected[key], abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("extra", [(), ("phases.fine_tune.batch_norm=train",)], ids=["frozen", "batch_norm"])
def test_cached_and_live_runs_end_with_the_same_weights(tmp_path: Path, extra: tuple[str, ...]) -> None:
    cached, live = tmp_path / "cached", tmp_path / "live"
    result = run(*SMALL, *STILL, *extra, f"output_dir={cached}", f"runtime.cache_dir={tmp_path}/cache")
    assert result.returncode == 0, result.stderr
    assert "features of phase head: cached, 1 view of " in result.stdout
    assert "features of phase fine_tune: cached, 1 view of " in result.stdout
    assert result.stdout.count("images to compute; kept in") == 2  # one pass over each split is enough for both phases
    assert result.stdout.count("computed before") == 2
    assert json.loads((cached / "run.json").read_text())["features"] == {"head": "cached", "fine_tune": "cached"}
    assert json.loads((cached / "ledger.json").read_text())["seconds"]["features"] > 0
    assert run(*SMALL, *STILL, *extra, *LIVE, f"output_dir={live}").returncode == 0
    assert_near(cached, live)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_change_nothing(tmp_path: Path) -> None:
    calm, folder, cache = tmp_path / "calm", tmp_path / "killed", tmp_path / "cache"
    told = (*SMALL, *STILL, f"runtime.cache_dir={cache}")
    began = time.monotonic()
    assert run(*told, f"output_dir={calm}").returncode == 0
    whole = time.monotonic() - began
    shutil.rmtree(cache / "features")  # the others have to compute for themselves
    rng = np.random.default_rng(7)
    for number in range(KILLS):
        child = start(*told, f"output_dir={folder}")
        time.sleep(rng.uniform(0.3, 0.9) * whole)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        if child.returncode == 0:
            break
        rows = sorted((cache / "features").glob("*.rows"))
        if rows and number == 1:  # and the disk has lost something
            content = bytearray(rows[0].read_bytes())
            content[len(content) // 2] ^= 1
            rows[0].write_bytes(content)
    result = run(*told, f"output_dir={folder}")
    assert result.returncode == 0, result.stderr
    assert_same_run(calm, folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_told_to_stop_in_the_pass_a_run_goes_on_with_what_is_there(tmp_path: Path) -> None:
    told = (
        "data=digits", "model=mobilenet_v2", "model.weights=none", "model.alpha=0.35", "model.image_size=96",
        "training.batch_size=64", "phases=head_only", "phases.head.epochs=2", "export.formats=[]",
        f"output_dir={tmp_path / 'run'}", f"runtime.cache_dir={tmp_path}/cache",
    )  # fmt: skip
    child = start(*told)
    said = ""
    for line in child.stdout or ():
        said += line
        if "images to compute" in line:
            break
    listed = lambda: sum(p.read_text().count("\n") for p in (tmp_path / "cache" / "features").glob("train*.list"))  # noqa: E731
    while not listed() and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate()
    assert child.returncode == INTERRUPTED
    assert "while features were computed; everything is saved. Start the same command again" in error
    kept = listed()
    result = run(*told)
    assert result.returncode == 0, result.stderr
    count, left = (
        int(text.split("features of train: ")[1].split(" images")[0].replace(",", "")) for text in (said, result.stdout)
    )
    assert 0 < left < count
    assert listed() > kept


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("extra", [(), VIEWS], ids=["plain", "views"])
def test_two_workers_train_bit_for_bit_what_one_trains_in_two_pieces(tmp_path: Path, extra: tuple[str, ...]) -> None:
    told = (*SHARED, *STILL, *extra, "phases.fine_tune.augmented_views=null")
    train_alone_and_by_two(tmp_path, *told)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fixed_views_are_the_same_cached_and_live(tmp_path: Path) -> None:
    cached, live = tmp_path / "cached", tmp_path / "live"
    told = (*SMALL, *VIEWS, "~phases.fine_tune")
    result = run(*told, f"output_dir={cached}", f"runtime.cache_dir={tmp_path}/cache")
    assert result.returncode == 0, result.stderr
    assert "features of phase head: cached, 2 views of " in result.stdout
    assert run(*told, LIVE[0], f"output_dir={live}").returncode == 0
    assert_near(cached, live)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_room_a_phase_is_live_and_stays_so(tmp_path: Path) -> None:
    out, taken = tmp_path / "run", tmp_path / "taken" / "features"
    taken.parent.mkdir()
    taken.write_text("where the folder would be")
    told = (*SMALL, *STILL, "~phases.fine_tune", f"output_dir={out}")
    child = start(*told, f"runtime.cache_dir={taken.parent}", "runtime.memory_budget_gb=1e-5")
    said = ""
    for line in child.stdout or ():
        said += line
        if "epoch 1 done" in line:
            break
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert "features cannot be kept in " in said
    assert "features of phase head: live after all, there is no room for them" in said
    assert json.loads((out / "run.json").read_text())["features"] == {"head": "live"}
    result = run(*told, f"runtime.cache_dir={tmp_path}/cache")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "cache" / "features").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_phase_that_began_cached_waits_for_room(tmp_path: Path) -> None:
    out = tmp_path / "run"
    told = (*SMALL, *STILL, "~phases.fine_tune", f"output_dir={out}")
    child = start(*told, f"runtime.cache_dir={tmp_path}/cache")
    for line in child.stdout or ():
        if "step 8/" in line:  # four steps behind a checkpoint
            break
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    shutil.rmtree(tmp_path / "cache")
    result = run(*told, "runtime.memory_budget_gb=1e-5", "runtime.disk_budget_gb=0")
    assert result.returncode == INTERRUPTED
    assert "phase head began with cached features, and there is no room for them" in result.stderr
    assert run(*told).returncode == 0


@pytest.mark.slow
def test_nothing_frozen_leaves_nothing_to_cache(tmp_path: Path) -> None:
    told = (
        "experiment=quickstart",
        "augmentation=none",
        "debug=fast",
        "phases=end_to_end",
        f"output_dir={tmp_path / 'run'}",
    )
    result = run(*told, "phases.all.features=cached")
    assert result.returncode == WRONG_INPUT
    assert (
        "phases.all.features=cached: no layers with weights stay frozen below all that thaw=all trains; say "
        "features=auto or live"
    ) in result.stderr
