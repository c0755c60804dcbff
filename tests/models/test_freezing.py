"""Freezing rules, learning-rate multipliers, the table of the plan, and synchronized BatchNormalization."""

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from tests.errors import raises
from tests.processes import run_python
from trainer.config import schema as config
from trainer.errors import ModelError
from trainer.models.batch_norm import BATCH_NORM_CLASS, PaddingAwareBatchNormalization, use_example_weights
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.freezing import GROUPS, set_trainable_layers


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    model = config.Model(backbone="MobileNetV2", alpha=0.35, weights="none", image_size=32, hidden=8)
    return build_classifier(model, 3, seed=1)


def make_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3)).astype("uint8")


def copy_values(classifier: Classifier) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in classifier.variables.items()}


def list_trainable_layers(classifier: Classifier) -> list[int]:
    return [i for i, layer in enumerate(classifier.backbone.layers) if layer.trainable_weights]


@pytest.mark.parametrize(
    ("thaw", "first"),
    [
        ("all", 0),
        ("from_layer:100", 100),
        ("last_layers:54", 100),
        ("percent:20", 123),  # int(154 * 0.8)
        ("percent:12.5", 134),
        ("percent:100", 0),
        ("from_block:block_13", 116),
        ("from_block:expanded_conv", 4),
        ("last_blocks:1", 143),
        ("last_blocks:4", 116),
        ("last_blocks:17", 4),
    ],
)
@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_a_rule_thaws_exactly_from_its_layer(classifier: Classifier, thaw: str, first: int, batch_norm: str) -> None:
    plan = set_trainable_layers(classifier, thaw, batch_norm)
    layers = classifier.backbone.layers
    assert len(layers) == 154
    expected = [
        i
        for i in range(first, 154)
        if layers[i].weights and (batch_norm == "train" or not isinstance(layers[i], BATCH_NORM_CLASS))
    ]
    assert list_trainable_layers(classifier) == expected
    assert plan.first_trainable == expected[0]
    assert plan.first_trainable_name == layers[expected[0]].name
    assert plan.batch_norm_training == (batch_norm == "train")
    named = classifier.variables
    assert list(plan.trainable) == [n for n in named if n in plan.trainable]
    assert sorted(id(v) for group in plan.groups.values() for v in group) == sorted(map(id, named.values()))


def test_a_pattern_thaws_the_layers_it_matches(classifier: Classifier) -> None:
    plan = set_trainable_layers(classifier, "pattern:^block_1[56]_(expand|project)$", "frozen")
    names = [classifier.backbone.layers[i].name for i in list_trainable_layers(classifier)]
    assert names == ["block_15_expand", "block_15_project", "block_16_expand", "block_16_project"]
    assert len(plan.trainable) == 4 + 4


def test_multipliers_decay_per_block(classifier: Classifier) -> None:
    plan = set_trainable_layers(classifier, "all", "frozen", backbone_rate=0.5, layer_decay=0.9)
    factors = dict(zip(plan.trainable, plan.lr_multipliers, strict=True))
    expected = {"head/": 1.0, "backbone/Conv_1/": 0.45, "backbone/block_16_": 0.45, "backbone/block_15_": 0.405,
                "backbone/block_1_": 0.5 * 0.9**16, "backbone/expanded_conv_": 0.5 * 0.9**17,
                "backbone/Conv1/": 0.5 * 0.9**18}  # fmt: skip
    for start, factor in expected.items():
        (multiplier,) = {factors[name] for name in factors if name.startswith(start)}
        assert multiplier == pytest.approx(factor)
    line = plan.format_lines()[-1]
    assert "x 0.5 in the backbone, x 0.9 per block down: head 1, block_16 0.45, block_15 0.405" in line
    assert line.endswith("expanded_conv 0.0834, stem 0.075")


def test_a_multiplier_does_not_depend_on_other_thawed_layers(classifier: Classifier) -> None:
    whole = set_trainable_layers(classifier, "all", "train", layer_decay=0.8)
    multipliers = dict(zip(whole.trainable, whole.lr_multipliers, strict=True))
    top = set_trainable_layers(classifier, "last_blocks:3", "train", layer_decay=0.8)
    assert set(top.trainable) < set(multipliers)
    assert top.lr_multipliers == tuple(multipliers[name] for name in top.trainable)
    assert "stem" not in top.format_lines()[-1]


