"""Exports load back in and answer as the model did, from pixels and from the bytes of files."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.exporting.card import write_labels
from trainer.exporting.parity import largest_difference
from trainer.exporting.saved_model import export_saved_model
from trainer.exporting.tflite import export_tflite
from trainer.imaging import decode_image

NAMES = ("daisy", "löwenzahn", "rose\nred")
SIZE = 32


def small_model(precision: str = "float32") -> keras.Model:
    """A small convolutional classifier of 0..255 pixels, another network nested in it as a backbone is."""
    with_policy = {"dtype": precision}
    inner_in = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Conv2D(8, 3, 2, "same", kernel_initializer=keras.initializers.HeNormal(1), **with_policy)(inner_in)
    x = keras.layers.BatchNormalization(**with_policy)(x)
    inner = keras.Model(inner_in, keras.layers.ReLU(**with_policy)(x))
    images = keras.Input((SIZE, SIZE, 3), name="images")
    x = keras.ops.mean(keras.ops.cast(inner(images / 127.5 - 1, training=False), "float32"), axis=(1, 2))
    logits = keras.layers.Dense(3, kernel_initializer=keras.initializers.HeNormal(2), dtype="float32")(x)
    return keras.Model(images, keras.ops.softmax(3 * logits))


def some_images(count: int) -> np.ndarray:
    levels = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3)).astype("uint8")
    return levels.repeat(SIZE // 2, axis=1).repeat(SIZE // 2, axis=2)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return small_model()


@pytest.fixture(scope="module")
def folder(model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export" / "saved_model" / "1"
    export_saved_model(model, folder, NAMES, SIZE, "crop")
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
    assert set(signatures) == {"serving_default", "image_bytes", "images"}
    for name, field, shape, dtype in (
        ("serving_default", "image_bytes", [None], tf.string),
        ("image_bytes", "image_bytes", [None], tf.string),
        ("images", "images", [None, SIZE, SIZE, 3], tf.float32),
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
    path = tf.saved_model.load(str(moved)).labels.asset_path.numpy().decode()
    assert path == str(moved / "assets" / "labels.txt")
    assert Path(path).read_text("utf-8").splitlines() == ["daisy", "löwenzahn", "rose red"]


def test_an_export_replaces_what_was_there_and_leaves_nothing_beside(model: keras.Model, tmp_path: Path) -> None:
    folder = tmp_path / "saved_model" / "1"
    folder.mkdir(parents=True)
    (folder / "old").write_text("")
    export_saved_model(model, folder, NAMES, SIZE, "stretch")
    assert not (folder / "old").exists()
    assert [x.name for x in folder.parent.iterdir()] == ["1"]


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_tflite_answers_as_the_model_in_float32(precision: str, tmp_path: Path) -> None:
    model, images = small_model(precision), some_images(40)
    path = tmp_path / "export" / "model.tflite"
    export_tflite(model, path, SIZE)
    trained = model.predict(images.astype("float32"), verbose=0)
    assert largest_difference(path, trained, images) < (1e-5 if precision == "float32" else 0.05)
    full = small_model()
    full.set_weights(model.get_weights())
    assert largest_difference(path, full.predict(images.astype("float32"), verbose=0), images) <= 1e-5
    (inner,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    assert inner.layers[1].compute_dtype == precision.removeprefix("mixed_")  # only the file is in float32
    details = tf.lite.Interpreter(model_path=str(path)).get_input_details()[0]
    assert details["shape_signature"].tolist() == [-1, SIZE, SIZE, 3]
    assert details["dtype"] is np.float32


def test_labels_are_one_a_line(tmp_path: Path) -> None:
    write_labels(tmp_path / "export" / "labels.txt", NAMES)
    assert (tmp_path / "export" / "labels.txt").read_bytes() == "daisy\nlöwenzahn\nrose red\n".encode()
