"""Grad-CAM against its closed forms; probabilities and embeddings against the classifier."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.config import schema as config
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.grad_cam import BATCH_SIZE, explain_features, make_explainer

SMALL: dict[str, Any] = {"backbone": "MobileNetV2", "alpha": 0.35, "weights": "glyphs", "image_size": 96}


def build(**changes: Any) -> Classifier:
    return build_classifier(config.Model(**(SMALL | changes)), 4, 1)


@cache
def built() -> Classifier:
    """The classifier of `build`, the same object in all tests."""
    return build()


def make_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 96, 96, 3)).astype("uint8")


def scale_to_one(heat: np.ndarray) -> np.ndarray:
    heat = np.maximum(heat, 0)
    top = heat.max((1, 2), keepdims=True)
    return np.divide(heat, top, out=np.zeros_like(heat), where=top > 0)


def test_with_a_linear_head_over_mean_pooling_it_is_the_class_activation_map() -> None:
    """Zhou et al. 2016: the kernel column of the class, applied at every position."""
    classifier, images = built(), make_images(3)
    classes = np.array([2, 0, 3], "int32")
    kernel = classifier.output.kernel.numpy()
    expected = scale_to_one(np.einsum("bhwc,cb->bhw", classifier.features(images).numpy(), kernel[:, classes]))
    heatmap = explain_features(classifier, classifier.features(images), tf.constant(classes))["heatmap"].numpy()
    assert heatmap.shape == (3, 3, 3)
    assert expected.max() == 1
    np.testing.assert_allclose(heatmap, expected, atol=1e-5)


def test_with_a_hidden_layer_it_uses_the_active_units() -> None:
    classifier, images = build(hidden=9), make_images(2)
    maps, pooled = classifier.features(images).numpy(), classifier.pool(classifier.features(images)).numpy()
    (w1, b1), (w2, _) = classifier.hidden[0].dense.get_weights(), classifier.output.get_weights()
    slopes = ((pooled @ w1 + b1 > 0) * w2[:, 1]) @ w1.T
    expected = scale_to_one(np.einsum("bhwc,bc->bhw", maps, slopes))
    np.testing.assert_allclose(
        explain_features(classifier, classifier.features(images), tf.constant([1, 1]))["heatmap"], expected, atol=1e-5
    )


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_probabilities_and_embeddings_are_those_of_the_classifier(pooling: str) -> None:
    classifier, images = replace(built(), pooling=pooling), make_images(3)
    explained = tf.function(lambda x: explain_features(classifier, classifier.features(x)))(images)
    np.testing.assert_allclose(explained["probabilities"], classifier.probabilities(images), atol=1e-6)
    np.testing.assert_allclose(explained["embedding"], classifier.pool(classifier.features(images)), atol=1e-5)
    most_probable = np.argmax(explained["probabilities"], axis=1).astype("int32")
    expected = explain_features(classifier, classifier.features(images), tf.constant(most_probable))["heatmap"]
    np.testing.assert_allclose(explained["heatmap"], expected, atol=1e-5)
    assert {name: value.dtype for name, value in explained.items()} == dict.fromkeys(explained, tf.float32)


def test_a_class_without_support_has_a_heatmap_of_zeros() -> None:
    classifier, images = built(), make_images(1)
    before = classifier.output.kernel.numpy()
    kernel = before.copy()
    kernel[:, 3] = -1.0  # the features are outputs of a ReLU, so each of them lowers the logit
    classifier.output.kernel.assign(kernel)
    heatmap = explain_features(classifier, classifier.features(images), tf.constant([3]))["heatmap"].numpy()
    classifier.output.kernel.assign(before)
    assert not heatmap.any()


def test_any_number_of_images_is_explained_by_one_compiled_function() -> None:
    classifier, images = replace(built()), make_images(BATCH_SIZE + 5)
    traced = []
    features = classifier.features
    object.__setattr__(classifier, "features", lambda x, **options: traced.append(x.shape) or features(x, **options))
    explainer = make_explainer(classifier)
    many, few = explainer(images), explainer(images[:3])
    assert len(traced) == 2  # in `predict` and in `explain`
    assert many.keys() == few.keys() == {"probabilities", "embedding", "heatmap"}
    expected = explain_features(classifier, features(images[-4:]))
    for name, values in many.items():
        assert (len(values), values.dtype) == (len(images), np.float32)
        np.testing.assert_allclose(values[-4:], expected[name], atol=2e-5)
        np.testing.assert_allclose(few[name], values[:3], atol=2e-5)
