"""The classifier: preprocessing, backbone, pooling and head."""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from trainer.config.schema import Model as ModelConfig
from trainer.errors import ModelError
from trainer.models.backbones import BackboneSpec, find_backbone
from trainer.models.batch_norm import (
    PaddingAwareBatchNormalization,
    collect_statistics,
    count_statistics,
    tracks_statistics,
    update_moving_averages,
    use_example_weights,
)
from trainer.models.bn_folding import FoldedWeights, apply_folded
from trainer.models.weights import build_with_weights
from trainer.stateless_random import DROPOUT, random_uniform

# Momentum of the head's moving averages. With Keras' default, 0.99, they need hundreds of steps to approach the
# statistics of the data, and many heads train for fewer steps.
HEAD_NORM_MOMENTUM = 0.9


@dataclass(frozen=True)
class HiddenLayer:
    """A hidden layer of the head: Dense, BatchNormalization if `norm` is not None, and ReLU."""

    dense: keras.layers.Dense  # with ReLU if `norm` is None, otherwise without activation
    norm: PaddingAwareBatchNormalization | None = None

    def __call__(self, x: Any, training: bool) -> Any:
        """Compute activations, float32 [b, units], from inputs, float32 [b, n].

        In training, `norm` uses batch statistics in every phase; a phase's setting `batch_norm` affects only the
        backbone.
        """
        x = self.dense(x)
        return x if self.norm is None else keras.ops.relu(self.norm(x, training=training))


