"""The model to export with its metadata, and the examples of the parity check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.decoding import Resize
from trainer.private_api import library_class, swap_class

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class ExportBundle:
    """A trained model with the metadata of its files; S is the side of its images in pixels."""

    model: keras.Model  # float32 [n, S, S, 3] in 0..255 -> float32 probabilities [n, classes]
    explain: Callable[[Any], dict[str, Any]]  # the same images -> `trainer.models.grad_cam`
    class_names: tuple[str, ...]  # in the order of the probabilities
    image_size: int
    resize: Resize
    reference: Mapping[str, Any]  # `trainer.exporting.reference`
    examples: Callable[[], np.ndarray]  # uint8 [k, S, S, 3] of the training split, to calibrate int8


@dataclass(frozen=True)
class ParityExamples:
    """Examples that the model was not trained on, with the trainer's own predictions."""

    images: np.ndarray  # uint8 [n, S, S, 3]
    labels: np.ndarray  # int [n]
    probabilities: np.ndarray  # float32 [n, classes]


@contextmanager
def plain_float32(model: keras.Model) -> Iterator[None]:
    """Make `model` compute in float32 and consist of Keras' own layers within the context.

    LiteRT and ONNX have few kernels for half precision, and custom layers load only with this package. The statistics
    of a Normalization become arrays, since tf2onnx would turn the tensors into inputs.
    """

    def layers(root: Any) -> list[Any]:
        return [root, *(inner for layer in getattr(root, "layers", ()) for inner in layers(layer))]

    before = [(layer, layer.dtype_policy, type(layer)) for layer in layers(model)]
    norms = [(layer, layer.mean, layer.variance) for layer, _, kind in before if kind.__name__ == "Normalization"]
    try:
        for layer, mean, variance in norms:
            layer.mean, layer.variance = np.asarray(mean), np.asarray(variance)
        for layer, _, kind in before:
            layer.dtype_policy = "float32"
            if library_class(layer) is not kind:  # this package's BatchNormalization
                swap_class(layer, library_class(layer))
        yield
    finally:
        for layer, mean, variance in norms:
            layer.mean, layer.variance = mean, variance
        for layer, policy, kind in before:
            layer.dtype_policy = policy
            if type(layer) is not kind:
                swap_class(layer, kind)
