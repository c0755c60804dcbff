"""Classifier: outputs, stateless dropout, precision, and initial weights."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.errors import raises
from tests.models.efficient_net import IMAGENET, normalize, set_normalization
from trainer.config import schema as config
from trainer.errors import Interrupted, ModelError
from trainer.models import weights as weights_module
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.freezing import set_trainable_layers
from trainer.models.weights import refresh_normalization

SMALL: dict[str, Any] = {"backbone": "MobileNetV2", "alpha": 0.35, "weights": "none", "image_size": 32}


def build(seed: int = 1, classes: int = 3, **changes: Any) -> Classifier:
    return build_classifier(config.Model(**(SMALL | changes)), classes, seed)


@cache
def get_built(seed: int = 1, **changes: Any) -> Classifier:
    """The classifier of `build`, the same object for equal arguments, whose weights no test changes."""
    return build(seed, **changes)


def make_images(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype("uint8")


@pytest.fixture
def policy() -> Iterator[None]:
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("MobileNet", 1024),
        ("MobileNetV3Small", 576),
        ("EfficientNetB0", 1280),
        pytest.param("ResNet50V2", 2048, marks=pytest.mark.slow),
        ("VGG16", 512),
        pytest.param("ConvNeXtTiny", 768, marks=pytest.mark.slow),
    ],
)
def test_a_backbone_at_its_smallest_size(name: str, channels: int) -> None:
    classifier = get_built(backbone=name, alpha=None)
    assert classifier.backbone.output_shape == (None, 1, 1, channels)
    probabilities = tf.function(classifier.probabilities)(make_images(2)).numpy()
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert len(classifier.variables) == len(classifier.backbone.weights) + 2


def test_the_logits_are_preprocessing_backbone_pooling_and_head() -> None:
    classifier = build(hidden=7, pooling="max", image_size=64)
    images = make_images(3, 64)
    maps = classifier.backbone(images.astype("float32") / 127.5 - 1, training=False).numpy()
    assert maps.shape == (3, 2, 2, 1280)
    (w1, b1), (w2, b2) = classifier.hidden[0].dense.get_weights(), classifier.output.get_weights()
    expected = np.maximum(maps.max((1, 2)) @ w1 + b1, 0) @ w2 + b2
    np.testing.assert_allclose(classifier.logits(images), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(classifier.head_logits(maps.max((1, 2))), expected, rtol=1e-4, atol=1e-5)
    model = classifier.build_keras_model()
    np.testing.assert_allclose(model(images.astype("float32")), classifier.probabilities(images), atol=1e-6)
    classifier.output.bias.assign([9.0, 0.0, 0.0])
    np.testing.assert_allclose(model(images.astype("float32")), classifier.probabilities(images), atol=1e-6)


def test_l2_penalizes_the_kernels_of_the_head_alone() -> None:
    classifier = get_built(hidden=4, l2=0.5)
    kernels = [classifier.hidden[0].dense.kernel.numpy(), classifier.output.kernel.numpy()]
    np.testing.assert_allclose(classifier.l2_loss(), 0.5 * sum((k**2).sum() for k in kernels), rtol=1e-5)
    assert get_built().l2_loss() == 0


def test_dropout_depends_on_seed_step_and_position_but_not_on_the_sharding() -> None:
    classifier = build(dropout=0.5)
    pooled = tf.ones([6, 1280])
    positions = tf.range(10, 16, dtype=tf.int64)

    @tf.function
    def logits(x: tf.Tensor, seed: int, step: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        return classifier.head_logits(x, training=True, seed=seed, step=step, position=position)

    step = tf.constant(5, tf.int64)
    whole = logits(pooled, 1, step, positions).numpy()
    parts = [logits(pooled[:1], 1, step, positions[:1]), logits(pooled[1:], 1, step, positions[1:])]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    assert len({row.tobytes() for row in whole}) == 6  # other units per example
    assert np.abs(whole - logits(pooled, 1, step + 1, positions)).max() > 1e-3
    assert np.abs(whole - logits(pooled, 2, step, positions)).max() > 1e-3
    np.testing.assert_array_equal(logits(pooled, 1, step, positions), whole)
    inference = classifier.head_logits(pooled).numpy()
    many = logits(tf.ones([4000, 1280]), 1, step, tf.range(4000, dtype=tf.int64)).numpy()
    # Inverted scaling has the same mean.
    np.testing.assert_allclose(many.mean(0), inference[0], atol=4 * many.std() / 4000**0.5)


def test_initial_values_are_a_function_of_the_seed() -> None:
    one, same, other = get_built(1, hidden=4), build(1, hidden=4), build(2, hidden=4)
    assert list(one.variables) == list(same.variables)
    assert next(iter(one.variables)) == "backbone/Conv1/kernel"
    assert list(one.variables)[-4:] == [f"head/{x}/{y}" for x in ("hidden", "output") for y in ("kernel", "bias")]
    for name, variable in one.variables.items():
        np.testing.assert_array_equal(variable.numpy(), same.variables[name].numpy())
    for name in ("backbone/Conv1/kernel", "head/hidden/kernel", "head/output/kernel"):
        assert np.abs(one.variables[name].numpy() - other.variables[name].numpy()).max() > 1e-3


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.usefixtures("policy")
def test_low_precision_keeps_variables_and_logits_in_float32_and_finite(precision: str) -> None:
    keras.config.set_dtype_policy(precision)
    classifier = build(weights="glyphs", image_size=48, hidden=8)
    plan = set_trainable_layers(classifier, "from_block:block_16", "train")

    @tf.function
    def step(images: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            logits = classifier.logits(images, training=True, batch_norm_training=True)
            loss = -tf.reduce_mean(tf.nn.log_softmax(logits)[:, 0])
        return logits, tape.gradient(loss, [v.value for v in plan.trainable.values()])

    logits, gradients = step(make_images(4, 48))
    assert classifier.backbone.compute_dtype == precision.removeprefix("mixed_")
    assert {v.dtype for v in classifier.variables.values()} == {"float32"}
    assert logits.dtype == tf.float32
    assert np.isfinite(logits).all()
    assert np.ptp(logits) > 0
    assert all(np.isfinite(g.numpy()).all() for g in gradients)
    head = classifier.head_logits(tf.fill([1, 1280], 1 + 2**-12)) - classifier.head_logits(tf.ones([1, 1280]))
    assert np.abs(head).max() > 0  # equal features in half precision


def test_drop_connect_is_disabled() -> None:
    classifier = get_built(backbone="EfficientNetB0", alpha=None)
    set_trainable_layers(classifier, "none", "frozen")
    images = make_images(2)
    np.testing.assert_array_equal(classifier.features(images, True), classifier.features(images, False))


# ---- weights ----


def save(classifier: Classifier, path: Path) -> Path:
    classifier.backbone.save_weights(path)
    return path


@pytest.mark.parametrize("name", ["some.weights.h5", "some.keras", "some.h5"])  # the last has the older layout
def test_weights_of_a_file_are_loaded(name: str, tmp_path: Path) -> None:
    source, path = get_built(), tmp_path / name
    (source.backbone.save_weights if name.endswith(".weights.h5") else source.backbone.save)(path)
    target = build(2, weights=str(path))
    for key, variable in target.variables.items():
        if key.startswith("backbone/"):
            np.testing.assert_array_equal(variable.numpy(), source.variables[key].numpy())


def test_float16_weights_fill_float32_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, packed = get_built(), tmp_path / "packed.weights.h5"
    full = save(source, tmp_path / "full.weights.h5")
    with h5py.File(full) as old, h5py.File(packed, "w") as new:

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                new.create_dataset(name, data=item[()].astype("float16"))
            else:
                new.require_group(name).attrs.update(item.attrs)

        old.visititems(copy)
    monkeypatch.setattr(weights_module, "GLYPHS_WEIGHTS", packed)
    target = build(2, weights="glyphs")
    for key, variable in target.variables.items():
        if key.startswith("backbone/"):
            assert variable.dtype == "float32"
            expected = source.variables[key].numpy().astype("float16").astype("float32")
            np.testing.assert_array_equal(variable.numpy(), expected)


def test_weights_of_another_alpha_or_network_are_rejected(tmp_path: Path) -> None:
    path, older = save(get_built(), tmp_path / "mobile.weights.h5"), tmp_path / "older.h5"
    with raises(ModelError, "model.weights", path, "set model.alpha=0.35", "MobileNetV2 with alpha 1 .* alpha 0.35"):
        build(alpha=None, weights=str(path))
    problem = r"VGG16 .* 260 arrays, the backbone 26, .* 0 of shape \[3, 3, 512, 512\], the backbone 5"
    with raises(ModelError, "model.weights", path, "VGG16", problem):
        build(backbone="vgg16", alpha=None, weights=str(path))
    get_built().backbone.save(older)
    with raises(ModelError, "model.weights", older, "VGG16", "VGG16 .*layer") as caught:
        build(backbone="vgg16", alpha=None, weights=str(older))
    assert "\n" not in str(caught.value)


def build_efficient_net(seed: int = 1, **changes: Any) -> Classifier:
    return build(seed, backbone="EfficientNetB0", alpha=None, **changes)


class EfficientNets:
    """EfficientNets with the same weights, from a file and as Keras would download it; no test changes them."""

    def __init__(self, folder: Path) -> None:
        self.source = build_efficient_net()
        set_normalization(self.source, *IMAGENET)
        self.path = save(self.source, folder / "imagenet.weights.h5")
        with self.as_download():
            self.imagenet = build_efficient_net(weights="imagenet")
        self.from_file = build_efficient_net(weights=str(self.path))
        set_normalization(self.source, [0.5] * 3, [0.4] * 3)  # values that were not trained on ImageNet
        self.other_path = save(self.source, folder / "other.weights.h5")
        self.source.backbone.get_layer("normalization").finalize_state()

    @contextmanager
    def as_download(self) -> Iterator[None]:
        """The download of `weights="imagenet"` is replaced by the local file."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("keras.src.utils.file_utils.get_file", lambda *_, **__: str(self.path))
            yield