@dataclass(frozen=True)
class Classifier:
    """Image classifier. S is the image side in pixels, C the number of output channels of the backbone.

    The head computes in float32 under every precision policy. Methods that compute tensors also work in a tf.function
    and in the replica context of a strategy.
    """

    spec: BackboneSpec
    backbone: keras.Model  # preprocessed float [b, S, S, 3] -> float [b, h, w, C]
    hidden: tuple[HiddenLayer, ...]  # hidden layers of the head, from the backbone up
    output: keras.layers.Dense  # output layer of the head
    pooling: str  # avg | max
    dropout: float  # rate, immediately before the output layer
    l2: float  # factor of the penalty on the head's kernels
    image_size: int

    def features(
        self, images: Any, batch_norm_training: bool = False, weight: Any = None, fold_trainable: bool = True,
        folded: Mapping[str, FoldedWeights] | None = None,
    ) -> Any:  # fmt: skip
        """Compute feature maps, [b, h, w, C] in the backbone's compute dtype.

        Args:
            images: uint8 or float32 [b, S, S, 3] in 0..255.
            batch_norm_training: whether trainable BatchNormalization layers use batch statistics and update their
                moving averages. If not, the backbone runs with `training=False` even in a training step, because
                `training=True` could update the averages (keras#20285).
            weight: 1 for examples and 0 for padding, float32 [b]. Batch statistics exclude padding; None includes all.
            fold_trainable: whether trainable BatchNormalization layers are folded too (`bn_folding.apply_folded`).
            folded: the backbone's folded weights, if its variables no longer change; by default they are computed from
                the variables in each call.
        """
        pixels = self.spec.preprocess(keras.ops.cast(images, "float32"))
        with use_example_weights(weight if batch_norm_training else None):
            return apply_folded(self.backbone, pixels, batch_norm_training, folded, fold_trainable)

    def pool(self, features: Any) -> Any:
        """Pool feature maps [b, h, w, C] to float32 [b, C]. Features [b, C] are already pooled, and only cast."""
        features = keras.ops.cast(features, "float32")
        if len(features.shape) == 2:
            return features
        return (keras.ops.mean if self.pooling == "avg" else keras.ops.max)(features, axis=(1, 2))

    def head_logits(
        self, features: Any, training: bool = False, seed: int = 0, step: tf.Tensor | int = 0, position: Any = None,
        weight: Any = None,
    ) -> Any:  # fmt: skip
        """Compute logits, float32 [b, classes], of feature maps [b, h, w, C] or pooled features [b, C].

        The dropout mask is a function of `seed`, `step`, `position` and the unit, so it does not depend on how the
        batch is split over replicas.

        Args:
            training: whether to apply dropout, and use batch statistics in the head's BatchNormalization layers.
            seed: the run's seed.
            step: number of training steps of the run so far.
            position: position of each example in the global batch, int64 [b]; required if dropout is applied.
            weight: 1 for examples and 0 for padding, float32 [b]. Batch statistics exclude padding; None includes all.
        """
        x = self.pool(features)
        with use_example_weights(weight if training else None):
            for hidden in self.hidden:
                x = hidden(x, training)
        if training and self.dropout > 0:
            assert position is not None, "dropout needs the positions of the examples in the global batch"
            draws = random_uniform(
                seed, DROPOUT, step, position[:, None], tf.range(x.shape[1], dtype=tf.int64)[None, :]
            )
            # Inverted dropout: the remaining units are scaled here, so that inference needs no scaling.
            x = tf.where(draws >= self.dropout, x / (1.0 - self.dropout), 0.0)
        return self.output(x)

    def logits(
        self, images: Any, *, training: bool = False, batch_norm_training: bool = False, seed: int = 0, step: Any = 0,
        position: Any = None, weight: Any = None,
    ) -> Any:  # fmt: skip
        """Compute logits, float32 [b, classes], of images, uint8 or float32 [b, S, S, 3] in 0..255.

        The other arguments are documented in `features` and `head_logits`.
        """
        maps = self.features(images, batch_norm_training, weight, fold_trainable=not training)
        return self.head_logits(maps, training, seed, step, position, weight)

    def logits_and_embeddings(self, images: Any) -> tuple[Any, Any]:
        """Compute logits, float32 [b, classes], and embeddings (pooled features), float32 [b, C], of images.

        `images` is uint8 or float32 [b, S, S, 3] in 0..255.
        """
        maps = self.features(images)
        return self.head_logits(maps), self.pool(maps)

    def probabilities(self, images: Any) -> Any:
        """Compute class probabilities, float32 [b, classes], of images, uint8 or float32 [b, S, S, 3] in 0..255."""
        return keras.ops.softmax(self.logits(images))

    def l2_loss(self) -> tf.Tensor:
        """Compute the L2 penalty, a float32 scalar: `l2` times the sum of squares of the head's kernels."""
        if self.l2 == 0:
            return tf.constant(0.0)
        kernels = [layer.kernel for layer in (*(hidden.dense for hidden in self.hidden), self.output)]
        return self.l2 * tf.add_n([tf.reduce_sum(tf.square(tf.convert_to_tensor(kernel))) for kernel in kernels])

    @property
    def normalizations(self) -> dict[str, keras.layers.BatchNormalization]:
        """The BatchNormalization layers whose moving averages training updates in this phase, by layer name."""
        layers = [layer for layer in self.backbone.layers if tracks_statistics(layer)]
        return {layer.name: layer for layer in [*layers, *self.head_normalizations]}

    @property
    def head_normalizations(self) -> list[keras.layers.BatchNormalization]:
        """The head's BatchNormalization layers, which train in every phase."""
        return [hidden.norm for hidden in self.hidden if hidden.norm is not None]

    def collect_statistics(self) -> AbstractContextManager[dict[str, Any]]:
        """Collect the batch statistics of layers called in the context, by name (`batch_norm.collect_statistics`)."""
        return collect_statistics()

    @property
    def statistics_sizes(self) -> dict[str, int]:
        """The length of the vector that `collect_statistics` yields for each layer, by layer name."""
        return {name: count_statistics(layer) for name, layer in self.normalizations.items()}

    def update_moving_averages(self, strategy: tf.distribute.Strategy, sums: Mapping[str, Any]) -> None:
        """Update the moving averages from `sums`, totals of the vectors of `collect_statistics` by layer name."""
        update_moving_averages(strategy, self.normalizations, sums)

    def build_keras_model(self) -> keras.Model:
        """Build a Keras model that uses these variables: float32 images [b, S, S, 3] in 0..255 -> `probabilities`."""
        images = keras.Input((self.image_size, self.image_size, 3), dtype="float32", name="images")
        return keras.Model(images, self.probabilities(images), name="classifier")

    @property
    def head_variables(self) -> dict[str, keras.Variable]:
        """The head's variables, including moving averages, by name, such as "head/output/bias"."""
        layers: dict[str, keras.layers.Layer] = {}
        for name, hidden in zip(_name_hidden_layers(len(self.hidden)), self.hidden, strict=True):
            layers |= {name: hidden.dense} | ({f"{name}_norm": hidden.norm} if hidden.norm is not None else {})
        layers["output"] = self.output
        return {f"head/{name}/{v.name}": v for name, layer in layers.items() for v in layer.weights}

    @property
    def variables(self) -> dict[str, keras.Variable]:
        """All variables by name in layer order, the backbone's first. The names are the same in every process."""
        by_name: dict[str, keras.Variable] = {}
        for layer in self.backbone.layers:
            for variable in layer.weights:
                key = f"backbone/{layer.name}/{variable.name}"
                while key in by_name:  # a layer with sublayers can have several variables of the same name
                    key += "_"
                by_name[key] = variable
        return by_name | self.head_variables


