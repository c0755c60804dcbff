"""Per-example losses: cross-entropy, focal loss and distillation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from trainer.errors import DataError
from trainer.names import normalize_class_name

# Uniform predictions have a mean loss of ln(classes). In the first steps of a published recipe (RMSprop at a learning
# rate of 0.1 on pooled features) the loss is up to 100 times that, and training recovers. 300 leaves a margin.
MAX_LOSS_RATIO = 300
_MIN_COMPLEMENT = 1e-7  # lower bound of 1 - p: if gamma < 1, the gradient of (1 - p)^gamma is infinite at p = 1
_MIN_PROBABILITY = 1.2e-38  # lower bound of a probability before its logarithm, just above the smallest normal float32


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the per-example loss."""

    label_smoothing: float = 0.0
    focal_gamma: float | None = None  # gamma of the focal loss; None for cross-entropy
    class_weights: tuple[float, ...] | None = None  # loss weight of each class, by class index; None if all are 1
    alpha: float = 1.0  # weight of the loss against the labels; the distillation loss has weight 1 - alpha
    temperature: float = 1.0  # distillation temperature, by which the teacher's and the student's logits are divided


def compute_class_weights(
    setting: Literal["none", "balanced"] | dict[str, float], class_names: Sequence[str], labels: np.ndarray
) -> tuple[float, ...] | None:
    """Compute the loss weight of each class, by class index. Returns None if `setting` is "none".

    Args:
        setting: `training.class_weights`. "none": all weights are 1; "balanced": n / (num_classes * class_count), as in
            scikit-learn, with at least 1 as class_count; or a dictionary of weights by class name, which default to 1.
        class_names: names of the classes, by class index.
        labels: class indices of the training examples, int32 [n].

    Raises:
        DataError: `setting` names a class twice, or a class that is not in the dataset; or fewer than two classes with
            training examples have a weight above 0, although at least two classes have training examples.
    """
    if setting == "none":
        return None
    if setting == "balanced":
        counts = np.bincount(labels, minlength=len(class_names))
        return tuple(float(w) for w in counts.sum() / (len(class_names) * np.maximum(counts, 1)))
    assert isinstance(setting, dict)
    weights = {normalize_class_name(name): weight for name, weight in setting.items()}
    if len(weights) < len(setting):
        duplicates = ", ".join(
            repr(name)
            for name in setting
            if [*map(normalize_class_name, setting)].count(normalize_class_name(name)) > 1
        )
        problem = f"has several weights for one class: {duplicates}"
        raise DataError(problem, key="training.class_weights", fix="give each class one weight")
    if unknown := ", ".join(sorted(set(weights) - set(class_names))):
        problem, fix = f"the data has no class {unknown}", f"use {', '.join(class_names)}"
        raise DataError(problem, key="training.class_weights", fix=fix)
    weights_per_class = tuple(float(weights.get(name, 1.0)) for name in class_names)
    weighted_classes = np.unique(labels[np.take(weights_per_class, labels) > 0])
    if len(weighted_classes) < min(2, len(np.unique(labels))):
        except_class = f" that is not {class_names[weighted_classes[0]]}" if len(weighted_classes) else ""
        problem = f"is 0 for every training example{except_class}, so nothing would be learned"
        raise DataError(problem, key="training.class_weights", fix="use a weight above 0 for at least two classes")
    return weights_per_class


def compute_divergence_threshold(settings: LossSettings, num_classes: int) -> float:
    """Return the mean loss above which training counts as diverged. `num_classes` is at least 2.

    The result is `MAX_LOSS_RATIO` times ln(classes). Class weights and distillation scale the losses, so it is
    multiplied by the largest class weight and, with distillation, by the square of a temperature above 1.
    """
    scale = max(settings.class_weights or (1.0,)) * (max(settings.temperature, 1.0) ** 2 if settings.alpha < 1 else 1.0)
    return MAX_LOSS_RATIO * math.log(num_classes) * scale


def _smooth_labels(labels: tf.Tensor, num_classes: int, smoothing: float) -> tf.Tensor:
    """Return smoothed one-hot labels, float32 [b, classes]."""
    return tf.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """Compute the softmax cross-entropy of each example, float32 [b].

    Args:
        labels: class indices, int32 [b].
        logits: float32 [b, classes].
        smoothing: amount of label smoothing, in [0, 1) (Szegedy et al. 2016).
    """
    return tf.nn.softmax_cross_entropy_with_logits(_smooth_labels(labels, logits.shape[-1], smoothing), logits)


