"""A classifier: preprocessing, backbone, pooling and head, as plain functions over Keras variables."""

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from trainer.config import schema as config
from trainer.errors import ModelError
from trainer.models.backbones import Backbone, find_backbone
from trainer.models.batch_norm import counting
from trainer.models.bn_folding import computed
from trainer.models.weights import build_with_weights
from trainer.stateless_random import DROPOUT, uniform


@dataclass(frozen=True)
class Classifier:
    """Images in, class probabilities out; C channels leave the backbone, S is the image side in pixels.

    The head computes in float32 under every precision policy. Everything runs in a tf.function and in replicas.
    """

    kind: Backbone
    backbone: keras.Model  # preprocessed float [b, S, S, 3] -> float [b, h, w, C]
    hidden: keras.layers.Dense | None
    output: keras.layers.Dense
    pooling: str  # avg | max
    dropout: float  # rate, just before the output layer
    l2: float
    image_size: int

    def features(self, images: Any, batch_norm_training: bool = False, weight: Any = None) -> Any:
        """uint8 or float32 [b, S, S, 3] in 0..255 -> feature maps [b, h, w, C] of the compute dtype.

        With `batch_norm_training`, those BatchNormalization layers that are trainable use the statistics of the batch
        and move their averages (keras#20285: `training=True` anywhere else would do so unasked); examples of `weight`
        0, float32 [b], are padding and do not count.
        """
        pixels = keras.ops.cast(images, "float32")
        with counting(weight if batch_norm_training else None):
            return computed(self.backbone, self.kind.preprocess(pixels), batch_norm_training)

    def pooled(self, features: Any) -> Any:
        """Feature maps [b, h, w, C] -> float32 [b, C]; what is pooled already stays."""
        features = keras.ops.cast(features, "float32")
        if len(features.shape) == 2:
            return features
        return (keras.ops.mean if self.pooling == "avg" else keras.ops.max)(features, axis=(1, 2))

    def head_logits(
        self, features: Any, training: bool = False, seed: int = 0, step: tf.Tensor | int = 0, position: Any = None
    ) -> Any:
        """Feature maps [b, h, w, C] or pooled features [b, C] -> float32 logits [b, classes].

        In training, whether a unit is dropped is a function of (`seed`, run `step`, `position` in the global batch
        int64 [b], unit) alone: any split of the batch over replicas drops the same ones.
        """
        x = self.pooled(features)
        if self.hidden is not None:
            x = self.hidden(x)
        if training and self.dropout > 0:
            assert position is not None, "dropout needs the examples' positions in the global batch"
            draws = uniform(seed, DROPOUT, step, position[:, None], tf.range(x.shape[1], dtype=tf.int64)[None, :])
            x = tf.where(draws >= self.dropout, x / (1.0 - self.dropout), 0.0)  # inverted: inference needs no scale
        return self.output(x)

    def logits(
        self, images: Any, *, training: bool = False, batch_norm_training: bool = False, seed: int = 0, step: Any = 0,
        position: Any = None, weight: Any = None,
    ) -> Any:  # fmt: skip
        """uint8 or float32 [b, S, S, 3] in 0..255 -> float32 logits [b, classes]."""
        maps = self.features(images, batch_norm_training, weight)
        return self.head_logits(maps, training, seed, step, position)

    def probabilities(self, images: Any) -> Any:
        """uint8 or float32 [b, S, S, 3] in 0..255 -> float32 [b, classes], each row summing to 1."""
        return keras.ops.softmax(self.logits(images))

    def l2_loss(self) -> tf.Tensor:
        """Float32 scalar: l2 times the sum of squares of the head's kernels."""
        if self.l2 == 0:
            return tf.constant(0.0)
        kernels = [layer.kernel for layer in (self.hidden, self.output) if layer is not None]
        return self.l2 * tf.add_n([tf.reduce_sum(tf.square(tf.convert_to_tensor(kernel))) for kernel in kernels])

    def keras_model(self) -> keras.Model:
        """The same variables as an inference model: float32 [b, S, S, 3] in 0..255 -> probabilities [b, classes]."""
        images = keras.Input((self.image_size, self.image_size, 3), dtype="float32", name="images")
        return keras.Model(images, self.probabilities(images), name="classifier")

    @property
    def head_variables(self) -> dict[str, keras.Variable]:
        """{"head/output/kernel": variable, ...}."""
        layers = {"hidden": self.hidden, "output": self.output}
        return {
            f"head/{name}/{v.name}": v for name, layer in layers.items() if layer is not None for v in layer.weights
        }

    @property
    def variables(self) -> dict[str, keras.Variable]:
        """Every variable by a name that is the same in every process, backbone first, in the order of its layers."""
        named: dict[str, keras.Variable] = {}
        for layer in self.backbone.layers:
            for variable in layer.weights:
                key = f"backbone/{layer.name}/{variable.name}"
                while key in named:  # a nested block may hold two of a name
                    key += "_"
                named[key] = variable
        return named | self.head_variables


def build_classifier(model: config.Model, class_count: int, seed: int) -> Classifier:
    """Build the classifier that `model` describes, every random first value a function of `seed`.

    Call it under the strategy's scope and after the global Keras precision policy was set.

    Raises:
        ModelError: the backbone, its options or its weights cannot be had as asked.
    """
    if class_count < 2:
        raise ModelError(f"a classifier needs at least 2 classes, the data has {class_count}")
    kind = find_backbone(model.backbone)
    image_size = model.image_size or kind.default_size
    network = build_with_weights(kind, image_size, model.alpha, model.weights, seed)
    for layer in network.layers:
        # Drop-connect layers of some families draw from a stateful generator, which no checkpoint could resume.
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    hidden, width = None, network.output_shape[-1]
    if model.hidden is not None:
        hidden = _dense(model.hidden, width, "hidden", seed, "relu")
        width = model.hidden
    output = _dense(class_count, width, "output", seed + 1, None)
    return Classifier(kind, network, hidden, output, model.pooling, model.dropout, model.l2, image_size)


def _dense(units: int, inputs: int, name: str, seed: int, activation: str | None) -> keras.layers.Dense:
    drawn = keras.initializers.GlorotUniform(seed=seed)
    layer = keras.layers.Dense(units, activation, kernel_initializer=drawn, dtype="float32", name=f"head_{name}")
    layer.build((None, inputs))
    return layer
