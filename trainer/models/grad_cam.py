"""Grad-CAM heatmaps with the probabilities and the embedding, in one pass over the backbone."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer.models.classifier import Classifier

AT_ONCE = 32  # images
Explainer = Callable[[np.ndarray], dict[str, np.ndarray]]  # uint8 [n, S, S, 3], n >= 1 -> the arrays of `explain`


def make_explainer(classifier: Classifier) -> Explainer:
    """`explain` as a function of any number of images, compiled at its first use and only then."""
    side = classifier.image_size
    images = tf.TensorSpec([None, side, side, 3], tf.uint8)  # without one, the rest of a split would be traced apart
    compiled = tf.function(lambda some: explain(classifier, some), input_signature=[images], autograph=False)

    def explainer(images: np.ndarray) -> dict[str, np.ndarray]:
        parts = [compiled(tf.constant(images[at : at + AT_ONCE])) for at in range(0, len(images), AT_ONCE)]
        return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}

    return explainer


def explain(classifier: Classifier, images: tf.Tensor, chosen: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
    """Probabilities, embeddings and Grad-CAM heatmaps of images; works in a tf.function and a SavedModel.

    Grad-CAM (Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization"): the feature maps are added up, each weighted by the mean over its positions of the gradient of the
    class's logit, and what speaks against the class is cut off. Only the head is differentiated, so that an
    explanation costs little more than a prediction.

    Args:
        images: uint8 or float32 [b, S, S, 3] in 0..255.
        chosen: int32 [b], the class that each heatmap is for; the most probable one when None.

    Returns:
        `probabilities` float32 [b, classes]; `embedding` float32 [b, C], the pooled features; `heatmap` float32
        [b, h, w] of the size of the feature maps, its largest value 1, all 0 where nothing speaks for the class.
    """
    features = tf.cast(classifier.features(images), tf.float32)  # gradients of half precision would be rounded away
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(features)
        logits = classifier.head_logits(features)
        if chosen is None:
            chosen = tf.argmax(logits, axis=1, output_type=tf.int32)
        of_class = tf.gather(logits, chosen, axis=1, batch_dims=1)
    slopes = tape.gradient(of_class, features)
    weights = tf.reduce_mean(slopes, axis=(1, 2), keepdims=True)
    heat = tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))
    return {
        "probabilities": tf.nn.softmax(logits),
        "embedding": classifier.pooled(features),
        "heatmap": tf.math.divide_no_nan(heat, tf.reduce_max(heat, axis=(1, 2), keepdims=True)),
    }