def test_plans_without_multipliers(classifier: Classifier) -> None:
    assert set_trainable_layers(classifier, "none", "frozen", 0.1, 0.9).lr_multipliers == ()  # only the head trains
    plain = set_trainable_layers(classifier, "all", "frozen")
    assert plain.lr_multipliers == ()
    assert len(plain.format_lines()) + 1 == len(set_trainable_layers(classifier, "all", "frozen", 0.1).format_lines())


def test_none_trains_the_head_alone(classifier: Classifier) -> None:
    set_trainable_layers(classifier, "all", "train")
    plan = set_trainable_layers(classifier, "none", "train")  # layers thawed before are frozen again
    assert list_trainable_layers(classifier) == []
    assert list(plan.trainable) == [f"head/{x}/{y}" for x in ("hidden", "output") for y in ("kernel", "bias")]
    assert plan.first_trainable is None
    assert not plan.batch_norm_training
    assert plan.format_lines()[0] == "thaw none, batch_norm train: all 154 layers of the backbone are frozen"


def test_the_table_has_every_group_and_the_sum(classifier: Classifier) -> None:
    lines = set_trainable_layers(classifier, "from_layer:100", "train").format_lines()
    assert lines[0].startswith("thaw from_layer:100, batch_norm train: 54 of 154 layers thawed")
    assert lines[0].endswith("101 (block_11_depthwise)")
    assert [line.split("  ")[1] for line in lines[2:]] == [*GROUPS, "all"]
    assert lines[-1].split() == ["all", "264", "420,483", "1.68", "MB"]


def test_frozen_batch_norm_has_no_batch_statistics_and_no_updates(classifier: Classifier) -> None:
    plan = set_trainable_layers(classifier, "all", "frozen")
    images, before = make_images(4), copy_values(classifier)
    alone = np.concatenate([classifier.features(images[i : i + 1], plan.batch_norm_training) for i in range(4)])
    np.testing.assert_allclose(classifier.features(images, plan.batch_norm_training), alone, atol=1e-5)
    classifier.features(images, True)  # no effect on layers that are not trainable
    np.testing.assert_equal(copy_values(classifier), before)
    assert not any("BN" in name or "bn_" in name for name in plan.trainable)


def test_trained_batch_norm_updates_thawed_layers_only(classifier: Classifier) -> None:
    plan = set_trainable_layers(classifier, "from_block:block_16", "train")
    before = copy_values(classifier)
    tf.function(lambda x: classifier.features(x, plan.batch_norm_training))(make_images(4))
    moved = {n.split("/")[1] for n, value in copy_values(classifier).items() if not np.array_equal(value, before[n])}
    assert moved == {"block_16_expand_BN", "block_16_depthwise_BN", "block_16_project_BN", "Conv_1_bn"}


@pytest.mark.parametrize(
    ("thaw", "problem", "fix"),
    [
        ("from_layer:154", "154 layers", "0 to 153"),
        ("last_layers:155", "154 layers", "1 to 154"),
        ("last_layers:0", "154 layers", "1 to 154"),
        ("percent:0", "selects none of the 154 layers of MobileNetV2", "none"),
        ("from_block:block_17", "is not a block of MobileNetV2, which has expanded_conv, block_1, ", r"use block_\d+"),
        ("last_blocks:0", "17 blocks", "1 to 17"),
        ("last_blocks:18", "17 blocks", "1 to 17"),
        ("pattern:^dense", "matches no layer", "Conv_1_bn"),
        ("pattern:(", r"missing \)", "correct"),
        ("last_layers:2", "no layer with trainable weights", r"151 \(Conv_1\), or use none"),
        ("pattern:_BN$", "no layer with trainable weights", "none"),
        ("sideways:3", "not a freezing rule", "use"),
    ],
)
def test_a_rule_without_a_match_is_rejected(classifier: Classifier, thaw: str, problem: str, fix: str) -> None:
    with raises(ModelError, "thaw", thaw, fix, problem):
        set_trainable_layers(classifier, thaw, "frozen")


