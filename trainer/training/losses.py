"""Per-example losses: cross-entropy, focal loss and distillation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from trainer.errors import DataError
from trainer.names import normalize_class_name

# Uniform predictions have the loss ln(classes). With a published recipe (RMSprop at 0.1 on pooled features) the first
# steps reach up to a hundred times as much, and training recovers.
MAX_LOSS_RATIO = 300
_MIN_COMPLEMENT = 1e-7  # lower bound of 1 - p: for gamma < 1, the slope of (1 - p)^gamma is infinite at 0
_MIN_PROBABILITY = 1.2e-38  # lower bound before the logarithm: the smallest normal float32


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the per-example loss."""

    label_smoothing: float = 0.0
    focal_gamma: float | None = None  # of the focal loss; None for cross-entropy
    class_weights: tuple[float, ...] | None = None  # loss weight per class; None if all are 1
    alpha: float = 1.0  # distillation: weight of the label's loss; the teacher's is 1 - alpha
    temperature: float = 1.0  # distillation: divisor of the logits of teacher and student


def compute_class_weights(
    setting: Literal["none", "balanced"] | dict[str, float], class_names: Sequence[str], labels: np.ndarray
) -> tuple[float, ...] | None:
    """Compute a loss weight per class. Return None if all are 1.

    Args:
        setting: "none"; "balanced", which is n / (classes * class count) as in scikit-learn; or weights by class name,
            which default to 1.
        labels: class indices of the training examples, int32 [n].

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
    weights = {normalize_class_name(name): weight for name, weight in setting.items()}
    if len(weights) < len(setting):
        twice = ", ".join(
            repr(name)
            for name in setting
            if [*map(normalize_class_name, setting)].count(normalize_class_name(name)) > 1
        )
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


def max_plausible_loss(settings: LossSettings, classes: int) -> float:
    """Return the mean loss above which training has diverged, for a number of `classes`.

    It is `MAX_LOSS_RATIO` times ln(classes). Like the losses themselves, it is scaled by the largest class weight and,
    with a teacher, by the square of a temperature above 1.
    """
    scale = max(settings.class_weights or (1.0,)) * (max(settings.temperature, 1.0) ** 2 if settings.alpha < 1 else 1.0)
    return MAX_LOSS_RATIO * math.log(classes) * scale


def _smooth_labels(labels: tf.Tensor, classes: int, smoothing: float) -> tf.Tensor:
    """Return smoothed one-hot labels, float32 [b, classes]."""
    return tf.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """Compute the softmax cross-entropy per example, float32 [b], with label smoothing (Szegedy et al. 2016)."""
    return tf.nn.softmax_cross_entropy_with_logits(_smooth_labels(labels, logits.shape[-1], smoothing), logits)


def focal_loss(labels: tf.Tensor, logits: tf.Tensor, gamma: float, smoothing: float = 0.0) -> tf.Tensor:
    """Compute the focal loss per example (Lin et al. 2017), float32 [b].

    The loss is the sum of -y (1 - p)^gamma log p over the classes. It equals Keras'
    `CategoricalFocalCrossentropy(alpha=1)`, and cross-entropy if gamma is 0. It is linear in the target y, so the loss
    of a smoothed or mixed target is the weighted mean of the losses of its classes.
    """
    targets = _smooth_labels(labels, logits.shape[-1], smoothing)
    log_p = tf.nn.log_softmax(logits)
    complements = tf.maximum(-tf.math.expm1(log_p), _MIN_COMPLEMENT)
    return -tf.reduce_sum(targets * complements**gamma * log_p, -1)


def distillation_loss(teacher_logits: tf.Tensor, logits: tf.Tensor, temperature: float = 1.0) -> tf.Tensor:
    """Compute the distillation loss per example, float32 [b].

    The loss is T^2 * KL(teacher, student) at temperature T. The gradients of soft labels scale with 1 / T^2, and the
    factor T^2 makes their weight relative to the labels independent of T (Hinton et al. 2015, "Distilling the knowledge
    in a neural network"). Both logits, float32 [b, classes], are divided by T. Log-probabilities of the teacher are
    equivalent to its logits.
    """
    teacher, student = tf.nn.log_softmax(teacher_logits / temperature), tf.nn.log_softmax(logits / temperature)
    return temperature**2 * tf.reduce_sum(tf.exp(teacher) * (teacher - student), -1)


def log_probs(probabilities: tf.Tensor) -> tf.Tensor:
    """Compute the logarithm of float32 probabilities, which is finite even for 0."""
    return tf.math.log(tf.maximum(probabilities, _MIN_PROBABILITY))


def weighted_losses(
    batch: dict[str, Any], logits: tf.Tensor, settings: LossSettings, teacher_logits: tf.Tensor | None = None
) -> tf.Tensor:
    """Compute the weighted loss of each example, float32 [b]. It is 0 for padding.

    The weight is that of the example times that of its class. With `teacher_logits`, float32 [b, classes], the loss is
    alpha times the loss against the label plus (1 - alpha) times the distillation loss. In a batch with the columns
    `mix` and `other_label`, `label` counts with the weight `mix`, and `other_label` with 1 - `mix`.
    """
    targets = [(batch["label"], batch["weight"])]
    if "mix" in batch:
        mix, weight = batch["mix"], batch["weight"]
        targets = [(batch["label"], weight * mix), (batch["other_label"], weight * (1.0 - mix))]
    distillation = None
    if teacher_logits is not None:
        distillation = (1.0 - settings.alpha) * distillation_loss(teacher_logits, logits, settings.temperature)
    weighted = []
    for labels, weights in targets:
        if settings.focal_gamma is None:
            losses = cross_entropy(labels, logits, settings.label_smoothing)
        else:
            losses = focal_loss(labels, logits, settings.focal_gamma, settings.label_smoothing)
        if distillation is not None:
            losses = settings.alpha * losses + distillation
        if settings.class_weights:
            weights = weights * tf.gather(tf.constant(settings.class_weights), labels)
        weighted.append(losses * weights)
    return weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]


def example_accuracy(batch: dict[str, Any], logits: tf.Tensor) -> tf.Tensor:
    """Compute the accuracy of each example, float32 [b]. For mixed examples it is the weight of the predicted class."""
    predictions = tf.argmax(logits, -1, tf.int32)
    correct = tf.cast(predictions == batch["label"], tf.float32)
    if "mix" not in batch:
        return correct
    return batch["mix"] * correct + (1.0 - batch["mix"]) * tf.cast(predictions == batch["other_label"], tf.float32)
