"""Exports of whole runs by the command line: made at the end or later, scored, refused, and judged for drift."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_sample_images

from tests.e2e.running import ROOT, SMALL, run, start, without_timing
from tests.e2e.workers import start_workers
from tests.storage.emulator import running
from trainer.arrays import pack
from trainer.config.schema import ExportFormat
from trainer.data.decoding import decode_image
from trainer.exporting.export import open_images
from trainer.exporting.verify import load_export
from trainer.models.grad_cam import explain
from trainer.runs.finished_run import find_run, load_checkpoint, open_classifier
from trainer.storage.path import storage_path

ALL = tuple(ExportFormat.__args__)  # type: ignore[attr-defined]
LAST = ("report", "export")  # folders that a run publishes at its end
NEAR = {"tflite_float16": 0.02, "tflite_dynamic": 0.1, "tflite_int8": 0.2}
TRAINED = (  # well enough that 8 bits have something to lose
    "experiment=quickstart", "debug.max_examples=300", "~phases.fine_tune", "phases.head.epochs=12",
)  # fmt: skip


def verb(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m trainer.NAME` to its end."""
    command = [sys.executable, "-m", f"trainer.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def facts_of(folder: Path) -> dict[str, dict[str, object]]:
    facts: dict[str, dict[str, object]] = json.loads((folder / "report" / "report.json").read_text())["export"]
    return facts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    result = run(*TRAINED, f"export.formats=[{','.join(ALL)}]", "export.max_accuracy_drop=0.02", f"output_dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_format_of_a_trained_run_is_scored(trained: Path) -> None:
    facts = facts_of(trained)
    card = (trained / "export" / "model_card.md").read_text()
    assert tuple(facts) == ALL
    for name, told in facts.items():
        assert told["trainer_accuracy"] >= 0.8, "nothing was learned, so nothing could be lost"  # type: ignore[operator]
        assert told["largest_difference"] <= NEAR.get(name, 1e-4), name  # type: ignore[operator]
        assert told["accuracy"] >= told["trainer_accuracy"] - 0.02, name  # type: ignore[operator]
        assert (told["examples"], told["refused"]) == (300, False)
        assert (trained / str(told["path"])).exists()
        assert f"| `{name}` | " in card


@pytest.mark.slow
def test_explanations_are_the_same_inside_and_outside(trained: Path) -> None:
    run_ = find_run(str(trained))
    classifier = open_classifier(run_, load_checkpoint(run_, "best"))
    digits = np.random.default_rng(1).integers(0, 256, (4, 60, 40, 3)).astype("uint8")
    files = [tf.io.encode_png(image).numpy() for image in digits]
    size = classifier.image_size
    pixels = np.stack([decode_image(tf.constant(file), size, "stretch").numpy() for file in files])
    served = tf.saved_model.load(str(trained / "export" / "saved_model" / "1"))
    inside = served.signatures["explain"](image_bytes=tf.constant(files))
    outside = explain(classifier, pixels)
    assert inside.keys() == outside.keys() == {"probabilities", "embedding", "heatmap"}
    for name, expected in outside.items():
        np.testing.assert_allclose(inside[name], expected, atol=1e-4, err_msg=name)
    assert outside["heatmap"].numpy().max() == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_finished_run_is_exported_again_in_other_formats(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(*SMALL, f"output_dir={folder}").returncode == 0
    before = (folder / "export" / "saved_model" / "1" / "saved_model.pb").stat().st_mtime_ns
    reference = json.loads((folder / "export" / "reference.json").read_text())
    told = verb("export", f"run={folder}", "formats=[keras,tflite]")
    assert told.returncode == 0, told.stderr
    facts = facts_of(folder)
    assert list(facts) == ["saved_model", "keras", "tflite"]
    assert facts["keras"]["largest_difference"] <= 1e-4  # type: ignore[operator]
    assert facts["keras"]["trainer_accuracy"] == facts["saved_model"]["trainer_accuracy"]
    assert (folder / "export" / "saved_model" / "1" / "saved_model.pb").stat().st_mtime_ns == before
    assert "| `keras` | " in (folder / "export" / "model_card.md").read_text()
    # The same weights as the export of the run itself, averages and all.
    again = json.loads((folder / "export" / "reference.json").read_text())
    assert again["class_frequencies"] == reference["class_frequencies"]
    assert again["embedding"]["n"] == reference["embedding"]["n"]
    side = again["image_size"]
    images = np.random.default_rng(0).integers(0, 256, (5, side, side, 3)).astype("uint8")
    one, other = (load_export(folder / "export" / name)(images) for name in ("saved_model/1", "model.keras"))
    np.testing.assert_allclose(one, other, atol=1e-5)
    # Another checkpoint goes elsewhere.
    refused = verb("export", f"run={folder}", "checkpoint=last")
    assert refused.returncode == 2
    assert "checkpoint=last is not what the run exported (best): give output=FOLDER" in refused.stderr
    last = verb("export", f"run={folder}", "checkpoint=last", "formats=tflite", f"output={tmp_path / 'last'}")
    assert last.returncode == 0, last.stderr
    names = {path.name for path in (tmp_path / "last").iterdir()}
    assert names == {"model.tflite", "labels.txt", "reference.json", "export.json"}


@pytest.mark.slow
def test_a_kill_in_the_export_leaves_the_same_files(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    quick = [o for o in SMALL if "formats" not in o] + ["export.formats=[tflite,keras]", "debug.max_steps=2"]
    assert run(*quick, f"output_dir={calm}").returncode == 0
    child = start(*quick, f"output_dir={killed}")
    assert child.stdout is not None
    assert any("exporting" in line for line in child.stdout)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not (killed / "DONE").exists()
    (killed / "export").mkdir(exist_ok=True)
    (killed / "export" / ".keras-left").mkdir()  # whatever it was at
    assert run(*quick, f"output_dir={killed}").returncode == 0
    assert without_timing(facts_of(killed)) == without_timing(facts_of(calm))
    assert {p.name for p in (killed / "export").iterdir()} == {p.name for p in (calm / "export").iterdir()}
    for name in ("model.tflite", "reference.json", "labels.txt"):
        assert (killed / "export" / name).read_bytes() == (calm / "export" / name).read_bytes(), name


def move_logits(checkpoint: Path, by: float) -> None:
    """Add to every logit: the same answers, but 256 steps from 0 to there cannot tell them apart."""
    with np.load(checkpoint / "variables.npz") as arrays:
        values = {name: arrays[name] for name in arrays.files}
    values["head/output/bias"] = values["head/output/bias"] + np.float32(by)
    content = pack(values)
    (checkpoint / "variables.npz").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["variables.npz"] = {"bytes": len(content), "crc32c": f"{google_crc32c.value(content):08x}"}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def spoilt(trained: Path, out: Path) -> Path:
    """The run once more, before its end and with logits that 8 bits cannot hold."""
    shutil.copytree(trained, out)
    (out / "DONE").unlink()
    for checkpoint in (out / "checkpoints").glob("step-*"):
        move_logits(checkpoint, 5000)
    return out


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_file_that_lost_its_accuracy_ends_the_run_with_2_and_the_rest_stays(trained: Path, tmp_path: Path) -> None:
    out = spoilt(trained, tmp_path / "run")
    again = (*TRAINED, "export.formats=[tflite_int8,tflite]", f"output_dir={out}")
    result = run(*again)
    assert result.returncode == 2, result.stderr
    assert "error: too much accuracy is lost in tflite_int8 (0." in result.stderr
    assert "fully_quantize" not in result.stderr
    assert "export/model_int8.tflite  (" in result.stdout
    assert " MB; not kept: accuracy 0." in result.stdout
    assert f"  report   {out}/report/index.html" in result.stdout
    assert facts_of(out)["tflite_int8"]["refused"]
    assert (out / "export" / "model.tflite").exists()
    assert (out / "report" / "index.html").exists()
    assert not (out / "export" / "model_int8.tflite").exists()
    assert not (out / "DONE").exists()
    assert "not kept" in (out / "export" / "model_card.md").read_text()
    raised = run(*again, "export.max_accuracy_drop=1")
    assert raised.returncode == 0, raised.stderr
    assert (out / "export" / "model_int8.tflite").exists()
    assert (out / "DONE").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_workers_with_a_bucket_end_with_2_and_publish_the_rest(trained: Path, tmp_path: Path) -> None:
    with running(tmp_path / "objects"):
        there, out = storage_path("gs://bucket/runs/1"), spoilt(trained, tmp_path / "run")
        for file in out.rglob("*"):
            if file.is_file() and not file.name.startswith(".") and file.relative_to(out).parts[0] not in LAST:
                storage_path(f"{there}/{file.relative_to(out)}").upload(file)
        steps = sorted((folder.name for folder in (out / "checkpoints").glob("step-*")), reverse=True)
        (out / "LATEST").write_text("\n".join(steps) + "\n")  # a bucket's names all that count
        (there / "checkpoints" / "LATEST").upload(out / "LATEST")

        again = (*TRAINED, "export.formats=[tflite_int8,tflite]", f"output_dir={there}")
        own = {i: [f"runtime.cache_dir={tmp_path}/cache-{i}"] for i in range(2)}
        workers = start_workers(tmp_path / "workers", 2, *again, own=own)
        assert workers.wait() == [2, 2], workers.said(0) + workers.said(1)
        assert "error: too much accuracy is lost in tflite_int8 (0." in workers.said(0)
        assert "too much accuracy is lost in tflite_int8 (0." in workers.said(1)
        held = {str(entry.path).removeprefix(f"{there}/") for entry in there.list()}
        assert {"export/model.tflite", "export/model_card.md", "report/index.html", "report/report.json"} <= held
        assert not {"export/model_int8.tflite", "DONE"} & held

        raised = start_workers(tmp_path / "raised", 1, *again, "export.max_accuracy_drop=1", own=own)
        assert raised.wait() == [0], raised.said(0)
        assert (there / "export" / "model_int8.tflite").exists()
        assert (there / "DONE").exists()


def crops_of_photos(count: int, size: int) -> np.ndarray:
    """Another dataset: pieces of the two photos that come with scikit-learn."""
    photos, draw = load_sample_images().images, np.random.default_rng(0)
    tops, lefts = (draw.integers(0, most - size, count) for most in photos[0].shape[:2])
    return np.stack(
        [photos[i % 2][t : t + size, c : c + size] for i, (t, c) in enumerate(zip(tops, lefts, strict=True))]
    )


@pytest.mark.slow
def test_darker_digits_and_another_dataset_drift_and_held_out_digits_do_not(trained: Path, tmp_path: Path) -> None:
    """The reference is of the test split; what is asked about are the validation digits, and changes of them."""
    served = tf.saved_model.load(str(trained / "export" / "saved_model" / "1"))
    reference = json.loads((trained / "export" / "reference.json").read_text())
    projection = np.array(reference["embedding"]["projection"])
    told = find_run(str(trained))
    images = open_images(told, reference["image_size"]).rows("validation", np.arange(180))

    def log(name: str, shown: np.ndarray) -> Path:
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as file:
            for at in range(0, len(shown), 50):
                files = tf.constant([tf.io.encode_png(image).numpy() for image in shown[at : at + 50]])
                answer = served.signatures["explain"](image_bytes=files)
                for row, vector in zip(answer["probabilities"].numpy(), answer["embedding"].numpy(), strict=True):
                    line = {"class": reference["classes"][row.argmax()], "confidence": float(row.max())}
                    file.write(json.dumps(line | {"embedding": (vector @ projection).tolist()}) + "\n")
        return path

    shifted = {
        "held-out": images,
        "darker": (images * 0.1).astype("uint8"),
        "photos": crops_of_photos(180, images.shape[1]),
    }
    codes = {}
    for name, shown in shifted.items():
        arguments = (f"reference={trained}", f"log={log(name, shown)}", f"output={tmp_path / name}.png")
        judged = verb("drift", *arguments)
        codes[name] = judged.returncode
    assert codes == {"held-out": 0, "darker": 4, "photos": 4}
