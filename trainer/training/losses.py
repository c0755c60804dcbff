"""Per-example losses: cross-entropy, focal loss and distillation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from trainer.errors import DataError
from trainer.names import class_name

# Guessing all classes equally has the loss ln(classes). The first steps of a published recipe, RMSprop at 0.1 on pooled
# features, reach up to a hundred times as much and recover.
MAX_LOSS_RATIO = 300
_MIN_COMPLEMENT = 1e-7  # lower bound of 1 - p: for gamma < 1, the slope of (1 - p)^gamma is infinite at 0
_MIN_PROBABILITY = 1.2e-38  # lower bound before the logarithm: the smallest normal float32


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the per-example loss."""

    label_smoothing: float = 0.0
    focal_gamma: float | None = None  # of the focal loss; None for cross-entropy
    class_weights: tuple[float, ...] | None = None  # loss weight per class; None if all are 1
    alpha: float = 1.0  # distillation: weight of the loss against the label; 1 - alpha is that of the teacher
    temperature: float = 1.0  # distillation: divisor of the logits of teacher and student


def class_weights(
    setting: Literal["none", "balanced"] | dict[str, float], class_names: Sequence[str], labels: np.ndarray
) -> tuple[float, ...] | None:
    """Return a loss weight per class, or None if all are 1.

    Args:
        setting: "none"; "balanced", for n / (classes * count of the class) as in scikit-learn; or weights by class
            name, 1 for the classes that it does not name.
        labels: int32 [n], of the training examples.

    Raises:
        DataError: the setting names a class twice or one that is not in the data, or only examples of one class have a
            weight above 0.
    """
    if setting == "none":
        return None
    if setting == "balanced":
        counts = np.bincount(labels, minlength=len(class_names))
        return tuple(float(w) for w in counts.sum() / (len(class_names) * np.maximum(counts, 1)))
    assert isinstance(setting, dict)
    weights = {class_name(name): weight for name, weight in setting.items()}
    if len(weights) < len(setting):
        twice = ", ".join(repr(name) for name in setting if [*map(class_name, setting)].count(class_name(name)) > 1)
        problem = f"has several weights for one class: {twice}"
        raise DataError(problem, key="training.class_weights", fix="give each class one weight")
    if unknown := ", ".join(sorted(set(weights) - set(class_names))):
        problem, fix = f"the data has no class {unknown}", f"use {', '.join(class_names)}"
        raise DataError(problem, key="training.class_weights", fix=fix)
    per_class = tuple(float(weights.get(name, 1.0)) for name in class_names)
    weighted = np.unique(labels[np.take(per_class, labels) > 0])
    if len(weighted) < min(2, len(np.unique(labels))):
        others = f" that is not {class_names[weighted[0]]}" if len(weighted) else ""
        problem = f"is 0 for every training example{others}, so nothing would be learned"
        raise DataError(problem, key="training.class_weights", fix="use a weight above 0 for at least two classes")
    return per_class


def largest_plausible_loss(settings: LossSettings, classes: int) -> float:
    """Return the mean loss above which training has diverged: `MAX_LOSS_RATIO` times ln(classes).

    It is multiplied by the largest class weight, and with a teacher by the squared temperature, as the losses are.
    """
    scale = max(settings.class_weights or (1.0,)) * (max(settings.temperature, 1.0) ** 2 if settings.alpha < 1 else 1.0)
    return MAX_LOSS_RATIO * math.log(classes) * scale


def _targets(labels: tf.Tensor, classes: int, smoothing: float) -> tf.Tensor:
    """Return smoothed one-hot labels, float32 [b, classes]."""
    return tf.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """Compute the softmax cross-entropy per example, float32 [b], with label smoothing (Szegedy et al. 2016)."""
    return tf.nn.softmax_cross_entropy_with_logits(_targets(labels, logits.shape[-1], smoothing), logits)


def focal(labels: tf.Tensor, logits: tf.Tensor, gamma: float, smoothing: float = 0.0) -> tf.Tensor:
    """Compute the focal loss per example (Lin et al. 2017), float32 [b]: the class sum of -y (1 - p)^gamma log p.

    It equals Keras' `CategoricalFocalCrossentropy(alpha=1)`, and cross-entropy if gamma is 0. It is linear in the
    target y, so the loss of a smoothed or mixed target is the weighted mean of the losses of its classes.
    """
    targets = _targets(labels, logits.shape[-1], smoothing)
    log_p = tf.nn.log_softmax(logits)
    complements = tf.maximum(-tf.math.expm1(log_p), _MIN_COMPLEMENT)
    return -tf.reduce_sum(targets * complements**gamma * log_p, -1)


def divergence(teacher_logits: tf.Tensor, logits: tf.Tensor, temperature: float = 1.0) -> tf.Tensor:
    """Compute the distillation loss per example, float32 [b]: T^2 * KL(teacher, student) at temperature T.

    The gradients of soft labels scale with 1 / T^2; the factor T^2 makes their weight relative to the labels
    independent of T (Hinton et al. 2015, "Distilling the knowledge in a neural network"). Both logits, float32
    [b, classes], are divided by T; log-probabilities of the teacher are equivalent to its logits.
    """
    teacher, student = tf.nn.log_softmax(teacher_logits / temperature), tf.nn.log_softmax(logits / temperature)
    return temperature**2 * tf.reduce_sum(tf.exp(teacher) * (teacher - student), -1)


def log_probs(probabilities: tf.Tensor) -> tf.Tensor:
    """Compute the logarithm of probabilities, float32; it is finite for a probability of 0."""
    return tf.math.log(tf.maximum(probabilities, _MIN_PROBABILITY))


def weighted_losses(
    batch: dict[str, Any], logits: tf.Tensor, settings: LossSettings, teacher_logits: tf.Tensor | None = None
) -> tf.Tensor:
    """Compute the loss times the weight of each example, float32 [b]; 0 for padding.

    The weight is that of the batch times that of the class. With `teacher_logits`, float32 [b, classes], the loss is
    alpha times the loss against the label plus (1 - alpha) times the distillation loss. A batch with `mix` and
    `other_label` has mixed examples: `label` counts with the weight `mix`, and `other_label` with 1 - `mix`.
    """
    targets = [(batch["label"], batch["weight"])]
    if "mix" in batch:
        mix, weight = batch["mix"], batch["weight"]
        targets = [(batch["label"], weight * mix), (batch["other_label"], weight * (1.0 - mix))]
    distillation = None
    if teacher_logits is not None:
        distillation = (1.0 - settings.alpha) * divergence(teacher_logits, logits, settings.temperature)
    weighted = []
    for labels, weights in targets:
        if settings.focal_gamma is None:
            losses = cross_entropy(labels, logits, settings.label_smoothing)
        else:
            losses = focal(labels, logits, settings.focal_gamma, settings.label_smoothing)
        if distillation is not None:
            losses = settings.alpha * losses + distillation
        if settings.class_weights:
            weights = weights * tf.gather(tf.constant(settings.class_weights), labels)
        weighted.append(losses * weights)
    return weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]


def example_accuracy(batch: dict[str, Any], logits: tf.Tensor) -> tf.Tensor:
    """Compute the accuracy of each example, float32 [b]: 1 or 0, or for mixed ones the predicted class's weight."""
    predictions = tf.argmax(logits, -1, tf.int32)
    correct = tf.cast(predictions == batch["label"], tf.float32)
    if "mix" not in batch:
        return correct
    return batch["mix"] * correct + (1.0 - batch["mix"]) * tf.cast(predictions == batch["other_label"], tf.float32)