def count_parameters(variables: Iterable[Any]) -> int:
    """Return the total number of values in the variables."""
    return sum(math.prod(v.shape) for v in variables)


def count_variable_bytes(variables: Iterable[Any]) -> int:
    """Return the total size of the variables in bytes."""
    return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)


def build_classifier(config: ModelConfig, class_count: int, seed: int) -> Classifier:
    """Build the classifier that `config` describes. Random initial values depend only on `seed`.

    Must be called in the scope of the strategy, after Keras' global dtype policy is set.

    Raises:
        ModelError: there are fewer than two classes, the backbone cannot be built, or its weights cannot be loaded.
        Interrupted: ImageNet weights cannot be downloaded, because of the network or a full disk.
    """
    if class_count < 2:
        problem = f"the number of classes is {class_count}, and a classifier needs at least 2"
        raise ModelError(problem, fix="add images of another class")
    spec = find_backbone(config.backbone)
    image_size = config.image_size or spec.default_size
    backbone = build_with_weights(spec, image_size, config.alpha, config.weights, seed)
    for layer in backbone.layers:
        # The drop-connect layers of some families draw from a stateful generator. Checkpoints do not save its state, so
        # a resumed run would differ from an uninterrupted one.
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    hidden = []
    num_inputs = backbone.output_shape[-1]
    units = config.hidden_units
    for i, name in enumerate(_name_hidden_layers(len(units))):
        layer_seed = seed if i == 0 else seed + 1 + i  # the output layer has seed + 1
        activation = None if config.hidden_batch_norm else "relu"
        dense = _build_dense(units[i], num_inputs, name, layer_seed, activation)
        hidden.append(HiddenLayer(dense, _build_norm(units[i], f"{name}_norm") if config.hidden_batch_norm else None))
        num_inputs = units[i]
    output = _build_dense(class_count, num_inputs, "output", seed + 1, activation=None)
    return Classifier(
        spec, backbone, tuple(hidden), output,
        pooling=config.pooling, dropout=config.dropout, l2=config.l2, image_size=image_size,
    )  # fmt: skip


def _name_hidden_layers(count: int) -> list[str]:
    """Return the names of `count` hidden layers: hidden, hidden_2, hidden_3, ..."""
    return ["hidden" if i == 0 else f"hidden_{i + 1}" for i in range(count)]


def _build_norm(units: int, name: str) -> PaddingAwareBatchNormalization:
    """Build a BatchNormalization layer of the head, `head_NAME`, for [b, units]."""
    norm = PaddingAwareBatchNormalization(momentum=HEAD_NORM_MOMENTUM, dtype="float32", name=f"head_{name}")
    norm.build((None, units))
    return norm


def _build_dense(units: int, inputs: int, name: str, seed: int, activation: str | None) -> keras.layers.Dense:
    """Build a Dense layer of the head, `head_NAME`, with Glorot-uniform initial weights from `seed`."""
    glorot = keras.initializers.GlorotUniform(seed=seed)
    layer = keras.layers.Dense(units, activation, kernel_initializer=glorot, dtype="float32", name=f"head_{name}")
    layer.build((None, inputs))
    return layer
