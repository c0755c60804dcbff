"""The loop in fast motion: log, drift, retraining, comparison and promotion, with one run cut off and one refused."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.e2e.running import ROOT
from tests.promote.runs import read_graphs
from tests.serving.running import Clients, Served
from tests.storage.emulator import running
from tests.waiting import wait_until
from trainer.errors import DONE, INTERRUPTED, NOT_PROMOTED
from trainer.promote.promotion import read_manifest
from trainer.storage.path import storage_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MODELS, PREDICTIONS, RUNS = "gs://bucket/models/digits", "gs://bucket/predictions", "gs://bucket/runs/nightly"
CLASSES = 3
SPLITS = {"train": 30, "validation": 10, "test": 30}  # images per class
TRAINING = (
    "experiment=quickstart", "data=image_folder", "training.batch_size=16",
    "phases.fine_tune.epochs=1", "phases.fine_tune.thaw=from_block:block_13", "runtime.checkpoint_every='4 steps'",
    "export.formats=[saved_model]",
)  # fmt: skip

SHORT, LONG = ("phases.head.epochs=2",), ("phases.head.epochs=20", "phases.head.optimizer.learning_rate=0.02")


def encode(pixels: np.ndarray) -> bytes:
    """A PNG of 32 x 32 pixels of a digit [8, 8] in 0..16."""
    out = BytesIO()
    Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32)).convert("RGB").save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def digits() -> dict[str, list[list[np.ndarray]]]:
    """Digits [8, 8] by split and class; `stream` has what no split has."""
    images, labels = load_digits(return_X_y=True)
    shuffled = np.random.default_rng(0).permutation(len(labels))  # they are ordered by writer, which is a drift
    images, labels = images[shuffled], labels[shuffled]
    by_class = [images[labels == label].reshape(-1, 8, 8) for label in range(CLASSES)]
    ends = dict(zip([*SPLITS, "stream"], np.cumsum([*SPLITS.values(), 60]), strict=True))
    return {
        split: [list(rows[end - (SPLITS | {"stream": 60})[split] : end]) for rows in by_class]
        for split, end in ends.items()
    }


def write_photos(root: Path, digits: dict[str, list[list[np.ndarray]]], mislabelled: tuple[str, ...] = ()) -> None:
    """Write the folders of splits and classes; in a mislabelled split each class has the images of the next one."""
    for split in SPLITS:
        for label in range(CLASSES):
            folder = root / split / f"digit_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for index, pixels in enumerate(digits[split][(label + (split in mislabelled)) % CLASSES]):
                (folder / f"{index:03d}.png").write_bytes(encode(pixels))


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[None]:
    with running(tmp_path / "objects"):
        yield


def start_night(photos: Path, day: str, cache: Path, overrides: tuple[str, ...] = SHORT) -> subprocess.Popen[str]:
    """Start `trainer.nightly` at 2:00 of a day, as the pod of a CronJob does."""
    command = [
        sys.executable, "-m", "trainer.nightly", f"to={MODELS}", f"log={PREDICTIONS}", f"runs={RUNS}",
        f"now={day}T02:00", *TRAINING, f"data.root={photos}", f"runtime.cache_dir={cache}", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), "JOB_UID": "nightly"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run_night(photos: Path, day: str, cache: Path, code: int, overrides: tuple[str, ...] = SHORT) -> str:
    process = start_night(photos, day, cache, overrides)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output
    return output


def record_of(day: str) -> dict[str, Any]:
    return dict(json.loads((storage_path(RUNS) / f"nights/{day}.json").read()))


def send(served: Served, rows: list[list[np.ndarray]]) -> int:
    """Send a stream of digits to the server, and wait until its log has all of them; return their number."""
    before = len(read_rows())
    images = [encode(pixels) for pixels in (row for each in zip(*rows, strict=True) for row in each)]
    for index, image in enumerate(images):
        response = served.client.post("/predict", files={"file": (f"{index}.png", image)})
        assert response.status_code == 200
    wait_until(lambda: len(read_rows()) >= before + len(images), lambda: f"{len(read_rows())} rows are logged")
    return len(images)


def read_rows() -> list[dict[str, Any]]:
    texts = (info.path.read_text() for info in storage_path(PREDICTIONS).list())
    return [json.loads(line) for text in texts for line in text.splitlines()]


def move_log_to(day: str) -> None:
    """Fast motion: what the server has logged since the last call was logged at noon of that day."""
    log = storage_path(PREDICTIONS)
    for info in log.list():
        folder = info.path.parent.name
        if folder > "2026-06":  # the real date; the nights of the test are earlier
            rows = [json.loads(line) | {"time": f"{day}T12:00:00Z"} for line in info.path.read_text().splitlines()]
            (log / day / info.path.name).write("".join(json.dumps(row) + "\n" for row in rows))
            info.path.delete()


@pytest.mark.usefixtures("bucket")
def test_the_loop_from_the_log_to_the_next_version(digits: dict[str, list[list[np.ndarray]]], tmp_path: Path) -> None:
    photos, cache, models = tmp_path / "photos", tmp_path / "cache", storage_path(MODELS)
    write_photos(photos, digits)
    noise = np.random.default_rng(1)  # of a worn camera
    noisy = [[np.clip(pixels + noise.normal(0, 8, (8, 8)), 0, 16) for pixels in rows] for rows in digits["stream"]]

    output = run_night(photos, "2026-03-01", cache, DONE)  # the first night has no version yet
    assert "training the first one" in output
    assert record_of("2026-03-01")["outcome"] == "promoted"
    assert list(read_graphs(models)) == ["1"]

    arguments = (f"model={MODELS}", "poll=0.3", f"log={PREDICTIONS}", "log_seconds=0.5", f"cache_dir={tmp_path}/served")
    with Served(*arguments) as served:
        served.ready()
        send(served, digits["stream"])
        move_log_to("2026-03-01")
        output = run_night(photos, "2026-03-02", cache, DONE)
        assert re.search("verdict: (stable|moderate)", output)
        assert record_of("2026-03-02")["outcome"] == "stable"
        assert not (storage_path(RUNS) / "2026-03-02").is_folder()

        send(served, noisy)
        move_log_to("2026-03-02")
        process, output = start_night(photos, "2026-03-03", cache), ""
        for line in process.stdout or ():
            output += line
            if "epoch 1 done" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait() == INTERRUPTED, output
        assert "verdict: shifted" in output
        assert f"training from the weights of {RUNS}/2026-03-01" in output
        assert record_of("2026-03-03")["outcome"] is None
        assert list(read_graphs(models)) == ["1"]

        clients = Clients(served, 2)
        output = run_night(photos, "2026-03-04", cache, DONE)
        assert f"continuing {RUNS}/2026-03-03" in output
        assert "weights: this run's checkpoint at step " in output
        assert "verdict" not in output  # the decision was that of the night when the run began
        served.wait_for("serving version 2 .* instead of version 1")
        wait_until(lambda: "2" in clients.versions[-4:], process=served.process)
        clients.stop()
        assert clients.codes.keys() == {200}
        assert record_of("2026-03-03") | {"reason": ""} == {
            "day": "2026-03-03", "warm_start": f"{RUNS}/2026-03-01", "levels": record_of("2026-03-03")["levels"],
            "outcome": "promoted", "reason": "", "version": 2,
        }  # fmt: skip
        assert read_manifest(models / "2")["run"] == f"{RUNS}/2026-03-03"
        assert not (storage_path(RUNS) / "2026-03-04").is_folder()
        assert "finished already: promoted" in run_night(photos, "2026-03-03", cache, DONE)  # a second start of a day

        send(served, noisy)
        move_log_to("2026-03-04")
        write_photos(photos, digits, mislabelled=("train", "validation"))
        output = run_night(photos, "2026-03-05", cache, NOT_PROMOTED, LONG)  # long enough to learn the wrong labels
        assert re.search(rf"refused: run={RUNS}/2026-03-05: is worse than version 2 on 90 held-out examples", output)
        assert record_of("2026-03-05")["outcome"] == "refused"
        assert list(read_graphs(models)) == ["1", "2"]
        assert send(served, digits["stream"]) == len(digits["stream"]) * 60
        assert served.client.get("/v1/models/kubetune").json()["model_version_status"][0]["version"] == "2"
        assert served.metrics()["kubetune_serving_log_dropped_total"] == 0
        served.send()
        assert served.exit_code() == 0, served.output
    assert "Traceback" not in served.output