def test_padding_does_not_count_in_batch_norm(classifier: Classifier) -> None:
    """Twelve images and four rows of padding have the outputs and averages of Keras with the twelve images alone."""
    set_trainable_layers(classifier, "all", "train")
    images = make_images(16)
    images[12:] = 0
    before = copy_values(classifier)

    def after(features: Callable[[], tf.Tensor]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        results = features().numpy()[:12], copy_values(classifier)
        for name, value in before.items():
            classifier.variables[name].assign(value)
        return results

    padded, moved = after(lambda: classifier.features(images, True, tf.constant([1.0] * 12 + [0.0] * 4)))
    unweighted, _ = after(lambda: classifier.features(images, True))
    for layer in classifier.backbone.layers:
        if isinstance(layer, BATCH_NORM_CLASS):
            layer.__class__ = BATCH_NORM_CLASS
    prepared = classifier.spec.preprocess(images[:12].astype("float32"))
    alone, expected = after(lambda: classifier.backbone(prepared, training=True))
    assert np.abs(padded - alone).max() < 0.01 < 0.5 < np.abs(unweighted - alone).max()
    for name, value in expected.items():
        np.testing.assert_allclose(moved[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_is_equal_to_keras_own_without_the_padding(affine: bool) -> None:
    ours = PaddingAwareBatchNormalization(momentum=0.9, scale=affine, center=affine)
    keras_own = BATCH_NORM_CLASS(momentum=0.9, scale=affine, center=affine)
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (6, 4, 4, 5)).astype("float32")
    x[2] = x[5] = 100
    real = [0, 1, 3, 4]
    weight = np.isin(np.arange(6), real).astype("float32")
    for layer in (ours, keras_own):
        layer.build(x.shape)
        if affine:
            layer.gamma.assign([1, 2, 3, 4, 5])
            layer.beta.assign([5, 4, 3, 2, 1])
    with tf.GradientTape() as tape, use_example_weights(tf.constant(weight)):
        tape.watch(inputs := tf.constant(x))
        out = ours(inputs, training=True)
        loss = tf.reduce_sum(tf.gather(out, real) ** 3)
    with tf.GradientTape() as other:
        other.watch(part := tf.constant(x[real]))
        expected = keras_own(part, training=True)
        expected_loss = tf.reduce_sum(expected**3)
    np.testing.assert_allclose(tf.gather(out, real), expected, rtol=1e-4, atol=1e-4)
    gradient = tape.gradient(loss, inputs).numpy()
    np.testing.assert_allclose(gradient[real], other.gradient(expected_loss, part), rtol=1e-3, atol=1e-2)
    assert not gradient[[2, 5]].any()
    for mine, theirs in zip(ours.weights, keras_own.weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(ours(x, training=False), ours(x))
    np.testing.assert_allclose(ours(x, training=False), keras_own(x, training=False), rtol=1e-5)


def test_a_batch_of_padding_alone_updates_nothing(classifier: Classifier) -> None:
    set_trainable_layers(classifier, "all", "train")
    before = copy_values(classifier)
    features = classifier.features(np.zeros((2, 32, 32, 3), "uint8"), True, tf.zeros(2))
    assert np.isfinite(features).all()
    np.testing.assert_equal(copy_values(classifier), before)


@pytest.mark.slow
def test_two_replicas_train_batch_norm_as_one_would() -> None:
    """Batch statistics cover both replicas without padding; in a new process, to configure logical devices."""
    words = run_python(_TWO_REPLICAS).stdout.split()
    logits, averages, between = (float(x) for x in words[-3:])  # largest differences
    assert logits < 1e-3
    assert averages < 1e-5
    assert between == 0


_TWO_REPLICAS = """
import numpy as np, tensorflow as tf
from trainer.config import schema as config
from trainer.models.classifier import build_classifier
from trainer.models.freezing import set_trainable_layers
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
model = config.Model(backbone="MobileNetV2", alpha=0.35, weights="none", image_size=32, dropout=0.5)
images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype("uint8")
positions = np.arange(8)
weights = np.float32([1, 1, 1, 1, 1, 0, 0, 0])
def scores(classifier, x, position, weight):
    return classifier.logits(
        x, training=True, batch_norm_training=True, seed=1, step=3, position=position, weight=weight)
one = build_classifier(model, 3, 1)
set_trainable_layers(one, "all", "train")
alone = tf.function(scores)(one, images[:5], tf.constant(positions[:5]), tf.ones(5))
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    two = build_classifier(model, 3, 1)
    set_trainable_layers(two, "all", "train")
def part(array):
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(array[4 * context.replica_id_in_sync_group :][:4]))
both = tf.function(lambda x, p, w: strategy.run(scores, (two, x, p, w)))(
    part(images), part(positions), part(weights))
logits = np.concatenate([x.numpy() for x in strategy.experimental_local_results(both)])
values = [(v.numpy(), *[x.numpy() for x in strategy.experimental_local_results(two.variables[n].value)])
          for n, v in one.variables.items()]
print(np.abs(logits[:5] - alone).max(), max(np.abs(a - b).max() for a, b, _ in values),
      max(np.abs(b - c).max() for _, b, c in values))
"""
