"""Exports of whole runs: at the end or later, verified, refused, and used for drift."""

import json
import re
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_sample_images

from tests.e2e.running import SMALL, kill_at, program, train, without_timing
from tests.e2e.workers import start_workers
from tests.storage.emulator import running
from trainer.config.schema import ExportFormat
from trainer.data.decoding import decode_image
from trainer.exporting.export import open_images
from trainer.exporting.formats import MAX_UNCONVERTED_EXAMPLES
from trainer.exporting.verify import load_export
from trainer.models.grad_cam import explain_features
from trainer.runs.stored_run import find_run, load_checkpoint, open_classifier
from trainer.storage.arrays import pack
from trainer.storage.path import storage_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ALL = tuple(ExportFormat.__args__)  # type: ignore[attr-defined]
LAST = ("report", "export")  # folders that a run publishes at its end
NEAR = {"tflite_float16": 0.02, "tflite_dynamic": 0.1, "tflite_int8": 0.2}
TRAINED = (  # to an accuracy that quantization can reduce
    "experiment=quickstart", "debug.max_examples=300", "~phases.fine_tune", "phases.head.epochs=12",
)  # fmt: skip


def facts_of(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "report" / "report.json").read_text())["export"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(*TRAINED, f"export.formats=[{','.join(ALL)}]", "export.max_accuracy_drop=0.02", f"output_dir={folder}")
    return folder


def test_every_format_of_a_trained_run_is_scored(trained: Path) -> None:
    facts = facts_of(trained)
    card = (trained / "export" / "model_card.md").read_text()
    assert tuple(facts) == ALL
    for name, export in facts.items():
        assert export["trainer_accuracy"] >= 0.8, "too low to measure a loss of accuracy"  # type: ignore[operator]
        assert export["largest_difference"] <= NEAR.get(name, 1e-4), name  # type: ignore[operator]
        assert export["accuracy"] >= export["trainer_accuracy"] - 0.02, name  # type: ignore[operator]
        num_examples = MAX_UNCONVERTED_EXAMPLES if name == "saved_model" else 300
        assert (export["examples"], export["refused"]) == (num_examples, False)
        assert (trained / str(export["path"])).exists()
        assert f"| `{name}` | " in card


def test_explanations_of_the_saved_model_are_those_of_the_trainer(trained: Path) -> None:
    run_ = find_run(str(trained))
    classifier = open_classifier(run_, load_checkpoint(run_, "best"))
    digits = np.random.default_rng(1).integers(0, 256, (4, 60, 40, 3)).astype("uint8")
    files = [tf.io.encode_png(image).numpy() for image in digits]
    size = classifier.image_size
    pixels = np.stack([decode_image(tf.constant(file), size, "stretch").numpy() for file in files])
    served = tf.saved_model.load(str(trained / "export" / "saved_model" / "1"))
    inside = served.signatures["explain"](image_bytes=tf.constant(files))
    outside = explain_features(classifier, classifier.features(pixels))
    assert inside.keys() == outside.keys() == {"probabilities", "embedding", "heatmap"}
    for name, expected in outside.items():
        np.testing.assert_allclose(inside[name], expected, atol=1e-4, err_msg=name)
    assert outside["heatmap"].numpy().max() == 1


def test_a_finished_run_is_exported_again_in_other_formats(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(*SMALL, f"output_dir={folder}")
    before = (folder / "export" / "saved_model" / "1" / "saved_model.pb").stat().st_mtime_ns
    reference = json.loads((folder / "export" / "reference.json").read_text())
    program("export", f"run={folder}", "formats=[keras,tflite]")
    facts = facts_of(folder)
    assert list(facts) == ["saved_model", "keras", "tflite"]
    assert facts["keras"]["largest_difference"] <= 1e-4  # type: ignore[operator]
    assert facts["keras"]["trainer_accuracy"] == facts["tflite"]["trainer_accuracy"]
    assert (folder / "export" / "saved_model" / "1" / "saved_model.pb").stat().st_mtime_ns == before
    assert "| `keras` | " in (folder / "export" / "model_card.md").read_text()
    # The same weights as the export of the run itself, averaged ones included.
    again = json.loads((folder / "export" / "reference.json").read_text())
    assert again["class_frequencies"] == reference["class_frequencies"]
    assert again["embedding"]["n"] == reference["embedding"]["n"]
    side = again["image_size"]
    images = np.random.default_rng(0).integers(0, 256, (5, side, side, 3)).astype("uint8")
    one, other = (load_export(folder / "export" / name)(images) for name in ("saved_model/1", "model.keras"))
    np.testing.assert_allclose(one, other, atol=1e-5)
    # Another checkpoint needs another folder.
    error = program("export", f"run={folder}", "checkpoint=last", code=2).stderr
    assert "checkpoint=last" in error
    assert "output=" in error
    program("export", f"run={folder}", "checkpoint=last", "formats=tflite", f"output={tmp_path / 'last'}")
    names = {path.name for path in (tmp_path / "last").iterdir()}
    assert names == {"model.tflite", "labels.txt", "reference.json", "export.json"}


def test_a_kill_in_the_export_leaves_the_same_files(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    quick = [o for o in SMALL if "formats" not in o] + ["export.formats=[tflite,keras]", "debug.max_steps=2"]
    train(*quick, f"output_dir={calm}")
    kill_at("exporting", *quick, f"output_dir={killed}")
    assert not (killed / "DONE").exists()
    (killed / "export").mkdir(exist_ok=True)
    (killed / "export" / ".keras-left").mkdir()  # a temporary folder of the killed export
    train(*quick, f"output_dir={killed}")
    assert without_timing(facts_of(killed)) == without_timing(facts_of(calm))
    assert {p.name for p in (killed / "export").iterdir()} == {p.name for p in (calm / "export").iterdir()}
    for name in ("model.tflite", "reference.json", "labels.txt"):
        assert (killed / "export" / name).read_bytes() == (calm / "export" / name).read_bytes(), name


def test_a_run_in_bfloat16_whose_batch_normalization_trains_is_exported(tmp_path: Path) -> None:
    """A SavedModel contains the trainer's functions, so it rounds as the trainer."""
    folder = tmp_path / "run"
    result = train(
        "experiment=quickstart", "debug.max_examples=120", "runtime.precision=bfloat16",
        "phases.head.epochs=4", "phases.fine_tune={thaw: all, epochs: 3, batch_norm: train}",
        "export.formats=[saved_model,tflite]", "export.max_accuracy_drop=0", f"output_dir={folder}",
    )  # fmt: skip
    facts = facts_of(folder)
    assert (folder / "DONE").exists()
    for name, file in (("saved_model", "saved_model/1"), ("tflite", "model.tflite")):
        assert not facts[name]["refused"]
        is_worse = facts[name]["lost"] > facts[name]["gained"]  # type: ignore[operator]
        assert (f"warning: {file} predicts {facts[name]['lost']} examples worse" in result.stderr) is is_worse
    assert max(facts[name]["largest_difference"] for name in ("tflite", "saved_model")) < 1e-3  # type: ignore[type-var]


def move_logits(checkpoint: Path, by: float) -> None:
    """Add a constant to every logit: equal probabilities, but 8 bits over the new range cannot represent them."""
    with np.load(checkpoint / "variables.npz") as arrays:
        values = {name: arrays[name] for name in arrays.files}
    values["head/output/bias"] = values["head/output/bias"] + np.float32(by)
    content = pack(values)
    (checkpoint / "variables.npz").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["variables.npz"] = {"bytes": len(content), "crc32c": f"{google_crc32c.value(content):08x}"}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def with_large_logits(trained: Path, out: Path) -> Path:
    """Copy a run without DONE, with logits that 8 bits cannot represent."""
    shutil.copytree(trained, out)
    (out / "DONE").unlink()
    for checkpoint in (out / "checkpoints").glob("step-*"):
        move_logits(checkpoint, 5000)
    return out


def test_an_export_that_lost_accuracy_ends_the_run_with_2_and_the_others_stay(trained: Path, tmp_path: Path) -> None:
    out = with_large_logits(trained, tmp_path / "run")
    again = (*TRAINED, "export.formats=[tflite_int8,tflite]", f"output_dir={out}")
    result = train(*again, code=2)
    assert re.search(r"error: .*tflite_int8.*0\.", result.stderr)
    assert "fully_quantize" not in result.stderr
    assert "export/model_int8.tflite" in result.stdout
    assert f"{out}/report/index.html" in result.stdout
    assert facts_of(out)["tflite_int8"]["refused"]
    assert (out / "export" / "model.tflite").exists()
    assert (out / "report" / "index.html").exists()
    assert not (out / "export" / "model_int8.tflite").exists()
    assert not (out / "DONE").exists()
    assert "tflite_int8" in (out / "export" / "model_card.md").read_text()
    train(*again, "export.max_accuracy_drop=1")
    assert (out / "export" / "model_int8.tflite").exists()
    assert (out / "DONE").exists()


def test_two_workers_with_a_bucket_end_with_2_and_publish_the_rest(trained: Path, tmp_path: Path) -> None:
    with running(tmp_path / "objects"):
        there, out = storage_path("gs://bucket/runs/1"), with_large_logits(trained, tmp_path / "run")
        for file in out.rglob("*"):
            if file.is_file() and not file.name.startswith(".") and file.relative_to(out).parts[0] not in LAST:
                storage_path(f"{there}/{file.relative_to(out)}").upload(file)
        steps = sorted((folder.name for folder in (out / "checkpoints").glob("step-*")), reverse=True)
        (out / "LATEST").write_text("\n".join(steps) + "\n")  # in a bucket it lists all checkpoints
        (there / "checkpoints" / "LATEST").upload(out / "LATEST")

        again = (*TRAINED, "export.formats=[tflite_int8,tflite]", f"output_dir={there}")
        own = {i: [f"runtime.cache_dir={tmp_path}/cache-{i}"] for i in range(2)}
        workers = start_workers(tmp_path / "workers", 2, *again, own=own)
        assert workers.wait() == [2, 2], workers.output(0) + workers.output(1)
        for index in range(2):
            assert re.search("(error|worker).*tflite_int8", workers.output(index))
        published = {str(info.path).removeprefix(f"{there}/") for info in there.list()}
        assert {"export/model.tflite", "export/model_card.md", "report/index.html", "report/report.json"} <= published
        assert not {"export/model_int8.tflite", "DONE"} & published

        raised = start_workers(tmp_path / "raised", 1, *again, "export.max_accuracy_drop=1", own=own)
        assert raised.wait() == [0], raised.output(0)
        assert (there / "export" / "model_int8.tflite").exists()
        assert (there / "DONE").exists()


def crops_of_photos(count: int, size: int) -> np.ndarray:
    """Another dataset: crops of the two photos of scikit-learn."""
    photos, draw = load_sample_images().images, np.random.default_rng(0)
    tops, lefts = (draw.integers(0, most - size, count) for most in photos[0].shape[:2])
    return np.stack(
        [photos[i % 2][t : t + size, c : c + size] for i, (t, c) in enumerate(zip(tops, lefts, strict=True))]
    )


def test_darker_digits_and_another_dataset_drift_and_held_out_digits_do_not(trained: Path, tmp_path: Path) -> None:
    """The reference is of the test split; the log has the validation digits, changed or not."""
    served = tf.saved_model.load(str(trained / "export" / "saved_model" / "1"))
    reference = json.loads((trained / "export" / "reference.json").read_text())
    projection = np.array(reference["embedding"]["projection"])
    images = open_images(find_run(str(trained)), reference["image_size"]).read_images("validation", np.arange(180))

    def log(name: str, requests: np.ndarray) -> Path:
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as file:
            for i in range(0, len(requests), 50):
                files = tf.constant([tf.io.encode_png(image).numpy() for image in requests[i : i + 50]])
                explained = served.signatures["explain"](image_bytes=files)
                for row, vector in zip(explained["probabilities"].numpy(), explained["embedding"].numpy(), strict=True):
                    line = {"class": reference["classes"][row.argmax()], "confidence": float(row.max())}
                    file.write(json.dumps(line | {"embedding": (vector @ projection).tolist()}) + "\n")
        return path

    darker, photos = (images * 0.1).astype("uint8"), crops_of_photos(180, images.shape[1])
    for name, requests, code in (("held-out", images, 0), ("darker", darker, 4), ("photos", photos, 4)):
        arguments = (f"reference={trained}", f"log={log(name, requests)}", f"output={tmp_path / name}.png")
        program("drift", *arguments, code=code)
