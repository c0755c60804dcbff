"""The inputs of an export: the trained model with its metadata, and the examples of the parity check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.decoding import Resize
from trainer.private_api import get_library_class, swap_class
from trainer.types import Orientation

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


@dataclass(frozen=True)
class ExportBundle:
    """A trained model with the metadata for its exports. S is `image_size`, the side of its square input in pixels."""

    build_model: Callable[[], keras.Model]  # builds a model: float32 [n, S, S, 3] in 0..255 -> probabilities
    predict: Any  # tf.function: float32 [n, S, S, 3] in 0..255 -> {"probabilities": float32 [n, classes]}
    predict_in_float32: Any  # the same function, computing in float32 in a run of any precision
    explain: Callable[[Any], dict[str, Any]]  # uint8 [n, S, S, 3] -> probabilities, embedding, heatmap, as tensors
    variables: Sequence[tf.Variable]  # all variables that `predict` and `explain` read
    class_names: tuple[str, ...]  # in the order of the probabilities
    image_size: int
    resize: Resize  # how images become square
    reference: Mapping[str, Any]  # content of reference.json, for the drift check
    calibration_images: Callable[[], np.ndarray]  # reads training images, uint8 [k, S, S, 3], to calibrate int8
    orientation: Orientation = "exif"  # "exif": encoded images are rotated upright by their EXIF tag; "ignore": not


@dataclass(frozen=True)
class ParityExamples:
    """Examples of the test or validation split, with the probabilities that the trained model computed for them.

    Rounding changes predictions, so each export is compared with probabilities computed in its own precision.
    """

    images: np.ndarray  # uint8 [n, S, S, 3]
    labels: np.ndarray  # int [n]
    probabilities: np.ndarray  # float32 [n, classes], computed in the run's precision
    # float32 [n, classes], computed in float32. The same array as `probabilities` if the run's precision is float32.
    float32_probabilities: np.ndarray


def sample_examples(examples: ParityExamples, max_count: int) -> ParityExamples:
    """Return at most `max_count` of the examples, at equal intervals."""
    rows = np.linspace(0, len(examples.labels) - 1, min(max_count, len(examples.labels))).astype(np.int64)
    return ParityExamples(
        examples.images[rows],
        examples.labels[rows],
        examples.probabilities[rows],
        examples.float32_probabilities[rows],
    )


def _collect_layers(root: Any) -> list[Any]:
    """List a model and its layers, including the layers of nested models."""
    return [root, *(inner for layer in getattr(root, "layers", ()) for inner in _collect_layers(layer))]


def computes_in_half_precision(model: keras.Model) -> bool:
    """Return whether any layer of a model computes in bfloat16 or float16."""
    return any(layer.compute_dtype in ("bfloat16", "float16") for layer in _collect_layers(model))


@contextmanager
def as_plain_float32(model: keras.Model) -> Iterator[None]:
    """Context manager in which `model` computes in float32 and contains only Keras' own layer classes.

    LiteRT and ONNX have few kernels for half precision, and a file with custom layers could be loaded only with this
    package.
    """
    originals = [(layer, layer.dtype_policy, type(layer)) for layer in _collect_layers(model)]
    try:
        for layer, _, cls in originals:
            layer.dtype_policy = "float32"
            if get_library_class(layer) is not cls:  # a subclass that this package defines
                swap_class(layer, get_library_class(layer))
        yield
    finally:
        for layer, policy, cls in originals:
            layer.dtype_policy = policy
            if type(layer) is not cls:
                swap_class(layer, cls)