@pytest.fixture(scope="module")
def efficient_nets(tmp_path_factory: pytest.TempPathFactory) -> EfficientNets:
    return EfficientNets(tmp_path_factory.mktemp("efficient"))


@pytest.mark.parametrize("imagenet", [True, False])
def test_an_efficient_net_from_a_file_normalizes_as_with_imagenet_weights(
    imagenet: bool, efficient_nets: EfficientNets
) -> None:
    """Keras adds a layer for `weights="imagenet"`, which is merged here."""
    images = make_images(2).astype("float32")
    if imagenet:
        expected, loaded = efficient_nets.imagenet, efficient_nets.from_file
        # Keras counts input layers.
        names = [[x.name for x in each.backbone.layers[1:]] for each in (expected, efficient_nets.source)]
        assert names[0] == names[1]
    else:  # values that were not trained on ImageNet are unchanged
        expected, loaded = efficient_nets.source, build_efficient_net(weights=str(efficient_nets.other_path))
    theirs, ours = (normalize(classifier, images) for classifier in (expected, loaded))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (np.abs(theirs).max() > 4) == imagenet  # divided twice


@pytest.mark.parametrize(
    ("imagenet", "into"),  # each value is in a quick test; both kinds of weights have equal variables
    [
        (True, "none"),
        (False, "imagenet"),
        pytest.param(True, "imagenet", marks=pytest.mark.slow),
        pytest.param(False, "none", marks=pytest.mark.slow),
    ],
)
def test_an_efficient_net_rebuilt_from_its_variables_normalizes_as_before(
    imagenet: bool, into: str, efficient_nets: EfficientNets
) -> None:
    """A checkpoint has variables alone: neither Keras' second division nor the constants of the Normalization."""
    trained = efficient_nets.imagenet if imagenet else efficient_nets.from_file
    with efficient_nets.as_download():
        rebuilt = build_efficient_net(2, weights=into)  # "imagenet": a warm start
    for name, variable in rebuilt.variables.items():
        variable.assign(trained.variables[name].numpy())
    refresh_normalization(rebuilt.backbone)
    images = make_images(2).astype("float32")
    theirs, ours = (normalize(classifier, images) for classifier in (trained, rebuilt))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(theirs).max() > 4


