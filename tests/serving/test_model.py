"""The SavedModel as the server asks it, and which ones it does not load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorflow as tf

from tests.serving import pictures
from tests.serving.pictures import photo
from trainer.errors import DataError
from trainer.serving.export_files import Answer, Export, Unreadable, find_export
from trainer.serving.model import ServedModel

if TYPE_CHECKING:
    from tests.serving.exported import Exported


def found(folder: Path) -> Export:
    return find_export(str(folder), folder, lambda _text: None)


@pytest.fixture(scope="module")
def model(exported: Exported) -> ServedModel:
    return ServedModel(found(exported.folder))


def rows(answers: list[Any]) -> np.ndarray:
    assert all(isinstance(answer, Answer) for answer in answers)
    return np.stack([answer.probabilities for answer in answers])


def test_images_that_cannot_be_decoded_are_found_among_the_others(model: ServedModel, exported: Exported) -> None:
    files = [photo(number) for number in range(11)]
    expected = exported.answers(files)
    files[0], files[6] = pictures.cut(photo(kind="PNG")), b"hello"
    answers = model.classify(files)
    assert [isinstance(answer, Unreadable) for answer in answers] == [n in (0, 6) for n in range(11)]
    np.testing.assert_allclose(rows([answers[n] for n in (1, 5, 7, 10)]), expected[[1, 5, 7, 10]], atol=2e-5)
    (alone,) = model.classify([b"hello"])
    assert isinstance(alone, Unreadable)
    assert alone.reason
    assert "{{" not in alone.reason


def test_an_explanation_has_more_to_it(model: ServedModel, exported: Exported) -> None:
    assert model.explains
    (plain,), (explained,) = model.classify([photo()]), model.explain([photo()])
    assert isinstance(plain, Answer)
    assert isinstance(explained, Answer)
    assert plain.heatmap is None
    assert explained.heatmap is not None
    assert explained.heatmap.shape == (2, 2)
    np.testing.assert_allclose(plain.embedding, explained.embedding, rtol=1e-6)
    np.testing.assert_allclose(rows([plain, explained]), exported.answers([photo()] * 2), atol=2e-5)


def test_all_sizes_of_batches_are_warm(model: ServedModel) -> None:
    assert model.warm_up(1) == [1]
    assert model.warm_up(8) == [1, 2, 4, 8]
    assert model.warm_up(5) == [1, 2, 4, 8]


def test_on_a_gpu_batches_are_filled_up(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _kind=None: ["one"])
    filled = ServedModel(found(exported.folder))
    monkeypatch.undo()
    sizes = []
    whole = filled._classify
    filled._classify = lambda image_bytes: sizes.append(len(image_bytes)) or whole(image_bytes=image_bytes)
    files = [photo(number) for number in range(5)]
    np.testing.assert_allclose(rows(filled.classify(files)), exported.answers(files), atol=2e-5)
    filled.classify(files[:1])
    assert sizes == [8, 1]


def save(folder: Path, answer: Any, labels: str = "cat\ndog\n", name: str = "image_bytes") -> Path:
    """A SavedModel with one signature of a stranger."""
    (file := folder / "labels.txt").write_text(labels)
    module = tf.Module()
    module.labels = tf.saved_model.Asset(str(file))
    module.answer = tf.function(answer, input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    tf.saved_model.save(module, str(folder / "1"), signatures={name: module.answer})
    return folder / "1"


def test_a_graph_that_reads_files_is_not_loaded(tmp_path: Path) -> None:
    def answer(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        read = tf.map_fn(tf.io.read_file, image_bytes)
        return {"probabilities": tf.zeros([tf.size(read), 2]), "read": read}

    folder = save(tmp_path, answer)
    with pytest.raises(DataError, match="holds the operations ReadFile, which no classifier needs; it is not loaded"):
        ServedModel(found(folder))


def test_a_model_of_other_classes_or_without_the_signature_is_refused(tmp_path: Path) -> None:
    def answer(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": tf.zeros([tf.size(image_bytes), 3])}

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="answers 3 probabilities and names 2 classes; export again"):
        ServedModel(found(save(tmp_path / "a", answer)))
    with pytest.raises(DataError, match="has no signature image_bytes, so kubetune did not export it"):
        ServedModel(found(save(tmp_path / "b", answer, name="other")))
