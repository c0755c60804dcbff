"""Exports load back in and answer as the model did, from pixels and from the bytes of files."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from tests.exporting.subjects import NAMES, SIZE, largest_difference, said_by, small_model, some_images, subject_for
from trainer.data.decoding import decode_image
from trainer.evaluation.drift import Window, measures, verdict
from trainer.exporting.model_card import write_labels
from trainer.exporting.saved_model import WARMUP, export_saved_model


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return small_model()


@pytest.fixture(scope="module")
def folder(model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export" / "saved_model" / "1"
    export_saved_model(subject_for(model, "crop"), folder)
    return folder


def test_pixels_get_the_same_answers_back(model: keras.Model, folder: Path) -> None:
    images = some_images(40)  # more than one batch, the last one short
    expected = model.predict(images.astype("float32"), verbose=0)
    assert np.ptp(expected, axis=0).max() > 0.1
    assert largest_difference(folder, expected, images) <= 1e-5
    wrong = expected.copy()
    wrong[39, 1] += 0.25
    assert largest_difference(folder, wrong, images) == pytest.approx(0.25, abs=1e-5)


def test_bytes_are_decoded_and_resized_as_in_evaluation(model: keras.Model, folder: Path) -> None:
    served = tf.saved_model.load(str(folder))
    wide = np.random.default_rng(1).integers(0, 256, (50, 90, 3)).astype("uint8")
    files = [
        tf.io.encode_jpeg(wide).numpy(),
        tf.io.encode_png(wide).numpy(),
        tf.io.encode_png(wide[:, :, :1]).numpy(),
        tf.io.encode_png(some_images(1)[0]).numpy(),
    ]
    pixels = np.stack([decode_image(tf.constant(data), SIZE, "crop").numpy() for data in files]).astype("float32")
    answers = served.signatures["image_bytes"](image_bytes=tf.constant(files))["probabilities"]
    np.testing.assert_allclose(answers, model.predict(pixels, verbose=0), atol=1e-6)
    np.testing.assert_allclose(
        answers, served.signatures["images"](images=tf.constant(pixels))["probabilities"], atol=1e-6
    )
    stretched = decode_image(tf.constant(files[0]), SIZE, "stretch").numpy()
    assert np.abs(stretched - pixels[0]).max() > 1  # so that the test would notice the other way of resizing


def test_signatures_say_names_shapes_and_types(folder: Path) -> None:
    signatures = tf.saved_model.load(str(folder)).signatures
    assert set(signatures) == {"serving_default", "image_bytes", "images", "explain"}
    for name, field, shape, dtype in (
        ("serving_default", "image_bytes", [None], tf.string),
        ("image_bytes", "image_bytes", [None], tf.string),
        ("images", "images", [None, SIZE, SIZE, 3], tf.float32),
        ("explain", "image_bytes", [None], tf.string),
    ):
        (given,) = signatures[name].structured_input_signature[1].values()
        assert (given.name, given.shape.as_list(), given.dtype) == (field, shape, dtype)
        answer = signatures[name].structured_outputs["probabilities"]
        assert (answer.shape.as_list(), answer.dtype) == ([None, 3], tf.float32)


def test_class_names_travel_as_an_asset_that_survives_a_move(folder: Path, tmp_path: Path) -> None:
    moved = (tmp_path / "elsewhere").resolve()
    moved.mkdir()
    tf.io.gfile.mkdir(str(moved / "assets"))
    for file in folder.rglob("*"):
        if file.is_file():
            (moved / file.relative_to(folder)).parent.mkdir(exist_ok=True)
            (moved / file.relative_to(folder)).write_bytes(file.read_bytes())
    loaded = tf.saved_model.load(str(moved))
    reference = json.loads(Path(loaded.reference.asset_path.numpy().decode()).read_text("utf-8"))
    assert (reference["classes"], reference["n"], reference["resize"]) == (list(NAMES), 40, "crop")
    path = loaded.labels.asset_path.numpy().decode()
    assert path == str(moved / "assets" / "labels.txt")
    assert Path(path).read_text("utf-8").splitlines() == ["daisy", "löwenzahn", "rose red"]


def test_an_export_replaces_what_was_there_and_leaves_nothing_beside(model: keras.Model, tmp_path: Path) -> None:
    folder = tmp_path / "saved_model" / "1"
    folder.mkdir(parents=True)
    (folder / "old").write_text("")
    export_saved_model(subject_for(model), folder)
    assert not (folder / "old").exists()
    assert [x.name for x in folder.parent.iterdir()] == ["1"]


def test_the_warm_up_requests_are_what_a_client_of_tensorflow_serving_would_send(folder: Path) -> None:
    """Parsed by TensorFlow Serving's own messages, and each sent to the signature that it names."""
    signatures = tf.saved_model.load(str(folder)).signatures
    asked = set()
    for record in tf.data.TFRecordDataset(str(folder / WARMUP)).as_numpy_iterator():
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        given = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        answer = signatures[request.model_spec.signature_name](**given)["probabilities"]
        np.testing.assert_allclose(answer.numpy().sum(1), 1, atol=1e-5)
        asked.add((request.model_spec.signature_name, len(answer)))
    assert asked == {(s, n) for s in ("serving_default", "image_bytes", "explain") for n in (1, 4)} | {("images", 1)}


def test_the_reference_is_what_the_model_says_of_its_own_examples(model: keras.Model, folder: Path) -> None:
    images = some_images(40)
    reference = json.loads((folder / "assets" / "reference.json").read_text())
    predictions = said_by(model, images).argmax(-1)
    np.testing.assert_allclose(reference["class_frequencies"], np.bincount(predictions, minlength=3) / 40)
    assert sum(reference["confidence_histogram"]["counts"]) == 40
    served, window = tf.saved_model.load(str(folder)), Window(3)
    files = tf.constant([tf.io.encode_png(image).numpy() for image in images])
    told = served.signatures["explain"](image_bytes=files)
    for row, vector in zip(told["probabilities"].numpy(), told["embedding"].numpy(), strict=True):
        window.add(int(row.argmax()), float(row.max()), vector)
    found = measures(reference, window)
    assert verdict(found) == "stable"
    assert max(measure.value for measure in found) < 1e-3


def test_labels_are_one_a_line(tmp_path: Path) -> None:
    write_labels(tmp_path / "export" / "labels.txt", NAMES)
    assert (tmp_path / "export" / "labels.txt").read_bytes() == "daisy\nlöwenzahn\nrose red\n".encode()