def test_files_without_weights_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "x.weights.h5").write_text("version https://git-lfs")
    (tmp_path / "x.pt").write_text("")
    problems = {"missing.weights.h5": "does not exist", ".": "is a folder", "x.pt": "is not a Keras file"}
    for name, problem in (problems | {"x.weights.h5": "LFS"}).items():
        with raises(ModelError, "model.weights", tmp_path / name, "imagenet, glyphs, none|replace", problem):
            build(weights=str(tmp_path / name))


@pytest.mark.parametrize("name", ["", "export/saved_model/1", "export/model.keras"])
def test_a_run_as_weights_names_warm_start(name: str, tmp_path: Path) -> None:
    run = tmp_path / "my run"
    (run / "export" / "saved_model" / "1").mkdir(parents=True)
    for file in ("config.yaml", "run.json"):
        (run / file).write_text("{}")
    if name.endswith(".keras"):
        get_built().backbone.save(run / name)
    with raises(ModelError, "model.weights", run / name, f"set 'warm_start={run}' ", "is a folder|does not fit"):
        build(backbone="VGG16", alpha=None, weights=str(run / name))  # has no other alphas to compare the file with


def test_the_packaged_weights_separate_strokes_better_than_random_ones() -> None:
    packed = get_built(weights="glyphs", image_size=48)
    image = np.full((2, 48, 48, 3), 255, "uint8")
    image[0, 10:38, 22:26] = 0
    image[1, 22:26, 10:38] = 0
    vertical, horizontal = packed.pool(packed.features(image)).numpy()
    assert np.isfinite([vertical, horizontal]).all()
    assert np.abs(vertical - horizontal).max() > 0.1
    random = get_built(image_size=48)
    one, other = random.pool(random.features(image)).numpy()
    assert np.abs(one - other).max() < 0.01


