"""A SavedModel predicts as the model, from pixels and from encoded files."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from tests.data.test_orientation import encode_photo
from tests.exporting.subjects import (
    SIZE,
    bundle_for,
    largest_difference,
    predictions_of,
    small_model,
    some_images,
)
from trainer.data.decoding import decode_image
from trainer.evaluation.drift import PredictionWindow, get_most_severe_level, measure_drift
from trainer.exporting.saved_model import WARMUP_FILE, export_saved_model


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return small_model()


@pytest.fixture(scope="module")
def folder(model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export" / "saved_model" / "1"
    export_saved_model(bundle_for(model, "crop"), folder)
    return folder


def test_predictions_from_pixels_are_equal(model: keras.Model, folder: Path) -> None:
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
    pngs = [tf.io.encode_png(image).numpy() for image in (wide, wide[:, :, :1], some_images(1)[0])]
    files = [tf.io.encode_jpeg(wide).numpy(), *pngs]
    pixels = np.stack([decode_image(tf.constant(data), SIZE, "crop").numpy() for data in files]).astype("float32")
    predicted = served.signatures["image_bytes"](image_bytes=tf.constant(files))["probabilities"]
    from_pixels = served.signatures["images"](images=tf.constant(pixels))["probabilities"]
    np.testing.assert_allclose(predicted, model.predict(pixels, verbose=0), atol=1e-6)
    np.testing.assert_allclose(predicted, from_pixels, atol=1e-6)
    stretched = decode_image(tf.constant(files[0]), SIZE, "stretch").numpy()
    assert np.abs(stretched - pixels[0]).max() > 1  # the test detects the other resizing


@pytest.mark.parametrize("orientation", ["exif", "ignore"])
def test_photos_are_turned_upright_as_in_training(model: keras.Model, tmp_path: Path, orientation: str) -> None:
    bundle = replace(bundle_for(model), orientation=orientation)  # type: ignore[arg-type]
    export_saved_model(bundle, tmp_path / "1")
    served = tf.saved_model.load(str(tmp_path / "1")).signatures
    wide = np.random.default_rng(1).integers(0, 256, (50, 90, 3)).astype("uint8")
    photos = [encode_photo(o, kind, wide) for o in (1, 3, 6) for kind in ("JPEG", "PNG", "WEBP")]
    decode = partial(decode_image, size=SIZE, resize="stretch", orientation=orientation)
    pixels = np.stack([decode(tf.constant(data)).numpy() for data in photos]).astype("float32")
    for name in ("image_bytes", "explain"):
        predicted = served[name](image_bytes=tf.constant(photos))["probabilities"]
        np.testing.assert_allclose(predicted, model.predict(pixels, verbose=0), atol=1e-6)
    assert np.abs(pixels[1] - pixels[7]).max() > 1 if orientation == "exif" else (pixels[1] == pixels[7]).all()


def test_names_shapes_and_types_of_the_signatures(folder: Path) -> None:
    signatures = tf.saved_model.load(str(folder)).signatures
    assert set(signatures) == {"serving_default", "image_bytes", "images", "explain"}
    encoded, pixels = ("image_bytes", [None], tf.string), ("images", [None, SIZE, SIZE, 3], tf.float32)
    for name, signature in signatures.items():
        (given,) = signature.structured_input_signature[1].values()
        assert (given.name, given.shape.as_list(), given.dtype) == (pixels if name == "images" else encoded)
        output = signature.structured_outputs["probabilities"]
        assert (output.shape.as_list(), output.dtype) == ([None, 3], tf.float32)


def test_class_names_are_an_asset_that_survives_a_move(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, (tmp_path / "elsewhere").resolve())
    loaded = tf.saved_model.load(str(moved))
    reference = json.loads(Path(loaded.reference.asset_path.numpy().decode()).read_text("utf-8"))
    assert (reference["classes"], reference["n"], reference["resize"]) == (
        ["daisy", "löwenzahn", r"rose\nred"],
        40,
        "crop",
    )
    path = loaded.labels.asset_path.numpy().decode()
    assert path == str(moved / "assets" / "labels.txt")
    assert Path(path).read_bytes() == "daisy\nlöwenzahn\nrose\\nred\n".encode()


def test_an_export_replaces_an_older_one(model: keras.Model, tmp_path: Path) -> None:
    folder = tmp_path / "saved_model" / "1"
    folder.mkdir(parents=True)
    (folder / "old").write_text("")
    export_saved_model(bundle_for(model), folder)
    assert not (folder / "old").exists()
    assert [x.name for x in folder.parent.iterdir()] == ["1"]


def test_the_warm_up_requests_are_those_of_a_client(folder: Path) -> None:
    """They are parsed by TensorFlow Serving's messages, and each is sent to its signature."""
    signatures = tf.saved_model.load(str(folder)).signatures
    requests = set()
    for record in tf.data.TFRecordDataset(str(folder / WARMUP_FILE)).as_numpy_iterator():
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        given = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        predicted = signatures[request.model_spec.signature_name](**given)["probabilities"]
        np.testing.assert_allclose(predicted.numpy().sum(1), 1, atol=1e-5)
        requests.add((request.model_spec.signature_name, len(predicted)))
    assert requests == {(s, n) for s in ("serving_default", "image_bytes", "explain") for n in (1, 4)} | {("images", 1)}


def test_the_reference_is_the_distribution_of_its_own_examples(model: keras.Model, folder: Path) -> None:
    images = some_images(40)
    reference = json.loads((folder / "assets" / "reference.json").read_text())
    predictions = predictions_of(model, images).argmax(-1)
    np.testing.assert_allclose(reference["class_frequencies"], np.bincount(predictions, minlength=3) / 40)
    assert sum(reference["confidence_histogram"]["counts"]) == 40
    served, window = tf.saved_model.load(str(folder)), PredictionWindow(3)
    files = tf.constant([tf.io.encode_png(image).numpy() for image in images])
    explained = served.signatures["explain"](image_bytes=files)
    for row, vector in zip(explained["probabilities"].numpy(), explained["embedding"].numpy(), strict=True):
        window.add(int(row.argmax()), float(row.max()), vector)
    drift = measure_drift(reference, window)
    assert get_most_severe_level(drift) == "stable"
    assert max(measure.value for measure in drift) < 1e-3
