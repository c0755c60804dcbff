"""Teachers predict as their network, at their own image size, and without gradient."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.errors import raises
from tests.exporting.subjects import SIZE, bundle_for, small_model, some_images
from tests.processes import result_of
from trainer.config import schema as config
from trainer.distillation.teacher import Teacher, load_saved_model_teacher
from trainer.errors import DataError
from trainer.evaluation.scoring import Predictor
from trainer.exporting.saved_model import export_saved_model
from trainer.models.classifier import build_classifier


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return small_model()


@pytest.fixture(scope="module")
def exported(model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "saved_model" / "1"
    export_saved_model(bundle_for(model), folder)
    return folder


def test_a_saved_model_predicts_at_its_own_size(model: keras.Model, exported: Path) -> None:
    teacher = load_saved_model_teacher(exported, "x")
    assert teacher.image_size == SIZE
    images = some_images(5)
    expected = model.predict(images.astype("float32"), verbose=0)
    np.testing.assert_allclose(tf.nn.softmax(teacher.logits(images)), expected, atol=1e-5)
    small = np.random.default_rng(2).integers(0, 256, (5, 20, 20, 3)).astype("uint8")
    resized = tf.image.resize(small, [SIZE, SIZE]).numpy()
    np.testing.assert_allclose(tf.nn.softmax(teacher.logits(small)), model.predict(resized, verbose=0), atol=1e-5)


def test_a_classifier_predicts_in_inference_without_gradient() -> None:
    options = config.Model(backbone="MobileNetV2", alpha=0.35, image_size=32, weights="none", dropout=0.5, hidden=8)
    classifier = build_classifier(options, 3, 1)
    teacher = Teacher(classifier.image_size, classifier.logits)
    images = tf.constant(some_images(4), tf.float32)
    before = {name: v.numpy().copy() for name, v in classifier.variables.items()}
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits = tf.function(teacher.logits)(images)
        loss = tf.reduce_sum(logits)
    sources = [images, *(v.value for v in classifier.variables.values())]
    assert tape.gradient(loss, sources) == [None] * len(sources)
    np.testing.assert_allclose(logits, classifier.logits(images), atol=1e-5)
    for name, value in classifier.variables.items():
        np.testing.assert_array_equal(value.numpy(), before[name])


def test_a_saved_model_of_another_tool_is_an_error(tmp_path: Path) -> None:
    module = tf.Module()
    double = tf.function(lambda x: 2 * x, input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": double})
    with raises(DataError, "distillation.teacher", "gs://b/m", fix="output_dir", problem="no signature `images`"):
        load_saved_model_teacher(tmp_path / "m", "gs://b/m")


MIRRORED = """
import json, sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from pathlib import Path
from trainer.distillation.teacher import load_saved_model_teacher
from trainer.evaluation.scoring import Predictor
images = np.load(sys.argv[2])
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    teacher = load_saved_model_teacher(Path(sys.argv[1]), "x")
batch = {"image": images, "label": np.zeros(4, np.int32), "weight": np.ones(4, np.float32), "index": np.arange(4)}
parts = tf.data.Dataset.from_tensor_slices(batch).batch(2)
stream = strategy.distribute_datasets_from_function(lambda _: parts)
print("RESULT" + json.dumps(Predictor(strategy, teacher).predict(stream, 1).probabilities.tolist()))
"""


@pytest.mark.slow
def test_a_saved_model_predicts_on_two_devices(model: keras.Model, exported: Path, tmp_path: Path) -> None:
    images = some_images(4)
    np.save(tmp_path / "images.npy", images)
    probabilities = result_of(MIRRORED, exported, tmp_path / "images.npy")
    np.testing.assert_allclose(probabilities, model.predict(images.astype("float32"), verbose=0), atol=1e-5)


def test_scoring_takes_a_teacher(model: keras.Model, exported: Path) -> None:
    images = some_images(4)
    rows = {"image": images, "label": np.zeros(4, np.int32), "weight": np.array([1, 1, 0, 1], np.float32)}
    batches = tf.data.Dataset.from_tensor_slices(rows | {"index": np.array([3, 1, 0, 2])}).batch(2)
    teacher = load_saved_model_teacher(exported, "x")
    predicted = Predictor(tf.distribute.get_strategy(), teacher).predict(batches, 2)
    probabilities, indices = predicted.probabilities, predicted.indices
    assert indices.tolist() == [1, 2, 3]
    np.testing.assert_allclose(probabilities, model.predict(images.astype("float32"), verbose=0)[[1, 3, 0]], atol=1e-5)
