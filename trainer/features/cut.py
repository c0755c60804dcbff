"""The cut of a classifier into a frozen trunk, whose outputs are computed once, and a tail that is trained on them."""

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
    """A tensor of the backbone at which it is cut.

    The layers below the cut are frozen. The layers above it use no other output of the layers below.
    """

    layer: str  # name of the layer or operation that computes the tensor
    layer_index: int  # index of that layer in `backbone.layers`; of the last layer before it if it is an operation
    tensor: Any  # KerasTensor [None, ...]
    pooled: bool  # whether the tensor is the output of the backbone; then the trunk pools it to float32 [b, C]
    shape: tuple[int, ...]  # of the trunk's output for one example
    dtype: str  # of the trunk's output: float32 if pooled, otherwise the compute dtype
    variables: dict[str, keras.Variable]  # of the trunk, by their names in `Classifier.variables`

    def fingerprint(self) -> str:
        """Return a hash of the names and values of the trunk's variables, 16 hex digits."""
        digest = hashlib.sha256()
        for name, variable in self.variables.items():
            value = tf.distribute.get_strategy().experimental_local_results(variable.value)[0]
            digest.update(name.encode() + b"\0" + value.numpy().tobytes())
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        where = f"layer {self.layer_index} ({self.layer})"
        shape = " x ".join(map(str, self.shape))
        return f"the backbone's end, pooled to {shape}" if self.pooled else f"{where}, {shape}"


def find_cut(classifier: Classifier) -> Cut | None:
    """Return the cut with the most layers below it, or None if no layer below any cut has weights.

    `apply_thaw` must have been called before, because it determines which layers are frozen.
    """
    backbone, operations = classifier.backbone, classifier.backbone.operations
    consumers = enumerate(operations[1:], 1)
    last_use = {id(tensor): index for index, op in consumers for tensor in keras.tree.flatten(op.input)}
    (end,) = backbone.outputs
    last_use[id(end)] = len(operations)
    # Tensors that an operation up to the current one computes and a later operation uses, by id, each with the index of
    # the operation that computes it. If there is only one such tensor, it is a cut.
    crossing: dict[int, tuple[int, Any]] = {}
    deepest, has_weights = None, False
    for index, operation in enumerate(operations):
        is_layer = isinstance(operation, keras.Layer)  # otherwise a function, such as the addition of two tensors
        if is_layer and (operation.trainable_weights or tracks_statistics(operation)):
            break
        has_weights |= is_layer and bool(operation.weights) and not isinstance(operation, keras.layers.Normalization)
        for tensor in keras.tree.flatten(operation.output):
            crossing[id(tensor)] = (index, tensor)
        crossing = {key: value for key, value in crossing.items() if last_use.get(key, -1) > index}
        if len(crossing) == 1 and has_weights:
            deepest = (index, *next(iter(crossing.values())))
    if deepest is None:
        return None
    last_index, producer, tensor = deepest
    layers = [operation for operation in operations[: last_index + 1] if isinstance(operation, keras.Layer)]
    trunk_ids = {id(variable) for layer in layers for variable in layer.weights}
    pooled = tensor is end
    return Cut(
        layer=operations[producer].name,
        layer_index=sum(isinstance(operation, keras.Layer) for operation in operations[: producer + 1]) - 1,
        tensor=tensor,
        pooled=pooled,
        shape=(tensor.shape[-1],) if pooled else tuple(tensor.shape[1:]),
        dtype="float32" if pooled else tensor.dtype,
        variables={name: variable for name, variable in classifier.variables.items() if id(variable) in trunk_ids},
    )


class Trunk:
    """The layers below one or more cuts of a classifier, for inference.

    The constructor folds BatchNormalization into convolutions, so the variables of the layers must not change later.
    """

    def __init__(self, classifier: Classifier, cuts: Sequence[Cut]) -> None:
        self.classifier, self.cuts = classifier, tuple(cuts)
        self._network = keras.Model(classifier.backbone.inputs, [cut.tensor for cut in cuts])
        self._folded = fold_weights(self._network)

    def features(self, images: Any) -> tuple[Any, ...]:
        """Return the features at each cut, [b, *shape], of images, uint8 or float32 [b, S, S, 3] in 0..255."""
        pixels = self.classifier.spec.preprocess(keras.ops.cast(images, "float32"))
        maps = keras.tree.flatten(apply_folded(self._network, pixels, weights=self._folded))
        outputs = zip(self.cuts, maps, strict=True)
        return tuple(self.classifier.pool(output) if cut.pooled else output for cut, output in outputs)


class Tail:
    """The layers above a cut, as a network whose input is the output of the trunk instead of images."""

    def __init__(self, classifier: Classifier, cut: Cut) -> None:
        self.classifier, self.cut = classifier, cut
        self._network = None if cut.pooled else keras.Model(cut.tensor, classifier.backbone.outputs[0])

    def logits(
        self, images: Any, *, training: bool = False, batch_norm_training: bool = False, seed: int = 0, step: Any = 0,
        position: Any = None, weight: Any = None,
    ) -> Any:  # fmt: skip
        """Return the logits, float32 [b, classes], for features.

        `images` are the features: outputs of the trunk, [b, *shape], of any float dtype. The other arguments are those
        of `Classifier.logits`.
        """
        maps = keras.ops.cast(images, self.cut.dtype)
        if self._network is not None:
            with use_example_weights(weight if batch_norm_training else None):
                maps = apply_folded(self._network, maps, batch_norm_training, fold_trainable=not training)
        return self.classifier.head_logits(maps, training, seed, step, position, weight)

    def collect_statistics(self) -> AbstractContextManager[dict[str, Any]]:
        """See `batch_norm.collect_statistics`."""
        return collect_statistics()

    @property
    def statistics_sizes(self) -> dict[str, int]:
        """Number of values that `collect_statistics` collects for each layer, by layer name."""
        return self.classifier.statistics_sizes  # layers below the cut have no moving averages to update

    def update_moving_averages(self, strategy: tf.distribute.Strategy, sums: Mapping[str, Any]) -> None:
        """Update the moving averages from the sums of `collect_statistics`, which are the same on all replicas."""
        self.classifier.update_moving_averages(strategy, sums)

    def l2_loss(self) -> tf.Tensor:
        """Return the L2 penalty on the head, a float32 scalar."""
        return self.classifier.l2_loss()
