"""Grad-CAM heatmaps, probabilities and embeddings, in one pass through the backbone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.models.bn_folding import find_foldable_pairs, fold_into_variables
from trainer.models.classifier import Classifier

BATCH_SIZE = 32  # maximum number of images per call of a compiled function

trace = partial(tf.function, autograph=False)  # AutoGraph would double the tracing time, and no function here needs it


@dataclass(frozen=True)
class Explainer:
    """The inference functions of a trained classifier. S is the side of its input in pixels.

    Call it with images, uint8 [n, S, S, 3], to get the results of `explain_features` as NumPy arrays. An export
    contains its functions.
    """

    predict: Any  # tf.function: float32 [n, S, S, 3] in 0..255 -> {"probabilities": float32 [n, classes]}
    explain: Any  # tf.function: uint8 [n, S, S, 3] -> tensors of `explain_features` by name
    variables: Sequence[tf.Variable]  # all variables that the functions read

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the results of `explain_features` for n >= 1 images, in batches."""
        batches = [self.explain(tf.constant(images[i : i + BATCH_SIZE])) for i in range(0, len(images), BATCH_SIZE)]
        return {name: np.concatenate([batch[name].numpy() for batch in batches]) for name in batches[0]}


def make_explainer(classifier: Classifier) -> Explainer:
    """Trace a classifier's inference functions, for all batch sizes, with the current values of the backbone.

    BatchNormalization is folded into copies of the backbone's variables, so later changes of these have no effect.
    """
    backbone, size = classifier.backbone, classifier.image_size
    folded = fold_into_variables(backbone)
    folded_layers = {layer.name for pair in find_foldable_pairs(backbone) for layer in pair}
    other_layers = [layer for layer in backbone.layers if layer.name not in folded_layers]
    variables = [variable.value for layer in other_layers for variable in layer.weights]
    variables += [variable.value for variable in classifier.head_variables.values()]
    variables += tf.nest.flatten(list(folded.values()))
    pixels = tf.TensorSpec([None, size, size, 3], tf.float32, "images")

    def features(images: tf.Tensor) -> tf.Tensor:
        # Not traced itself: the names in a LiteRT file would contain the number of the traced function, and two exports
        # of the same weights would differ.
        return classifier.features(images, folded=folded)

    @trace(input_signature=[pixels])
    def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": tf.nn.softmax(classifier.head_logits(features(images)))}

    @trace(input_signature=[tf.TensorSpec([None, size, size, 3], tf.uint8)])
    def explain(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return explain_features(classifier, features(tf.cast(images, tf.float32)))

    with constant_statistics(backbone):
        for function in (predict, explain):
            function.get_concrete_function()
    return Explainer(predict, explain, variables)


@contextmanager
def constant_statistics(network: keras.Model) -> Iterator[None]:
    """Context manager in which the statistics of Normalization layers are NumPy arrays.

    A traced function has them as constants. It would capture tensors, which tf2onnx turns into inputs of the model.
    """
    layers = [layer for layer in network.layers if isinstance(layer, keras.layers.Normalization)]
    statistics = [(layer, layer.mean, layer.variance) for layer in layers]
    try:
        for layer, mean, variance in statistics:
            layer.mean, layer.variance = np.asarray(mean), np.asarray(variance)
        yield
    finally:
        for layer, mean, variance in statistics:
            layer.mean, layer.variance = mean, variance


def explain_features(
    classifier: Classifier, features: tf.Tensor, classes: tf.Tensor | None = None
) -> dict[str, tf.Tensor]:
    """Compute probabilities, embeddings and Grad-CAM heatmaps from feature maps, eagerly or in a graph.

    A Grad-CAM heatmap (Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization") is the ReLU of a weighted sum of the feature maps. The weight of a map is the spatial mean of the
    gradient of the class logit. Only the head is differentiated, so a heatmap costs little more than a prediction.

    Args:
        features: the backbone's output, [b, h, w, C].
        classes: the class of each heatmap, int32 [b]; defaults to the predicted classes.

    Returns:
        `probabilities`: float32 [b, number of classes].
        `embedding`: the pooled features, float32 [b, C].
        `heatmap`: float32 [b, h, w], with the size of the feature maps. The maximum of each heatmap is 1, or 0 if no
            feature supports the class.
    """
    features = tf.cast(features, tf.float32)  # small gradients would underflow in half precision
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