def test_glyphs_fit_one_network_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(ModelError, "model.weights", "glyphs", "model=glyphs_mobilenet_v2", "MobileNetV2 with alpha 1"):
        build(weights="glyphs", alpha=None)
    monkeypatch.setattr(weights_module, "GLYPHS_WEIGHTS", tmp_path / "glyphs.weights.h5")
    with raises(ModelError, "model.weights", "glyphs", "make pretrained", "glyphs.weights.h5 is missing"):
        build(weights="glyphs")


def test_imagenet_without_a_network_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    for proxy in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # a closed port
    problem, fix = (
        "VGG19 could not be downloaded .URL fetch failure",
        "again; .* a .weights.h5 file or of a folder .*, or none",
    )
    with raises(Interrupted, "model.weights", "imagenet", fix, problem):
        build(backbone="vgg19", alpha=None, weights="imagenet")


def test_an_incomplete_download_of_weights_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras deletes nothing, but downloads a cached file again whose checksum is wrong."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))

    def download(_origin: str, target: str, _progress: object) -> None:
        Path(target).write_bytes(b"half of it")

    monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", download)
    with raises(Interrupted, "model.weights", "imagenet", "again", "VGG19 could not be downloaded .Incomplete"):
        build(backbone="vgg19", alpha=None, weights="imagenet")


def test_a_full_disk_is_no_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))

    def build(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spec = SimpleNamespace(name="VGG19", build=build)
    with raises(Interrupted, problem=rf"^{tmp_path}: cannot be written to \(No space", fix="make space"):
        weights_module._download(spec, 32, None)  # type: ignore[arg-type]


def test_one_class_is_rejected() -> None:
    with raises(ModelError, fix="another class", problem="number of classes is 1"):
        build(classes=1)
