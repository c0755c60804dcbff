"""The loss of each example against its label, and against a teacher's answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from trainer.errors import DataError

_SMALLEST = 1e-7  # 1 - p is floored here: the slope of (1 - p)^gamma is infinite at 0 where gamma < 1
_TINY = 1.2e-38  # the smallest normal float32; probabilities are floored here before the logarithm


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the loss of an example."""

    label_smoothing: float = 0.0
    focal_gamma: float | None = None  # None: cross-entropy
    class_weights: tuple[float, ...] | None = None  # one a class
    alpha: float = 1.0  # weight of the label's loss where a teacher answers, too
    temperature: float = 1.0  # both answers are softened by, where a teacher answers


def class_weights(
    given: Literal["none", "balanced"] | dict[str, float], class_names: Sequence[str], labels: np.ndarray
) -> tuple[float, ...] | None:
    """One loss weight per class; "balanced" is n / (classes * count), as scikit-learn has it.

    Args:
        given: `training.class_weights`.
        class_names: of the data.
        labels: int32 [n], of the training examples.

    Raises:
        DataError: a weight names a class that the data has not.
    """
    if given == "none":
        return None
    if given == "balanced":
        counts = np.bincount(labels, minlength=len(class_names))
        return tuple(float(w) for w in counts.sum() / (len(class_names) * np.maximum(counts, 1)))
    assert isinstance(given, dict)
    unknown = sorted(set(given) - set(class_names))
    if unknown:
        raise DataError(f"training.class_weights names {', '.join(unknown)}; the classes are {', '.join(class_names)}")
    return tuple(float(given.get(name, 1.0)) for name in class_names)


def _targets(labels: tf.Tensor, classes: int, smoothing: float) -> tf.Tensor:
    return tf.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """Softmax cross-entropy of each example, float32 [b]; smoothing as in Szegedy et al. 2016 (and Keras)."""
    return tf.nn.softmax_cross_entropy_with_logits(_targets(labels, logits.shape[-1], smoothing), logits)


def focal(labels: tf.Tensor, logits: tf.Tensor, gamma: float, smoothing: float = 0.0) -> tf.Tensor:
    """Focal loss of each example, float32 [b]: the sum over classes of -y (1 - p)^gamma log p.

    Lin et al. 2017 in the form of Keras' `CategoricalFocalCrossentropy(alpha=1)`; cross-entropy where gamma is 0. It is
    linear in the target y, so that smoothed and mixed targets are exactly the mean of the losses they are the mean of.
    """
    targets = _targets(labels, logits.shape[-1], smoothing)
    log_p = tf.nn.log_softmax(logits)
    others = tf.maximum(-tf.math.expm1(log_p), _SMALLEST)
    return -tf.reduce_sum(targets * others**gamma * log_p, -1)


def divergence(teacher_logits: tf.Tensor, logits: tf.Tensor, temperature: float = 1.0) -> tf.Tensor:
    """KL(teacher, student) of each example times temperature squared, float32 [b].

    Hinton et al. 2015, "Distilling the knowledge in a neural network": softened answers have gradients that shrink with
    1 / T^2; the factor keeps the weight of the labels what it is for any T.

    Args:
        teacher_logits: float32 [b, classes]; the logarithms of its probabilities do as well.
        logits: float32 [b, classes], the student's.
        temperature: T, divides both before the softmax.
    """
    teacher, student = tf.nn.log_softmax(teacher_logits / temperature), tf.nn.log_softmax(logits / temperature)
    return temperature**2 * tf.reduce_sum(tf.exp(teacher) * (teacher - student), -1)


def log_probs(probabilities: tf.Tensor) -> tf.Tensor:
    """Finite logarithms of probabilities, float32 of the same shape."""
    return tf.math.log(tf.maximum(probabilities, _TINY))


def weighted_losses(
    batch: dict[str, Any], logits: tf.Tensor, settings: LossSettings, teacher_logits: tf.Tensor | None = None
) -> tf.Tensor:
    """The loss of each example times its weight, float32 [b]; 0 for padding.

    Of a mixed example (`mix` and `other_label` in the batch) it is mix times the loss against `label` plus the rest
    times the loss against `other_label`, each with the weight of its own class. With a teacher's logits, float32
    [b, classes], it is alpha times that plus (1 - alpha) times `divergence`.
    """
    parts = [(batch["label"], batch["weight"])]
    if "mix" in batch:
        mix, weight = batch["mix"], batch["weight"]
        parts = [(batch["label"], weight * mix), (batch["other_label"], weight * (1.0 - mix))]
    soft = None
    if teacher_logits is not None:
        soft = (1.0 - settings.alpha) * divergence(teacher_logits, logits, settings.temperature)
    weighted = []
    for labels, weights in parts:
        if settings.focal_gamma is None:
            losses = cross_entropy(labels, logits, settings.label_smoothing)
        else:
            losses = focal(labels, logits, settings.focal_gamma, settings.label_smoothing)
        if soft is not None:
            losses = settings.alpha * losses + soft
        if settings.class_weights:
            weights = weights * tf.gather(tf.constant(settings.class_weights), labels)
        weighted.append(losses * weights)
    return weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]


def hits(batch: dict[str, Any], logits: tf.Tensor) -> tf.Tensor:
    """1.0 where the answer is correct, float32 [b]; of a mixed example the fraction of the class that was answered."""
    answers = tf.argmax(logits, -1, tf.int32)
    correct = tf.cast(answers == batch["label"], tf.float32)
    if "mix" not in batch:
        return correct
    return batch["mix"] * correct + (1.0 - batch["mix"]) * tf.cast(answers == batch["other_label"], tf.float32)
