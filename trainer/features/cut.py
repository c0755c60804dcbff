"""The cut of a classifier into a frozen trunk, whose output can be computed once, and a tail that trains on it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from trainer.models.batch_norm import NORM, example_weights
from trainer.models.bn_folding import apply_folded, fold_weights
from trainer.models.classifier import Classifier


@dataclass(frozen=True)
class Cut:
    """A tensor of the backbone that everything above it is computed from, and below which nothing trains."""

    layer: str  # name of the layer whose output it is
    number: int  # of that layer in `backbone.layers`
    tensor: Any  # KerasTensor [None, ...] of the backbone
    pooled: bool  # True at the backbone's end, where the trunk pools: float32 [b, C]
    shape: tuple[int, ...]  # of the trunk's output for one example
    dtype: str  # of the trunk's output: float32, or the compute dtype of a lower precision
    variables: dict[str, keras.Variable]  # of the trunk, named as in `Classifier.variables`

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify the weights below the cut."""
        digest = hashlib.sha256()
        for name, variable in self.variables.items():
            value = tf.distribute.get_strategy().experimental_local_results(variable.value)[0]
            digest.update(name.encode() + b"\0" + value.numpy().tobytes())
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        where = f"layer {self.number} ({self.layer})"
        shape = " x ".join(map(str, self.shape))
        return f"the backbone's end, pooled to {shape}" if self.pooled else f"{where}, {shape}"


def is_moving(layer: keras.Layer) -> bool:
    """True if training updates the moving averages of a layer."""
    return isinstance(layer, NORM) and layer.trainable


def find_cut(classifier: Classifier) -> Cut | None:
    """Return the deepest cut of a classifier after `apply_thaw`; None if no layer with weights is below any."""
    backbone, operations = classifier.backbone, classifier.backbone.operations
    uses = enumerate(operations[1:], 1)
    last_use = {id(tensor): number for number, op in uses for tensor in keras.tree.flatten(op.input)}
    (end,) = backbone.outputs
    last_use[id(end)] = len(operations)
    crossing: dict[int, tuple[int, Any]] = {}
    deepest, has_weights = None, False
    for number, operation in enumerate(operations):
        is_layer = isinstance(operation, keras.Layer)  # else a function, such as the addition of two tensors
        if is_layer and (operation.trainable_weights or is_moving(operation)):
            break
        has_weights |= is_layer and bool(operation.weights) and not isinstance(operation, keras.layers.Normalization)
        for tensor in keras.tree.flatten(operation.output):
            crossing[id(tensor)] = (number, tensor)
        crossing = {key: value for key, value in crossing.items() if last_use.get(key, -1) > number}
        if len(crossing) == 1 and has_weights:
            deepest = (number, *next(iter(crossing.values())))
    if deepest is None:
        return None
    below, number, tensor = deepest
    layers = [operation for operation in operations[: below + 1] if isinstance(operation, keras.Layer)]
    own = {id(variable) for layer in layers for variable in layer.weights}
    pooled = tensor is end
    return Cut(
        layer=operations[number].name,
        number=sum(isinstance(operation, keras.Layer) for operation in operations[: number + 1]) - 1,
        tensor=tensor,
        pooled=pooled,
        shape=(tensor.shape[-1],) if pooled else tuple(tensor.shape[1:]),
        dtype="float32" if pooled else tensor.dtype,
        variables={name: variable for name, variable in classifier.variables.items() if id(variable) in own},
    )


class Trunk:
    """The layers below some cuts of one classifier, for inference with its current weights."""

    def __init__(self, classifier: Classifier, cuts: Sequence[Cut]) -> None:
        self.classifier, self.cuts = classifier, tuple(cuts)
        self._front = keras.Model(classifier.backbone.inputs, [cut.tensor for cut in cuts])
        self._weights = fold_weights(self._front)

    def features(self, images: Any) -> tuple[Any, ...]:
        """Compute for each cut [b, *shape] of its dtype from images uint8 or float32 [b, S, S, 3] in 0..255."""
        pixels = self.classifier.kind.preprocess(keras.ops.cast(images, "float32"))
        maps = keras.tree.flatten(apply_folded(self._front, pixels, weights=self._weights))
        return tuple(
            self.classifier.pooled(made) if cut.pooled else made for cut, made in zip(self.cuts, maps, strict=True)
        )


class Tail:
    """The layers above a cut; training and scoring use it as a classifier of the trunk's output."""

    def __init__(self, classifier: Classifier, cut: Cut) -> None:
        self.classifier, self.cut = classifier, cut
        self._back = None if cut.pooled else keras.Model(cut.tensor, classifier.backbone.outputs[0])

    def logits(
        self, images: Any, *, training: bool = False, batch_norm_training: bool = False, seed: int = 0, step: Any = 0,
        position: Any = None, weight: Any = None,
    ) -> Any:  # fmt: skip
        """Compute float32 logits [b, classes] from the trunk's output [b, *shape], of any floating dtype.

        The other arguments are those of `Classifier.logits`.
        """
        maps = keras.ops.cast(images, self.cut.dtype)
        if self._back is not None:
            with example_weights(weight if batch_norm_training else None):
                maps = apply_folded(self._back, maps, batch_norm_training)
        return self.classifier.head_logits(maps, training, seed, step, position)

    def l2_loss(self) -> tf.Tensor:
        return self.classifier.l2_loss()
