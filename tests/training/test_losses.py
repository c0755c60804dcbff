"""Losses against Keras, closed forms or sums in float64."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.errors import raises
from tests.training.small_network import CLASSES, SmallNetwork, assert_near, make_arrays, make_batches, make_step
from trainer.errors import DataError, Diverged
from trainer.training import variables
from trainer.training.losses import (
    LossSettings,
    compute_class_weights,
    compute_divergence_threshold,
    compute_example_accuracy,
    compute_weighted_losses,
    cross_entropy,
    distillation_loss,
    focal_loss,
    safe_log,
)
from trainer.training.step import require_plausible

RNG = np.random.default_rng(3)
LOGITS = RNG.normal(0, 3, (6, 4)).astype(np.float32)
TEACHER = RNG.normal(0, 3, (6, 4)).astype(np.float32)
LABELS = np.array([0, 3, 2, 2, 1, 0], np.int32)
OTHERS = np.array([3, 0, 1, 2, 1, 2], np.int32)
MIX = np.array([0.25, 0.75, 1.0, 0.4, 0.0, 0.5], np.float32)
WEIGHT = np.array([1, 1, 1, 1, 1, 0], np.float32)


def test_a_loss_that_no_classifier_has_is_that_of_a_diverged_run() -> None:
    weighted = LossSettings(class_weights=(4.0, 0.5))
    assert compute_divergence_threshold(LossSettings(), 2) == pytest.approx(300 * np.log(2))
    assert compute_divergence_threshold(weighted, 2) == pytest.approx(1200 * np.log(2))
    distilled = LossSettings(alpha=0.1, temperature=3.0)
    assert compute_divergence_threshold(distilled, 10) == pytest.approx(2700 * np.log(10))
    where: dict[str, Any] = {"num_classes": 2, "step": 7, "phase": "head", "epoch": 1}
    require_plausible({"loss": 800.0, "val_loss": 200.0}, weighted, **where)
    fix, at = "phases.head.optimizer.learning_rate", r"at step 7 \(phase head, epoch 1\)"
    with raises(Diverged, fix=fix, problem=f"the loss is 460,583 {at}: at most 208 is plausible for 2 classes"):
        require_plausible({"loss": 460_583.2}, LossSettings(), **where)
    with raises(Diverged, fix=fix, problem=f"the validation loss is 800 {at}: at most 208"):
        require_plausible({"val_loss": 800.0}, weighted, **where)
    for loss in (float("nan"), float("inf")):
        with raises(Diverged, fix=fix, problem=f"the validation loss is not finite {at}"):
            require_plausible({"val_loss": loss}, LossSettings(), **where)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) / temperature)
    return powers / powers.sum(-1, keepdims=True)


def compute_expected_loss(targets: np.ndarray, logits: np.ndarray, gamma: float = 0.0) -> np.ndarray:
    """The sum over classes of -y (1 - p)^gamma log p."""
    p = softmax(logits)
    return -(targets * (1 - p) ** gamma * np.log(p)).sum(-1)


def compute_kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    q, p = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * (q * np.log(q / p)).sum(-1)


def one_hot(labels: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    return np.eye(4)[labels] * (1 - smoothing) + smoothing / 4


def make_batch(**more: np.ndarray) -> dict[str, tf.Tensor]:
    return {k: tf.constant(v) for k, v in {"label": LABELS, "weight": WEIGHT, **more}.items()}


def compute_mixed_losses(settings: LossSettings, mix: np.ndarray = MIX) -> tf.Tensor:
    return compute_weighted_losses(make_batch(other_label=OTHERS, mix=mix), tf.constant(LOGITS), settings)


def test_label_smoothing_is_keras_own() -> None:
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1, reduction=None)
    theirs = loss(tf.one_hot(LABELS, 4), LOGITS)
    np.testing.assert_allclose(cross_entropy(LABELS, LOGITS, 0.1), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_is_keras_own_without_its_alpha(gamma: float, smoothing: float) -> None:
    theirs = keras.losses.CategoricalFocalCrossentropy(
        alpha=1.0, gamma=gamma, from_logits=True, label_smoothing=smoothing, reduction=None
    )
    ours = focal_loss(LABELS, LOGITS, gamma, smoothing)
    np.testing.assert_allclose(ours, theirs(tf.one_hot(LABELS, 4), LOGITS), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        ours, compute_expected_loss(one_hot(LABELS, smoothing), LOGITS, gamma), rtol=1e-5, atol=1e-6
    )


def test_focal_without_gamma_is_cross_entropy() -> None:
    np.testing.assert_allclose(focal_loss(LABELS, LOGITS, 0.0), cross_entropy(LABELS, LOGITS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_for_certain_predictions(gamma: float) -> None:
    logits = tf.constant([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = focal_loss(tf.constant([0, 0]), logits, gamma)
    gradient = tape.gradient(loss, logits).numpy()
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient).all()
    assert abs(gradient[1]).max() > 0.9  # of the certain, wrong one


@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_example_is_one_with_mixed_targets(gamma: float | None, smoothing: float) -> None:
    losses = compute_mixed_losses(LossSettings(label_smoothing=smoothing, focal_gamma=gamma))
    targets = MIX[:, None] * one_hot(LABELS, smoothing) + (1 - MIX[:, None]) * one_hot(OTHERS, smoothing)
    np.testing.assert_allclose(
        losses, WEIGHT * compute_expected_loss(targets, LOGITS, gamma or 0.0), rtol=1e-5, atol=1e-6
    )


def test_each_part_of_a_mixed_example_has_the_weight_of_its_own_class() -> None:
    w = np.array([0.5, 2.0, 1.0, 3.0])
    losses = compute_mixed_losses(LossSettings(class_weights=tuple(w.tolist())))
    first, second = (
        w[LABELS] * compute_expected_loss(one_hot(LABELS), LOGITS),
        w[OTHERS] * compute_expected_loss(one_hot(OTHERS), LOGITS),
    )
    np.testing.assert_allclose(losses, WEIGHT * (MIX * first + (1 - MIX) * second), rtol=1e-5, atol=1e-6)


def test_unmixed_rows_of_a_mixed_batch_have_the_loss_of_an_unmixed_batch() -> None:
    settings = LossSettings(label_smoothing=0.1)
    unmixed = compute_weighted_losses(make_batch(), tf.constant(LOGITS), settings)
    np.testing.assert_array_equal(compute_mixed_losses(settings, np.ones(6, np.float32)), unmixed)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence(temperature: float) -> None:
    expected = compute_kl(TEACHER, LOGITS, temperature)
    np.testing.assert_allclose(
        distillation_loss(tf.constant(TEACHER), tf.constant(LOGITS), temperature), expected, rtol=1e-5
    )
    cached = safe_log(tf.constant(softmax(TEACHER).astype(np.float32)))  # log-probabilities are equivalent to logits
    np.testing.assert_allclose(distillation_loss(cached, tf.constant(LOGITS), temperature), expected, rtol=1e-4)
    np.testing.assert_allclose(distillation_loss(tf.constant(LOGITS), tf.constant(LOGITS), temperature), 0, atol=1e-5)
    if temperature == 1:
        theirs = keras.losses.KLDivergence(reduction=None)(softmax(TEACHER), softmax(LOGITS))
        np.testing.assert_allclose(expected, theirs, rtol=1e-4)


def test_a_certain_teacher_gives_a_finite_loss() -> None:
    certain = safe_log(tf.constant([[1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(distillation_loss(certain, tf.zeros([1, 3])), [np.log(3)], rtol=1e-6)


def test_accuracy_of_mixed_examples_is_a_fraction() -> None:
    logits = tf.constant(np.eye(4, dtype=np.float32)[[0, 0, 2, 2, 0, 2]])
    np.testing.assert_allclose(compute_example_accuracy(make_batch(), logits), [1, 0, 1, 1, 0, 0])
    np.testing.assert_allclose(
        compute_example_accuracy(make_batch(other_label=OTHERS, mix=MIX), logits), [0.25, 0.25, 1, 1, 0, 0.5]
    )


def test_class_weights() -> None:
    names, labels = ("cat", "dog", "owl"), np.array([0, 0, 0, 1, 0, 0])
    assert compute_class_weights("none", names, labels) is None
    assert compute_class_weights("balanced", names, labels) == pytest.approx((6 / 15, 6 / 3, 6 / 3))  # no owl: count 1
    assert compute_class_weights({"dog": 3}, names, labels) == (1.0, 3.0, 1.0)
    with raises(DataError, "training.class_weights", fix="use cat, dog, owl", problem="no class ant, bat"):
        compute_class_weights({"dog": 3, "bat": 2, "ant": 1}, names, labels)
    with raises(DataError, "training.class_weights", fix="one weight", problem="several weights .* ' dog', 'dog '"):
        compute_class_weights({" dog": 3, "cat": 2, "dog ": 1}, names, labels)


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        ({"cat": 0, "dog": 0, "owl": 0}, ""),
        ({"cat": 0, "dog": 0}, ""),  # no example is an owl
        ({"cat": 0, "dog": 1, "owl": 1}, " that is not dog"),
        ({"dog": 0}, " that is not cat"),
    ],
)
def test_weights_that_leave_less_than_two_classes_are_rejected(weights: dict[str, float], others: str) -> None:
    names, labels = ("cat", "dog", "owl"), np.array([0, 0, 1, 0])
    fix, problem = "above 0 for at least two classes", f"is 0 for every training example{others}, so"
    with raises(DataError, "training.class_weights", fix=fix, problem=problem):
        compute_class_weights(weights, names, labels)
    assert compute_class_weights({"cat": 1e-6, "owl": 0}, names, labels) == (1e-6, 1.0, 0.0)
    assert compute_class_weights({"owl": 0}, names, np.zeros(3, np.int32)) == (
        1.0,
        1.0,
        0.0,
    )  # a trial run of one example


# --- in the step -----------------------------------------------------------------------------------------------------


class LinearTeacher:
    """Logits that are a linear function of the image."""

    def __init__(self) -> None:
        self.kernel = np.random.default_rng(9).normal(0, 0.2, (6 * 6 * 3, CLASSES)).astype(np.float32)
        self.calls = 0

    def logits(self, images: tf.Tensor, *, training: bool = False) -> tf.Tensor:
        assert not training
        self.calls += 1
        return tf.reshape(tf.cast(images, tf.float32), [-1, 6 * 6 * 3]) / 255 @ self.kernel


DISTILLED = {"alpha": 0.1, "temperature": 3.0, "label_smoothing": 0.1, "class_weights": (1.0, 2.0, 0.5)}


def run_one_step(teacher: LinearTeacher | None, soft_labels: np.ndarray | None = None, **settings: object) -> tuple:
    """Weights and sums after one step of plain SGD."""
    network = SmallNetwork()
    step = make_step(network, keras.optimizers.SGD(1.0), teacher=teacher and teacher.logits, **settings)
    batches = make_batches(20, 8)
    if soft_labels is not None:
        batches = batches.map(lambda rows: {**rows, "teacher": tf.gather(soft_labels, rows["index"])})
    rows, _, _ = step.run(iter(batches), 1, 0, 0)
    return variables.copy_values(network.variables), rows[0]


def test_the_distillation_step_has_the_gradient_of_the_written_out_loss() -> None:
    network, teacher = SmallNetwork(), LinearTeacher()
    images, labels = (part[:8] for part in make_arrays(20))
    before = variables.copy_values(network.variables)
    with tf.GradientTape() as tape:
        logits = network.logits(images)
        soft_labels = tf.nn.softmax(teacher.logits(images) / 3)
        soft = 9 * tf.reduce_sum(soft_labels * (tf.math.log(soft_labels) - tf.nn.log_softmax(logits / 3)), -1)
        targets = tf.one_hot(labels, CLASSES) * 0.9 + 0.1 / CLASSES
        hard = -tf.reduce_sum(targets * tf.nn.log_softmax(logits), -1)
        losses = (0.1 * hard + 0.9 * soft) * tf.gather((1.0, 2.0, 0.5), labels)
        loss = tf.reduce_sum(losses) / 8
    gradients = tape.gradient(loss, [v.value for v in network.variables.values()])
    teacher = LinearTeacher()
    after, row = run_one_step(teacher, **DISTILLED)
    assert teacher.calls == 1  # when the graph is traced
    assert row[0] == pytest.approx(float(tf.reduce_sum(losses)), rel=1e-5)
    updates = dict(zip(before, gradients, strict=True))
    assert_near(after, {name: value - updates[name].numpy() for name, value in before.items()}, atol=1e-5)


def test_cached_soft_labels_give_the_same_step() -> None:
    images, _ = make_arrays(20)
    soft_labels = tf.nn.softmax(LinearTeacher().logits(images)).numpy()
    live, row = run_one_step(LinearTeacher(), **DISTILLED)
    cached, cached_row = run_one_step(None, soft_labels, **DISTILLED)
    np.testing.assert_allclose(cached_row, row, rtol=1e-5)
    assert_near(cached, live)
    assert_near(run_one_step(None, soft_labels, accumulate=4, **DISTILLED)[0], live)


def test_without_a_teacher_the_distillation_settings_have_no_effect() -> None:
    plain, plain_row = run_one_step(None)
    unused, row = run_one_step(None, alpha=0.1, temperature=3.0)
    np.testing.assert_array_equal(row, plain_row)
    np.testing.assert_equal(unused, plain)
