"""Weights from a folder in a bucket, without internet; a plan ends with the exit code of the run."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import keras
import pytest

from tests.e2e.running import program, train
from tests.storage.emulator import running
from trainer.errors import INTERRUPTED, WRONG_INPUT
from trainer.storage.path import storage_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("offline")]

FOLDER = "gs://bucket/weights"
FILES = [f"MobileNetV2_0.35_{size}.weights.h5" for size in (128, 160, 192, 224, 96)]
RUN = (
    "data=digits", "model=mobilenet_v2", "model.alpha=0.35", "model.image_size=96", "debug=fast", "phases=head_only",
    "export.formats=[]",
)  # fmt: skip


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The empty folder of Keras' downloads, a bucket, and no other network."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a closed port
    with running(tmp_path / "objects"):
        yield tmp_path / "keras" / "models"


def fill_cache(models: Path) -> keras.Model:
    """Write files of random weights, in the format of the published ones, to the folder of Keras' downloads."""
    models.mkdir(parents=True, exist_ok=True)
    network = keras.applications.MobileNetV2(weights=None, include_top=False, alpha=0.35, input_shape=(96, 96, 3))
    for size in (96, 128, 160, 192, 224):
        network.save(models / f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_{size}_no_top.h5")
    return network


def plan_and_train(tmp_path: Path, *arguments: str, code: int) -> tuple[str, str]:
    """Plan and run the same arguments, and check that both end with the same exit code; return what they print."""
    cache = f"runtime.cache_dir={tmp_path / 'cache'}"
    planned = program("plan", *arguments, cache, code=code)
    run = train(*arguments, cache, f"output_dir={tempfile.mkdtemp(dir=tmp_path)}", code=code)
    return planned.stdout + planned.stderr, run.stdout + run.stderr


def test_a_cluster_without_internet_trains_with_weights_from_a_bucket(offline: Path, tmp_path: Path) -> None:
    source = fill_cache(offline)
    prepare = ("prepare", "weights=[mobilenet_v2:0.35]", f"output={FOLDER}")
    assert f"{FOLDER} holds 5 files of weights; train with them: model.weights={FOLDER}" in program(*prepare).stdout
    written = {info.path.name: info.version for info in storage_path(FOLDER).list()}
    assert sorted(written) == FILES
    assert f"{FOLDER}/{FILES[-1]} exists" in program(*prepare).stdout
    assert {info.path.name: info.version for info in storage_path(FOLDER).list()} == written

    offline.rename(tmp_path / "elsewhere")
    planned, run = plan_and_train(tmp_path, *RUN, f"model.weights={FOLDER}/", code=0)
    assert f"weights ✓ {FOLDER}/{FILES[-1]}: " in " ".join(planned.split())
    assert f"{FOLDER}/{FILES[-1]}: fetching 1 file" in run
    again = train(*RUN, f"model.weights={FOLDER}", f"runtime.cache_dir={tmp_path / 'cache'}")
    assert f"{FOLDER}/{FILES[-1]}: all files are already in " in again.stdout
    # The network is chosen after the folder is copied.
    auto = (*RUN[:1], "model=auto", "model.image_size=96", *RUN[4:], f"model.weights={FOLDER}")
    error = train(*auto, f"runtime.cache_dir={tmp_path / 'cache'}", code=WRONG_INPUT).stderr
    assert f"model.weights={FOLDER}: is a folder without MobileNetV2_1_96.weights.h5" in error

    missing = plan_and_train(tmp_path, *RUN, f"model.weights={FOLDER}", "model.alpha=0.5", code=WRONG_INPUT)
    for text in missing:
        assert f"model.weights={FOLDER}: is a folder without MobileNetV2_0.5_96.weights.h5" in text
        assert f"python -m trainer.prepare weights=[MobileNetV2:0.5] output={FOLDER}" in text
    # Of the file alone, and of the folder for model=auto.
    copies = list((tmp_path / "cache" / "staged").rglob(FILES[-1]))
    assert copies
    network = keras.applications.MobileNetV2(weights=None, include_top=False, alpha=0.35, input_shape=(96, 96, 3))
    for file in copies:
        network.load_weights(file)
        for ours, theirs in zip(network.get_weights(), source.get_weights(), strict=True):
            assert (ours == theirs).all()


def test_what_cannot_be_downloaded_is_75_in_a_plan_too(offline: Path, tmp_path: Path) -> None:
    for text in plan_and_train(tmp_path, *RUN, code=INTERRUPTED):
        assert "the weights of MobileNetV2 could not be downloaded" in text
    fill_cache(offline)
    planned, _ = plan_and_train(tmp_path, *RUN, code=0)
    assert f"imagenet:{offline}" in "".join(planned.split())  # lines are folded
    error = program("prepare", "weights=[xception]", f"output={FOLDER}", code=INTERRUPTED).stderr
    assert "the weights of Xception could not be downloaded" in error


@pytest.mark.usefixtures("offline")
def test_a_dataset_that_cannot_be_downloaded_is_75_in_a_plan_too(tmp_path: Path) -> None:
    beans = ("data=tfds", "data.name=beans", "data.download=true", f"data.data_dir={tmp_path / 'tfds'}", *RUN[1:])
    for text in plan_and_train(tmp_path, *beans, "model.weights=none", code=INTERRUPTED):
        assert "TFDS cannot download it" in text


def test_a_finished_run_is_0_in_a_plan_too(offline: Path, tmp_path: Path) -> None:
    fill_cache(offline)
    arguments = (*RUN, f"output_dir={tmp_path / 'run'}")
    train(*arguments)
    offline.rename(tmp_path / "elsewhere")
    planned = program("plan", *arguments)
    assert "already finished" in planned.stdout
    assert "iftherunwereextended:model.weights=imagenet:" in "".join(planned.stdout.split())
    assert "finished" in train(*arguments).stdout


def test_prepare_rejects_other_keys_with_weights() -> None:
    error = program("prepare", "weights=[xception]", f"output={FOLDER}", "data=digits", "seed=3", code=WRONG_INPUT)
    assert "seed: is not read by trainer.prepare weights=..." in error.stderr
    error = program("prepare", "weights=[xception]", code=WRONG_INPUT)
    assert "output: is missing" in error.stderr
