"""The SavedModel behind the server, and which ones are not loaded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.errors import raises
from tests.serving import images
from tests.serving.images import photo
from tests.serving.running import Exported
from trainer.errors import DataError
from trainer.serving.export_files import Prediction, find_export
from trainer.serving.model import ServedModel


def load(folder: Path) -> ServedModel:
    return ServedModel(find_export(str(folder), folder, lambda _text: None))


@pytest.fixture(scope="module")
def model(exported: Exported) -> ServedModel:
    return load(exported.folder)


def rows(predictions: list[Any]) -> np.ndarray:
    assert all(isinstance(prediction, Prediction) for prediction in predictions)
    return np.stack([prediction.probabilities for prediction in predictions])


def test_images_that_cannot_be_decoded_fail_alone(model: ServedModel, exported: Exported) -> None:
    files = [photo(number) for number in range(11)]
    expected = exported.probabilities(files)
    files[0], files[6] = images.cut(photo(kind="PNG")), b"hello"
    predictions = model.predict(files)
    assert [isinstance(prediction, str) for prediction in predictions] == [n in (0, 6) for n in range(11)]
    valid = [1, 5, 7, 10]
    np.testing.assert_allclose(rows([predictions[n] for n in valid]), expected[valid], atol=2e-5)
    (reason,) = model.predict([b"hello"])
    assert isinstance(reason, str)
    assert reason
    assert "{{" not in reason


def test_an_explanation_has_a_heatmap(model: ServedModel, exported: Exported) -> None:
    assert model.explains
    (plain,), (explained,) = model.predict([photo()]), model.predict([photo()], explain=True)
    assert isinstance(plain, Prediction)
    assert isinstance(explained, Prediction)
    assert plain.heatmap is None
    assert explained.heatmap is not None
    assert explained.heatmap.shape == (2, 2)
    np.testing.assert_allclose(plain.embedding, explained.embedding, rtol=1e-6)
    np.testing.assert_allclose(rows([plain, explained]), exported.probabilities([photo()] * 2), atol=2e-5)


def test_all_batch_sizes_are_warmed_up(model: ServedModel) -> None:
    assert model.warm_up(1) == [1]
    assert model.warm_up(8) == [1, 2, 4, 8]
    assert model.warm_up(5) == [1, 2, 4, 8]


def test_on_a_gpu_batches_are_padded(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _kind=None: ["GPU"])
    padded = load(exported.folder)
    monkeypatch.undo()
    sizes = []
    classify = padded._classify
    padded._classify = lambda image_bytes: sizes.append(len(image_bytes)) or classify(image_bytes=image_bytes)
    files = [photo(number) for number in range(5)]
    np.testing.assert_allclose(rows(padded.predict(files)), exported.probabilities(files), atol=2e-5)
    padded.predict(files[:1])
    assert sizes == [8, 1]


def save(folder: Path, signature: Any, name: str = "image_bytes") -> str:
    """A SavedModel with one signature and two labels."""
    (file := folder / "labels.txt").write_text("cat\ndog\n")
    module = tf.Module()
    module.labels = tf.saved_model.Asset(str(file))
    module.signature = tf.function(signature, input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    tf.saved_model.save(module, str(folder / "1"), signatures={name: module.signature})
    return str(folder / "1")


def test_a_graph_that_reads_files_is_not_loaded(tmp_path: Path) -> None:
    def signature(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        content = tf.map_fn(tf.io.read_file, image_bytes)
        return {"probabilities": tf.zeros([tf.size(content), 2]), "content": content}

    folder = save(tmp_path, signature)
    with raises(DataError, key="model", value=folder, problem="not loaded: its graph has ReadFile,", fix="kubetune"):
        load(Path(folder))


@pytest.mark.parametrize(
    ("name", "problem"),
    [("image_bytes", "3 outputs for 2 classes"), ("other", "no signature image_bytes")],
    ids=["classes", "signature"],
)
def test_a_model_with_other_outputs_is_an_error(tmp_path: Path, name: str, problem: str) -> None:
    def signature(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": tf.zeros([tf.size(image_bytes), 3])}

    folder = save(tmp_path, signature, name)
    with raises(DataError, key="model", value=folder, problem=problem, fix="export"):
        load(Path(folder))
