"""Every loss against Keras, a closed form or a hand-made sum in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.training.small_network import CLASSES, SmallNetwork, arrays, stream
from trainer.errors import DataError
from trainer.training import variables
from trainer.training.losses import (
    LossSettings,
    class_weights,
    cross_entropy,
    divergence,
    focal,
    hits,
    log_probs,
    weighted_losses,
)
from trainer.training.step import StepSettings, TrainingStep

RNG = np.random.default_rng(3)
LOGITS = RNG.normal(0, 3, (6, 4)).astype(np.float32)
TEACHER = RNG.normal(0, 3, (6, 4)).astype(np.float32)
LABELS = np.array([0, 3, 2, 2, 1, 0], np.int32)
OTHERS = np.array([3, 0, 1, 2, 1, 2], np.int32)
MIX = np.array([0.25, 0.75, 1.0, 0.4, 0.0, 0.5], np.float32)
WEIGHT = np.array([1, 1, 1, 1, 1, 0], np.float32)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """In float64."""
    powers = np.exp(logits.astype(np.float64) / temperature)
    return powers / powers.sum(-1, keepdims=True)


def against(targets: np.ndarray, logits: np.ndarray, gamma: float = 0.0) -> np.ndarray:
    """The sum over classes of -y (1 - p)^gamma log p."""
    p = softmax(logits)
    return -(targets * (1 - p) ** gamma * np.log(p)).sum(-1)


def kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    q, p = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * (q * np.log(q / p)).sum(-1)


def one_hot(labels: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    return np.eye(4)[labels] * (1 - smoothing) + smoothing / 4


def batch(**more: np.ndarray) -> dict[str, tf.Tensor]:
    return {k: tf.constant(v) for k, v in {"label": LABELS, "weight": WEIGHT, **more}.items()}


def test_label_smoothing_is_keras_own() -> None:
    theirs = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1, reduction=None)
    np.testing.assert_allclose(
        cross_entropy(LABELS, LOGITS, 0.1), theirs(tf.one_hot(LABELS, 4), LOGITS), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_is_keras_own_without_its_alpha(gamma: float, smoothing: float) -> None:
    theirs = keras.losses.CategoricalFocalCrossentropy(
        alpha=1.0, gamma=gamma, from_logits=True, label_smoothing=smoothing, reduction=None
    )
    ours = focal(LABELS, LOGITS, gamma, smoothing)
    np.testing.assert_allclose(ours, theirs(tf.one_hot(LABELS, 4), LOGITS), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours, against(one_hot(LABELS, smoothing), LOGITS, gamma), rtol=1e-5, atol=1e-6)


def test_focal_without_gamma_is_cross_entropy() -> None:
    np.testing.assert_allclose(focal(LABELS, LOGITS, 0.0), cross_entropy(LABELS, LOGITS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_the_answer_is_certain(gamma: float) -> None:
    logits = tf.constant([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = focal(tf.constant([0, 0]), logits, gamma)
    gradient = tape.gradient(loss, logits).numpy()
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient).all()
    assert abs(gradient[1]).max() > 0.9  # certain and wrong: pulled back


@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_example_is_one_with_mixed_targets(gamma: float | None, smoothing: float) -> None:
    settings = LossSettings(label_smoothing=smoothing, focal_gamma=gamma)
    found = weighted_losses(batch(other_label=OTHERS, mix=MIX), tf.constant(LOGITS), settings)
    targets = MIX[:, None] * one_hot(LABELS, smoothing) + (1 - MIX[:, None]) * one_hot(OTHERS, smoothing)
    np.testing.assert_allclose(found, WEIGHT * against(targets, LOGITS, gamma or 0.0), rtol=1e-5, atol=1e-6)


def test_each_part_of_a_mixed_example_has_the_weight_of_its_own_class() -> None:
    given = np.array([0.5, 2.0, 1.0, 3.0])
    settings = LossSettings(class_weights=tuple(given.tolist()))
    found = weighted_losses(batch(other_label=OTHERS, mix=MIX), tf.constant(LOGITS), settings)
    first, second = given[LABELS] * against(one_hot(LABELS), LOGITS), given[OTHERS] * against(one_hot(OTHERS), LOGITS)
    np.testing.assert_allclose(found, WEIGHT * (MIX * first + (1 - MIX) * second), rtol=1e-5, atol=1e-6)


def test_unmixed_rows_of_a_mixed_batch_have_the_very_loss_of_an_unmixed_batch() -> None:
    settings = LossSettings(label_smoothing=0.1)
    mixed = weighted_losses(batch(other_label=OTHERS, mix=np.ones(6, np.float32)), tf.constant(LOGITS), settings)
    np.testing.assert_array_equal(mixed, weighted_losses(batch(), tf.constant(LOGITS), settings))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_by_hand(temperature: float) -> None:
    expected = kl(TEACHER, LOGITS, temperature)
    np.testing.assert_allclose(divergence(tf.constant(TEACHER), tf.constant(LOGITS), temperature), expected, rtol=1e-5)
    asked_before = log_probs(tf.constant(softmax(TEACHER).astype(np.float32)))  # probabilities do as well as logits
    np.testing.assert_allclose(divergence(asked_before, tf.constant(LOGITS), temperature), expected, rtol=1e-4)
    np.testing.assert_allclose(divergence(tf.constant(LOGITS), tf.constant(LOGITS), temperature), 0, atol=1e-5)


def test_divergence_is_keras_own() -> None:
    theirs = keras.losses.KLDivergence(reduction=None)(softmax(TEACHER), softmax(LOGITS))
    np.testing.assert_allclose(divergence(tf.constant(TEACHER), tf.constant(LOGITS)), theirs, rtol=1e-4)


def test_a_certain_teacher_gives_a_finite_loss() -> None:
    certain = log_probs(tf.constant([[1.0, 0.0, 0.0]]))
    student = tf.constant([[0.0, 0.0, 0.0]])
    np.testing.assert_allclose(divergence(certain, student), [np.log(3)], rtol=1e-6)


def test_hits_of_mixed_examples_are_shares() -> None:
    logits = tf.constant(np.eye(4, dtype=np.float32)[[0, 0, 2, 2, 0, 2]])
    np.testing.assert_allclose(hits(batch(), logits), [1, 0, 1, 1, 0, 0])
    np.testing.assert_allclose(hits(batch(other_label=OTHERS, mix=MIX), logits), [0.25, 0.25, 1, 1, 0, 0.5])


def test_class_weights_by_hand() -> None:
    names, labels = ("cat", "dog", "owl"), np.array([0, 0, 0, 1, 0, 0])
    assert class_weights("none", names, labels) is None
    assert class_weights("balanced", names, labels) == pytest.approx((6 / 15, 6 / 3, 6 / 3))  # no owl: counted as one
    assert class_weights({"dog": 3}, names, labels) == (1.0, 3.0, 1.0)
    with pytest.raises(DataError) as failed:
        class_weights({"dog": 3, "bat": 2, "ant": 1}, names, labels)
    assert str(failed.value) == "training.class_weights names ant, bat; the classes are cat, dog, owl"


# --- in the step -----------------------------------------------------------------------------------------------------


class Fixed:
    """A teacher whose logits are a fixed linear function of the picture."""

    def __init__(self) -> None:
        self.kernel = np.random.default_rng(9).normal(0, 0.2, (6 * 6 * 3, CLASSES)).astype(np.float32)
        self.asked = 0

    def logits(self, images: tf.Tensor, *, training: bool = False) -> tf.Tensor:
        assert not training
        self.asked += 1
        return tf.reshape(tf.cast(images, tf.float32), [-1, 6 * 6 * 3]) / 255 @ self.kernel


DISTILLED = {"alpha": 0.1, "temperature": 3.0, "label_smoothing": 0.1, "class_weights": (1.0, 2.0, 0.5)}


def one_step(
    teacher: Fixed | None, answers: np.ndarray | None = None, accumulate: int = 1, **settings: object
) -> tuple:
    """Weights after one step of plain SGD, and its row."""
    network = SmallNetwork()
    step = TrainingStep(
        tf.distribute.get_strategy(),
        network,
        network.variables,
        keras.optimizers.SGD(1.0),
        StepSettings(seed=1, accumulate=accumulate, **settings),  # type: ignore[arg-type]
        teacher=teacher,
    )
    batches = stream(20, 8)
    if answers is not None:
        batches = batches.map(lambda rows: {**rows, "teacher": tf.gather(answers, rows["index"])})
    rows, _, _ = step.run(iter(batches), 1, 0, 0)
    return variables.read(network.variables), rows[0]


def test_the_distilled_step_is_the_gradient_of_the_loss_by_hand() -> None:
    network, teacher = SmallNetwork(), Fixed()
    images, labels = (part[:8] for part in arrays(20))
    before = variables.read(network.variables)
    with tf.GradientTape() as tape:
        logits = network.logits(images)
        answers = tf.nn.softmax(teacher.logits(images) / 3)
        soft = 9 * tf.reduce_sum(answers * (tf.math.log(answers) - tf.nn.log_softmax(logits / 3)), -1)
        targets = tf.one_hot(labels, CLASSES) * 0.9 + 0.1 / CLASSES
        hard = -tf.reduce_sum(targets * tf.nn.log_softmax(logits), -1)
        losses = (0.1 * hard + 0.9 * soft) * tf.gather((1.0, 2.0, 0.5), labels)
        loss = tf.reduce_sum(losses) / 8
    gradients = tape.gradient(loss, [v.value for v in network.variables.values()])
    teacher = Fixed()
    after, row = one_step(teacher, **DISTILLED)
    assert teacher.asked == 1  # in the graph, once
    assert row[0] == pytest.approx(float(tf.reduce_sum(losses)), rel=1e-5)
    for (name, start), gradient in zip(before.items(), gradients, strict=True):
        np.testing.assert_allclose(after[name], start - gradient.numpy(), atol=1e-5)


def test_answers_asked_for_beforehand_give_the_same_step() -> None:
    images, _ = arrays(20)
    answers = tf.nn.softmax(Fixed().logits(images)).numpy()
    live, row = one_step(Fixed(), **DISTILLED)
    kept, kept_row = one_step(None, answers, **DISTILLED)
    np.testing.assert_allclose(kept_row, row, rtol=1e-5)
    for name, value in live.items():
        np.testing.assert_allclose(kept[name], value, atol=1e-6)
    pieces, _ = one_step(None, answers, accumulate=4, **DISTILLED)
    for name, value in live.items():
        np.testing.assert_allclose(pieces[name], value, atol=1e-6)


def test_a_step_that_distils_nothing_has_no_teacher_in_its_graph() -> None:
    plain, plain_row = one_step(None)
    unused, row = one_step(None, alpha=0.1, temperature=3.0)
    np.testing.assert_array_equal(row, plain_row)
    for name, value in plain.items():
        np.testing.assert_array_equal(unused[name], value)
