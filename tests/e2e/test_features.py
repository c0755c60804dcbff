"""Cached features in whole runs: equal weights to live runs, after kills and on several workers."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import (
    SMALL,
    assert_near,
    assert_same_run,
    assert_same_weights,
    kill_after,
    kill_at,
    start_until,
    train,
    variables_of,
)
from tests.e2e.workers import SHARED, train_alone_and_by_two
from trainer.errors import INTERRUPTED, WRONG_INPUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FIXED = ("augmentation=none", "model.dropout=0.2", "export.formats=[]")
LIVE = ("phases.head.features=live", "phases.fine_tune.features=live")
LITERT = "runtime.trunk_engine=litert"
VIEWS = ("augmentation=light", "phases.head.augmented_views=2", "phases.head.epochs=3", "export.formats=[]")
KILLS = 3


@pytest.mark.parametrize(
    "extra",
    [(), ("phases.fine_tune.batch_norm=affine",), ("phases.fine_tune.batch_norm=train",), (LITERT,)],
    ids=["frozen", "affine", "train", "litert"],
)
def test_cached_and_live_runs_end_with_the_same_weights(tmp_path: Path, extra: tuple[str, ...]) -> None:
    cached, live = tmp_path / "cached", tmp_path / "live"
    output = train(*SMALL, *FIXED, *extra, f"output_dir={cached}", f"runtime.cache_dir={tmp_path}/cache").stdout
    assert "features of phase head: cached" in output
    assert "features of phase fine_tune: cached" in output
    passes = re.findall("features of (train|validation): .* images to compute", output)
    assert len(passes) == 2  # one for both phases
    assert json.loads((cached / "run.json").read_text())["features"] == {"head": "cached", "fine_tune": "cached"}
    assert json.loads((cached / "ledger.json").read_text())["seconds"]["features"] > 0
    train(*SMALL, *FIXED, *extra, *LIVE, f"output_dir={live}")
    assert_near(cached, live, ("loss", "val_loss", "val_accuracy"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("backbone", "size", "first"),
    [("MobileNetV2", 32, 116), ("EfficientNetB0", 32, 189), ("Xception", 71, 116), ("ResNet50", 32, 143)],
)
def test_affine_normalization_is_restored_after_a_kill(backbone: str, size: int, first: int, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    network = (f"model.backbone={backbone}", "model.alpha=null", "model.weights=none", f"model.image_size={size}")
    run = (*SMALL, *FIXED, *network, f"phases.fine_tune.thaw=from_layer:{first}", "phases.fine_tune.batch_norm=affine")
    train(*run, f"output_dir={calm}")
    kill_at("step 16/", *run, f"output_dir={killed}")  # within the second phase
    assert "weights: this run's checkpoint at step" in train(*run, f"output_dir={killed}").stdout
    assert_same_run(calm, killed)
    assert any(name.startswith("optimizer/") and "gamma" in name for name in variables_of(calm, "LATEST"))


@pytest.mark.timeout(1800)
def test_kills_change_nothing(tmp_path: Path) -> None:
    calm, folder, cache = tmp_path / "calm", tmp_path / "killed", tmp_path / "cache"
    run = (*SMALL, *FIXED, f"runtime.cache_dir={cache}")
    began = time.monotonic()
    train(*run, f"output_dir={calm}")
    duration = time.monotonic() - began
    shutil.rmtree(cache / "features")
    rng = np.random.default_rng(7)
    for number in range(KILLS):
        if kill_after(rng.uniform(0.3, 0.9) * duration, *run, f"output_dir={folder}") == 0:
            break
        rows = sorted((cache / "features").glob("*.rows"))
        if rows and number == 1:  # in addition, a file of the cache is damaged
            content = bytearray(rows[0].read_bytes())
            content[len(content) // 2] ^= 1
            rows[0].write_bytes(content)
    train(*run, f"output_dir={folder}")
    assert_same_run(calm, folder)


def test_a_run_stopped_while_computing_features_resumes_with_those_in_the_cache(tmp_path: Path) -> None:
    overrides = (
        "data=digits", "model=mobilenet_v2", "model.weights=none", "model.alpha=0.35", "model.image_size=96",
        "training.batch_size=64", "phases=head_only", "phases.head.epochs=2", "export.formats=[]",
        f"output_dir={tmp_path / 'run'}", f"runtime.cache_dir={tmp_path}/cache",
    )  # fmt: skip
    child, output = start_until("features of train: ", *overrides)
    listed = lambda: sum(p.read_text().count("\n") for p in (tmp_path / "cache" / "features").glob("train*.list"))  # noqa: E731
    while not listed() and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate()
    assert child.returncode == INTERRUPTED
    assert "while computing features" in error
    cached = listed()
    outputs = (output, train(*overrides).stdout)
    count, left = (int(re.search("features of train: ([0-9,]+) images", x)[1].replace(",", "")) for x in outputs)  # type: ignore[index]
    assert 0 < left < count
    assert listed() > cached


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("extra", [(), VIEWS, (LITERT,)], ids=["plain", "views", "litert"])
def test_two_workers_train_as_one_in_two_micro_batches(tmp_path: Path, extra: tuple[str, ...]) -> None:
    train_alone_and_by_two(tmp_path, *SHARED, *FIXED, *extra, "phases.fine_tune.augmented_views=null")


def test_fixed_views_are_the_same_cached_and_live(tmp_path: Path) -> None:
    cached, live = tmp_path / "cached", tmp_path / "live"
    run = (*SMALL, *VIEWS, "~phases.fine_tune")
    result = train(*run, f"output_dir={cached}", f"runtime.cache_dir={tmp_path}/cache")
    assert "features of phase head: cached, 2 views" in result.stdout
    train(*run, LIVE[0], f"output_dir={live}")
    assert_near(cached, live, ("loss", "val_loss", "val_accuracy"))


def test_without_space_for_features_a_phase_is_live_and_stays_live(tmp_path: Path) -> None:
    out, blocked = tmp_path / "run", tmp_path / "blocked" / "features"
    blocked.parent.mkdir()
    blocked.write_text("a file instead of a folder")
    run = (*SMALL, *FIXED, "~phases.fine_tune", f"output_dir={out}")
    output = kill_at("epoch 1 done", *run, f"runtime.cache_dir={blocked.parent}", "runtime.memory_budget_gb=1e-5")
    assert "features of phase head: live, because there is no space for a cache" in output
    assert json.loads((out / "run.json").read_text())["features"] == {"head": "live"}
    train(*run, f"runtime.cache_dir={tmp_path}/cache")
    assert not (tmp_path / "cache" / "features").exists()


def test_a_phase_that_began_cached_is_interrupted_without_space(tmp_path: Path) -> None:
    run = (*SMALL, *FIXED, "~phases.fine_tune", f"output_dir={tmp_path / 'run'}")
    kill_at("step 8/", *run, f"runtime.cache_dir={tmp_path}/cache")  # four steps after a checkpoint
    shutil.rmtree(tmp_path / "cache")
    error = train(*run, "runtime.memory_budget_gb=1e-5", "runtime.disk_budget_gb=0", code=INTERRUPTED).stderr
    assert "phase head began with cached features" in error
    train(*run)


def test_cached_features_without_frozen_layers_are_rejected(tmp_path: Path) -> None:
    run = ("experiment=quickstart", "augmentation=none", "debug=fast", "phases=end_to_end")
    error = train(*run, "phases.all.features=cached", f"output_dir={tmp_path / 'run'}", code=WRONG_INPUT).stderr
    assert "phases.all.features=cached: " in error


@pytest.mark.timeout(1800)
def test_with_litert_a_killed_run_and_one_on_two_devices_have_the_same_bits(tmp_path: Path) -> None:
    """Frozen layers by LiteRT on augmented images, in both phases."""
    calm, killed, divided = (tmp_path / name for name in ("calm", "killed", "divided"))
    run = (*SMALL, "augmentation=light", LITERT, "training.virtual_replicas=2", "export.formats=[]")
    output = train(*run, f"output_dir={calm}").stdout
    for phase in ("head", "fine_tune"):
        assert f"frozen layers of phase {phase}: LiteRT, as configured" in output
    assert json.loads((calm / "run.json").read_text())["engines"] == {"head": "litert", "fine_tune": "litert"}
    for text in ("step 4/", "step 16/"):  # within the first and the second phase
        kill_at(text, *run, f"output_dir={killed}")
    train(*run, f"output_dir={killed}")
    assert_same_run(calm, killed)
    train(*run, "runtime.replicas=2", f"output_dir={divided}")
    assert_same_weights(calm, divided)
