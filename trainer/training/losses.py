"""Per-example losses: cross-entropy, focal loss and distillation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from trainer.errors import DataError

_SMALLEST = 1e-7  # lower bound of 1 - p: the slope of (1 - p)^gamma is infinite at 0 where gamma < 1
_TINY = 1.2e-38  # lower bound of a probability before the logarithm: the smallest normal float32


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the per-example loss."""

    label_smoothing: float = 0.0
    focal_gamma: float | None = None  # None: cross-entropy
    class_weights: tuple[float, ...] | None = None  # per class
    alpha: float = 1.0  # distillation: weight of the loss against the label
    temperature: float = 1.0  # distillation: divides the logits of teacher and student


def class_weights(
    setting: Literal["none", "balanced"] | dict[str, float], class_names: Sequence[str], labels: np.ndarray
) -> tuple[float, ...] | None:
    """Compute one loss weight per class; "balanced" is n / (classes * count), as in scikit-learn.

    Args:
        setting: `training.class_weights`.
        class_names: of the data.
        labels: int32 [n], of the training examples.

    Raises:
        DataError: the setting names a class that is not in the data.
    """
    if setting == "none":
        return None
    if setting == "balanced":
        counts = np.bincount(labels, minlength=len(class_names))
        return tuple(float(w) for w in counts.sum() / (len(class_names) * np.maximum(counts, 1)))
    assert isinstance(setting, dict)
    if unknown := ", ".join(sorted(set(setting) - set(class_names))):
        raise DataError(
            f"the data has no class {unknown}", key="training.class_weights", fix=f"use {', '.join(class_names)}"
        )
    return tuple(float(setting.get(name, 1.0)) for name in class_names)


def _targets(labels: tf.Tensor, classes: int, smoothing: float) -> tf.Tensor:
    return tf.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """Softmax cross-entropy per example, float32 [b], with label smoothing (Szegedy et al. 2016)."""
    return tf.nn.softmax_cross_entropy_with_logits(_targets(labels, logits.shape[-1], smoothing), logits)


def focal(labels: tf.Tensor, logits: tf.Tensor, gamma: float, smoothing: float = 0.0) -> tf.Tensor:
    """Focal loss per example (Lin et al. 2017), float32 [b]: the sum over classes of -y (1 - p)^gamma log p.

    Equal to Keras' `CategoricalFocalCrossentropy(alpha=1)`, and to cross-entropy where gamma is 0. It is linear in the
    target y: the loss of a smoothed or mixed target is the weighted mean of the losses of its classes.
    """
    targets = _targets(labels, logits.shape[-1], smoothing)
    log_p = tf.nn.log_softmax(logits)
    others = tf.maximum(-tf.math.expm1(log_p), _SMALLEST)
    return -tf.reduce_sum(targets * others**gamma * log_p, -1)


def divergence(teacher_logits: tf.Tensor, logits: tf.Tensor, temperature: float = 1.0) -> tf.Tensor:
    """Distillation loss per example, float32 [b]: KL(teacher, student) times temperature squared.

    Hinton et al. 2015, "Distilling the knowledge in a neural network": gradients of soft labels scale with 1 / T^2; the
    factor T^2 keeps the relative weight of the labels independent of T.

    Args:
        teacher_logits: float32 [b, classes]; log-probabilities are equivalent.
        logits: float32 [b, classes], of the student.
        temperature: T, divides both logits before the softmax.
    """
    teacher, student = tf.nn.log_softmax(teacher_logits / temperature), tf.nn.log_softmax(logits / temperature)
    return temperature**2 * tf.reduce_sum(tf.exp(teacher) * (teacher - student), -1)


def log_probs(probabilities: tf.Tensor) -> tf.Tensor:
    """Log-probabilities, float32 of the same shape; finite for a probability of 0."""
    return tf.math.log(tf.maximum(probabilities, _TINY))


def weighted_losses(
    batch: dict[str, Any], logits: tf.Tensor, settings: LossSettings, teacher_logits: tf.Tensor | None = None
) -> tf.Tensor:
    """Per-example loss times weight, float32 [b]; 0 for padding.

    The loss of a mixed example (`mix` and `other_label` in the batch) is mix times the loss against `label` plus
    (1 - mix) times the loss against `other_label`, each with its class weight. With teacher logits, float32
    [b, classes], it is alpha times that plus (1 - alpha) times `divergence`.
    """
    targets = [(batch["label"], batch["weight"])]
    if "mix" in batch:
        mix, weight = batch["mix"], batch["weight"]
        targets = [(batch["label"], weight * mix), (batch["other_label"], weight * (1.0 - mix))]
    soft = None
    if teacher_logits is not None:
        soft = (1.0 - settings.alpha) * divergence(teacher_logits, logits, settings.temperature)
    weighted = []
    for labels, weights in targets:
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


def example_accuracy(batch: dict[str, Any], logits: tf.Tensor) -> tf.Tensor:
    """Accuracy per example, float32 [b]: 1 or 0; for a mixed example, the fraction of the predicted class."""
    predictions = tf.argmax(logits, -1, tf.int32)
    correct = tf.cast(predictions == batch["label"], tf.float32)
    if "mix" not in batch:
        return correct
    return batch["mix"] * correct + (1.0 - batch["mix"]) * tf.cast(predictions == batch["other_label"], tf.float32)