def focal_loss(labels: tf.Tensor, logits: tf.Tensor, gamma: float, smoothing: float = 0.0) -> tf.Tensor:
    """Compute the focal loss of each example (Lin et al. 2017), float32 [b]. See `cross_entropy` for other arguments.

    The loss is the sum of -y (1 - p)^gamma log p over the classes, with gamma >= 0. Up to the clipping of probabilities
    it equals `keras.losses.CategoricalFocalCrossentropy(alpha=1, from_logits=True)`. If gamma is 0, it is the
    cross-entropy. It is linear in the target y, so the loss of a smoothed or mixed target is the weighted mean of the
    losses of its classes.
    """
    targets = _smooth_labels(labels, logits.shape[-1], smoothing)
    log_p = tf.nn.log_softmax(logits)
    complements = tf.maximum(-tf.math.expm1(log_p), _MIN_COMPLEMENT)  # 1 - p, without cancellation near p = 1
    return -tf.reduce_sum(targets * complements**gamma * log_p, -1)


def distillation_loss(teacher_logits: tf.Tensor, logits: tf.Tensor, temperature: float = 1.0) -> tf.Tensor:
    """Compute the distillation loss of each example, float32 [b]: T^2 * KL(teacher || student) at temperature T.

    The gradients of soft labels scale with 1 / T^2. With the factor T^2, their magnitude relative to the gradients of
    the labels is roughly independent of T (Hinton et al. 2015, "Distilling the knowledge in a neural network").

    Args:
        teacher_logits: float32 [b, classes]. The teacher's log-probabilities give the same loss.
        logits: logits of the student, float32 [b, classes].
        temperature: T, above 0; both logits are divided by it.
    """
    teacher_log_p, log_p = tf.nn.log_softmax(teacher_logits / temperature), tf.nn.log_softmax(logits / temperature)
    return temperature**2 * tf.reduce_sum(tf.exp(teacher_log_p) * (teacher_log_p - log_p), -1)


def safe_log(probabilities: tf.Tensor) -> tf.Tensor:
    """Return the natural logarithm of float32 probabilities of any shape, clamped so that it is finite for 0."""
    return tf.math.log(tf.maximum(probabilities, _MIN_PROBABILITY))


def compute_weighted_losses(
    batch: dict[str, Any], logits: tf.Tensor, settings: LossSettings, teacher_logits: tf.Tensor | None = None
) -> tf.Tensor:
    """Compute the weighted loss of each example, float32 [b]. It is 0 for padding, whose weight is 0.

    The weight is the example's weight times its class's weight. It also applies to the distillation loss, where a mixed
    example has the mean of both class weights, weighted by `mix`.

    Args:
        batch: `label`, int32 [b], and `weight`, float32 [b]. A batch augmented by mixup or cutmix also has
            `other_label`, int32 [b], and `mix`, float32 [b]: the loss against `label` then has the weight `mix`, and
            the loss against `other_label` the weight 1 - `mix`.
        logits: float32 [b, classes].
        settings: the kind of loss, and the weights of classes and of distillation.
        teacher_logits: float32 [b, classes]. If given, the loss is alpha times the loss against the labels plus
            (1 - alpha) times the distillation loss.
    """
    weighted_targets = [(batch["label"], batch["weight"])]
    if "mix" in batch:
        mix, weight = batch["mix"], batch["weight"]
        weighted_targets = [(batch["label"], weight * mix), (batch["other_label"], weight * (1.0 - mix))]
    distillation = None
    if teacher_logits is not None:
        distillation = (1.0 - settings.alpha) * distillation_loss(teacher_logits, logits, settings.temperature)
    losses_per_target = []
    for labels, weights in weighted_targets:
        if settings.focal_gamma is None:
            losses = cross_entropy(labels, logits, settings.label_smoothing)
        else:
            losses = focal_loss(labels, logits, settings.focal_gamma, settings.label_smoothing)
        if distillation is not None:
            losses = settings.alpha * losses + distillation
        if settings.class_weights:
            weights = weights * tf.gather(tf.constant(settings.class_weights), labels)
        losses_per_target.append(losses * weights)
    return losses_per_target[0] if len(losses_per_target) == 1 else losses_per_target[0] + losses_per_target[1]


def compute_example_accuracy(batch: dict[str, Any], logits: tf.Tensor) -> tf.Tensor:
    """Return 1 for each correctly classified example and 0 for others, float32 [b]; padding is not masked.

    For an example mixed by mixup or cutmix, return the predicted class's weight in the mix.
    """
    predictions = tf.argmax(logits, -1, tf.int32)
    correct = tf.cast(predictions == batch["label"], tf.float32)
    if "mix" not in batch:
        return correct
    return batch["mix"] * correct + (1.0 - batch["mix"]) * tf.cast(predictions == batch["other_label"], tf.float32)
