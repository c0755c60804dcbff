"""Grad-CAM against its closed forms, and what stands beside it."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.config import schema as config
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.grad_cam import AT_ONCE, explain, make_explainer

SMALL: dict[str, Any] = {"backbone": "MobileNetV2", "alpha": 0.35, "weights": "glyphs", "image_size": 96}


def build(**changes: Any) -> Classifier:
    return build_classifier(config.Model(**(SMALL | changes)), 4, 1)


def some_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 96, 96, 3)).astype("uint8")


def scaled(heat: np.ndarray) -> np.ndarray:
    heat = np.maximum(heat, 0)
    top = heat.max((1, 2), keepdims=True)
    return np.divide(heat, top, out=np.zeros_like(heat), where=top > 0)


def test_with_a_linear_head_over_mean_pooling_it_is_the_class_activation_map() -> None:
    """Zhou et al. 2016: the class's row of the kernel, applied at every place."""
    classifier, images = build(), some_images(3)
    chosen = np.array([2, 0, 3], "int32")
    maps = classifier.features(images).numpy()
    kernel = classifier.output.kernel.numpy()
    expected = scaled(np.einsum("bhwc,cb->bhw", maps, kernel[:, chosen]))
    heatmap = explain(classifier, images, tf.constant(chosen))["heatmap"].numpy()
    assert heatmap.shape == (3, 3, 3)
    assert expected.max() == 1
    np.testing.assert_allclose(heatmap, expected, atol=1e-5)


def test_with_a_hidden_layer_it_follows_the_units_that_are_on() -> None:
    classifier, images = build(hidden=9), some_images(2)
    assert classifier.hidden is not None
    maps, pooled = classifier.features(images).numpy(), classifier.pooled(classifier.features(images)).numpy()
    (w1, b1), (w2, _) = classifier.hidden.get_weights(), classifier.output.get_weights()
    slopes = ((pooled @ w1 + b1 > 0) * w2[:, 1]) @ w1.T
    expected = scaled(np.einsum("bhwc,bc->bhw", maps, slopes))
    np.testing.assert_allclose(explain(classifier, images, tf.constant([1, 1]))["heatmap"], expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_what_stands_beside_it_is_what_the_classifier_says_alone(pooling: str) -> None:
    classifier, images = build(pooling=pooling), some_images(3)
    told = tf.function(lambda x: explain(classifier, x))(images)
    np.testing.assert_allclose(told["probabilities"], classifier.probabilities(images), atol=1e-6)
    np.testing.assert_allclose(told["embedding"], classifier.pooled(classifier.features(images)), atol=1e-5)
    likeliest = np.argmax(told["probabilities"], axis=1).astype("int32")
    again = explain(classifier, images, tf.constant(likeliest))
    np.testing.assert_allclose(told["heatmap"], again["heatmap"], atol=1e-5)
    assert {name: value.dtype for name, value in told.items()} == dict.fromkeys(told, tf.float32)


def test_nothing_for_a_class_is_a_map_of_zeros() -> None:
    classifier, images = build(), some_images(1)
    kernel = classifier.output.kernel.numpy()
    kernel[:, 3] = -1.0  # the features come out of a ReLU: every one of them speaks against it
    classifier.output.kernel.assign(kernel)
    heatmap = explain(classifier, images, tf.constant([3]))["heatmap"].numpy()
    assert np.isfinite(heatmap).all()
    assert not heatmap.any()


def test_any_number_of_images_is_explained_by_one_compiled_function() -> None:
    classifier, images = build(), some_images(AT_ONCE + 5)
    traced = []
    features = classifier.features
    object.__setattr__(classifier, "features", lambda some: traced.append(some.shape) or features(some))
    look = make_explainer(classifier)
    many, few = look(images), look(images[:3])
    assert len(traced) == 1
    assert many.keys() == few.keys() == {"probabilities", "embedding", "heatmap"}
    expected = explain(classifier, images[-4:])
    for name, values in many.items():
        assert (len(values), values.dtype) == (len(images), np.float32)
        np.testing.assert_allclose(values[-4:], expected[name], atol=2e-5)
        np.testing.assert_allclose(few[name], values[:3], atol=2e-5)
