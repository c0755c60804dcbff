"""Grad-CAM heatmaps, probabilities and embeddings, in one pass through the backbone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.models.classifier import Classifier

BATCH_SIZE = 32  # maximum number of images per call of the compiled function


@dataclass(frozen=True)
class Explainer:
    """The compiled function `explain` of a classifier. Call it with images, uint8 [n, S, S, 3], to get NumPy arrays."""

    compiled: Any  # tf.function: uint8 [n, S, S, 3] -> tensors of `explain` by name; a SavedModel export contains it

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the results of `explain` for n >= 1 images, in batches."""
        batches = [self.compiled(tf.constant(images[i : i + BATCH_SIZE])) for i in range(0, len(images), BATCH_SIZE)]
        return {name: np.concatenate([batch[name].numpy() for batch in batches]) for name in batches[0]}


def make_explainer(classifier: Classifier) -> Explainer:
    """Make a classifier's explainer. Its first call traces the function, once for all batch sizes."""
    signature = tf.TensorSpec([None, classifier.image_size, classifier.image_size, 3], tf.uint8)
    compiled = tf.function(lambda images: explain(classifier, images), input_signature=[signature], autograph=False)
    return Explainer(compiled)


def explain(classifier: Classifier, images: tf.Tensor, classes: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
    """Compute probabilities, embeddings and Grad-CAM heatmaps of images, eagerly or in a graph.

    A Grad-CAM heatmap (Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization") is the ReLU of a weighted sum of the feature maps. The weight of a map is the spatial mean of the
    gradient of the class logit. Only the head is differentiated, so a heatmap costs little more than a prediction.

    Args:
        images: uint8 or float32 [b, S, S, 3] in 0..255.
        classes: the class of each heatmap, int32 [b]; defaults to the predicted classes.

    Returns:
        `probabilities`: float32 [b, number of classes].
        `embedding`: the pooled features, float32 [b, C].
        `heatmap`: float32 [b, h, w], with the size of the feature maps. The maximum of each heatmap is 1, or 0 if no
            feature supports the class.
    """
    features = tf.cast(classifier.features(images), tf.float32)  # small gradients would underflow in half precision
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(features)
        logits = classifier.head_logits(features)
        if classes is None:
            classes = tf.argmax(logits, axis=1, output_type=tf.int32)
        class_logits = tf.gather(logits, classes, axis=1, batch_dims=1)
    map_weights = tf.reduce_mean(tape.gradient(class_logits, features), axis=(1, 2), keepdims=True)
    heatmaps = tf.nn.relu(tf.reduce_sum(map_weights * features, axis=-1))
    return {
        "probabilities": tf.nn.softmax(logits),
        "embedding": classifier.pool(features),
        "heatmap": tf.math.divide_no_nan(heatmaps, tf.reduce_max(heatmaps, axis=(1, 2), keepdims=True)),
    }
