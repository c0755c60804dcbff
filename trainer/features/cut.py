"""Cut a classifier into a frozen trunk, whose outputs are computed once, and a tail that is trained on them."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from trainer.models.batch_norm import collect_statistics, tracks_statistics, use_example_weights
from trainer.models.bn_folding import apply_folded, fold_weights
from trainer.models.classifier import Classifier


@dataclass(frozen=True)
class Cut:
    """A tensor at which the backbone is cut into trunk (the layers below it) and tail (those above it, and the head).

    The layers below the cut are frozen. The layers above the cut use no other output of the layers below it.
    """

    layer: str  # name of the layer or operation that computes the tensor
    layer_index: int  # index of this layer in `backbone.layers`; for an operation, index of the last layer before it
    tensor: Any  # KerasTensor [None, ...]
    pooled: bool  # whether the tensor is the backbone's output, which the trunk pools to float32 [b, channels]
    shape: tuple[int, ...]  # shape of the trunk's output for one example
    dtype: str  # dtype of the trunk's output: float32 if pooled, otherwise the compute dtype
    variables: dict[str, keras.Variable]  # the trunk's variables, by their names in `Classifier.variables`

    def compute_fingerprint(self) -> str:
        """Return a hash of the names and values of the trunk's variables, 16 hex digits."""
        digest = hashlib.sha256()
        for name, variable in self.variables.items():
            value = tf.distribute.get_strategy().experimental_local_results(variable.value)[0]
            digest.update(name.encode() + b"\0" + value.numpy().tobytes())
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        position = f"layer {self.layer_index} ({self.layer})"
        shape = " x ".join(map(str, self.shape))
        return f"the backbone's end, pooled to {shape}" if self.pooled else f"{position}, {shape}"


def find_cut(classifier: Classifier) -> Cut | None:
    """Return the cut with the most layers below it, or None if no cut has a layer with weights below it.

    Call `set_trainable_layers` (`trainer.models.freezing`) first, because it determines which layers are frozen.
    """
    backbone, operations = classifier.backbone, classifier.backbone.operations
    consumers = enumerate(operations[1:], 1)
    last_use = {id(tensor): index for index, op in consumers for tensor in keras.tree.flatten(op.input)}
    (output,) = backbone.outputs
    last_use[id(output)] = len(operations)
    # Tensors that have been computed and that a later operation uses, by id, each with the index of the operation that
    # computes it. If there is only one such tensor, it is a cut.
    live_tensors: dict[int, tuple[int, Any]] = {}
    deepest_cut, has_weights = None, False
    for index, operation in enumerate(operations):
        is_layer = isinstance(operation, keras.Layer)  # otherwise a function, such as the addition of two tensors
        if is_layer and (operation.trainable_weights or tracks_statistics(operation)):
            break
        has_weights |= is_layer and bool(operation.weights) and not isinstance(operation, keras.layers.Normalization)
        for tensor in keras.tree.flatten(operation.output):
            live_tensors[id(tensor)] = (index, tensor)
        live_tensors = {key: value for key, value in live_tensors.items() if last_use.get(key, -1) > index}
        if len(live_tensors) == 1 and has_weights:
            deepest_cut = (index, *next(iter(live_tensors.values())))
    if deepest_cut is None:
        return None
    last_index, producer_index, tensor = deepest_cut
    layers = [operation for operation in operations[: last_index + 1] if isinstance(operation, keras.Layer)]
    trunk_ids = {id(variable) for layer in layers for variable in layer.weights}
    pooled = tensor is output
    return Cut(
        layer=operations[producer_index].name,
        layer_index=sum(isinstance(operation, keras.Layer) for operation in operations[: producer_index + 1]) - 1,
        tensor=tensor,
        pooled=pooled,
        shape=(tensor.shape[-1],) if pooled else tuple(tensor.shape[1:]),
        dtype="float32" if pooled else tensor.dtype,
        variables={name: variable for name, variable in classifier.variables.items() if id(variable) in trunk_ids},
    )


class Trunk:
    """The layers below one or more cuts of a classifier, for inference.

    The constructor folds BatchNormalization into convolutions, so the layers' variables must not change later.
    """

    def __init__(self, classifier: Classifier, cuts: Sequence[Cut]) -> None:
        self.classifier, self.cuts = classifier, tuple(cuts)
        self._network = keras.Model(classifier.backbone.inputs, [cut.tensor for cut in cuts])
        self._folded = fold_weights(self._network)

    def features(self, images: Any) -> tuple[Any, ...]:
        """Return the features [b, *shape] at each cut for images, uint8 or float32 [b, size, size, 3] in 0..255."""
        pixels = self.classifier.spec.preprocess(keras.ops.cast(images, "float32"))
        outputs = keras.tree.flatten(apply_folded(self._network, pixels, weights=self._folded))
        cut_outputs = zip(self.cuts, outputs, strict=True)
        return tuple(self.classifier.pool(output) if cut.pooled else output for cut, output in cut_outputs)


class Tail:
    """The layers above a cut, as a network whose input is the trunk's output instead of images."""

    def __init__(self, classifier: Classifier, cut: Cut) -> None:
        self.classifier, self.cut = classifier, cut
        self._network = None if cut.pooled else keras.Model(cut.tensor, classifier.backbone.outputs[0])

    def logits(
        self, images: Any, *, training: bool = False, batch_norm_training: bool = False, seed: int = 0, step: Any = 0,
        position: Any = None, weight: Any = None,
    ) -> Any:  # fmt: skip
        """Return the logits, float32 [b, classes], for features.

        `images` are the features, which the trunk has computed: [b, *shape], any float dtype. The name and the other
        arguments are the same as in `Classifier.logits`, so that either network can be trained.
        """
        features = keras.ops.cast(images, self.cut.dtype)
        if self._network is not None:
            with use_example_weights(weight if batch_norm_training else None):
                features = apply_folded(self._network, features, batch_norm_training, fold_trainable=not training)
        return self.classifier.head_logits(features, training, seed, step, position, weight)

    def collect_statistics(self) -> AbstractContextManager[dict[str, Any]]:
        """Collect the BatchNormalization statistics of a batch by layer name (see `batch_norm.collect_statistics`)."""
        return collect_statistics()

    @property
    def statistics_sizes(self) -> dict[str, int]:
        """Number of values that `collect_statistics` collects for each layer, by layer name."""
        return self.classifier.statistics_sizes  # layers below the cut have no moving averages to update

    def update_moving_averages(self, strategy: tf.distribute.Strategy, sums: Mapping[str, Any]) -> None:
        """Update the moving averages from sums of the collected statistics, which must be the same on all replicas."""
        self.classifier.update_moving_averages(strategy, sums)

    def l2_loss(self) -> tf.Tensor:
        """Return the L2 penalty on the head, a float32 scalar."""
        return self.classifier.l2_loss()
