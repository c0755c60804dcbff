"""The decision how the steps of a phase are computed, for every backbone and device, without a GPU."""

import mmap
import re
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from tests.errors import raises
from tests.processes import ROOT
from trainer.cli.compose import compose
from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.config.schema import RunConfig, validate_config
from trainer.errors import ConfigError
from trainer.models.backbones import find_backbone, get_backbones
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.freezing import set_trainable_layers
from trainer.models.gradients import DifferentiatedOperation, find_differentiated_operations
from trainer.planning.computation import (
    IMAGES_PER_LAYER,
    NO_DETERMINISTIC_XLA_GRADIENT,
    Computation,
    PhaseWorkload,
    adopt_computations,
    decide_computation,
)
from trainer.private_api import get_producer
from trainer.types import CPU, Device

H100 = Device("GPU", "NVIDIA H100", (9, 0), 80 * 2**30)
THAWS = ("none", "last_blocks:1", "all")
POOL, CONV = DifferentiatedOperation("pool1_pool", "MaxPooling2D"), DifferentiatedOperation("conv", "Conv2D")
ENOUGH = 100 * IMAGES_PER_LAYER
# Operations of TensorFlow of which its library has a message that no deterministic kernel exists on GPUs.
NOT_DETERMINISTIC = {
    "AdjustContrast", "AdjustContrastv2", "CropAndResizeGradBoxes", "CropAndResizeGradImage",
    "FusedBatchNormGrad", "FusedBatchNormGradV2", "FusedBatchNormGradV3", "ResizeNearestNeighborGrad",
    "SegmentSum", "SegmentSumV2", "SparseTensorDenseMatMul", "UnsortedSegmentSum", "UnsortedSegmentMax",
}  # fmt: skip


def make_config(xla: bool | str = "auto", deterministic: bool = True, backbone: str = "MobileNetV2") -> RunConfig:
    config = validate_config({
        "data": {"source": "digits"}, "phases": {"head": {"thaw": "none", "epochs": 1}},
        "model": {"backbone": backbone, "weights": "none", "image_size": find_backbone(backbone).min_size},
        "runtime": {"xla": xla, "deterministic": deterministic},
    })  # fmt: skip
    assert isinstance(config, RunConfig)
    return config


def decide(
    images: int = ENOUGH,
    operations: tuple[DifferentiatedOperation, ...] = (CONV,),
    device: Device = H100,
    **settings: Any,
) -> Computation:
    return decide_computation(make_config(**settings), "head", device, PhaseWorkload(images, 100, operations))


@pytest.mark.parametrize(
    ("given", "xla", "reason"),
    [
        ({}, True, f"{ENOUGH:,} images per GPU, and compiling 100 layers pays from {ENOUGH:,} on"),
        ({"images": ENOUGH - 1}, False, "pays from"),
        ({"operations": (CONV, POOL)}, False, "pool1_pool (MaxPooling2D) has no deterministic XLA kernel on GPUs"),
        ({"operations": (CONV, POOL), "deterministic": False}, True, "pays from"),
        ({"operations": (CONV, POOL), "device": CPU}, False, "on a CPU it would be slower"),
        ({"device": CPU}, False, "on a CPU it would be slower"),
        ({"xla": False}, False, "as configured"),
        ({"xla": True, "images": 1}, True, "as configured"),
        ({"xla": True, "operations": (POOL,), "device": CPU}, True, "as configured"),
        ({"xla": True, "operations": (POOL,), "deterministic": False}, True, "as configured"),
    ],
)
def test_xla_compiles_what_it_can_and_what_pays(given: dict[str, Any], xla: bool, reason: str) -> None:
    computation = decide(**given)
    assert computation.xla is xla
    assert reason in computation.reason


def test_xla_that_cannot_be_deterministic_is_rejected_if_it_is_set() -> None:
    problem = "the gradient of pool1_pool .* no deterministic XLA kernel on GPUs, and phase head needs it"
    with raises(ConfigError, "runtime.xla", "true", "use auto or false, set runtime.deterministic=false", problem):
        decide(xla=True, operations=(CONV, POOL))


def test_the_line_about_a_phase_has_precision_order_and_reason() -> None:
    line = Computation(False, "on a CPU it would be slower").describe("head", make_config())
    assert line == "computation of phase head: float32, deterministic, XLA off, on a CPU it would be slower"


def test_a_resumed_run_keeps_what_its_first_start_decided(capsys: pytest.CaptureFixture[str]) -> None:
    control, config = ControlChannel(discover({}), {}), make_config()
    now = {"head": Computation(True, "x"), "fine_tune": Computation(False, "x")}
    assert adopt_computations(control, config, H100, now, {}) == {"head": True, "fine_tune": False}
    assert adopt_computations(control, config, H100, now, {"xla": {"fine_tune": True}}) == dict.fromkeys(now, True)
    *_, head, fine_tune = capsys.readouterr().out.splitlines()
    assert head.endswith("XLA on, x")
    assert fine_tune.endswith("XLA on, as this run began")


def test_a_run_on_a_cpu_with_set_values_logs_no_decision(capsys: pytest.CaptureFixture[str]) -> None:
    now = {"head": Computation(False, "as configured")}
    assert adopt_computations(ControlChannel(discover({}), {}), make_config(xla=False), CPU, now, {}) == {"head": False}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("preset", ["gpu", "gpu_pod"])
def test_the_presets_of_gpus_leave_both_to_the_device(preset: str) -> None:
    runtime = validate_config(compose(["data=digits", "model=resnet50", f"runtime={preset}"]) or {}).runtime
    assert (runtime.precision, runtime.xla, runtime.deterministic) == ("auto", "auto", True)


# ---- backbones ----


def build(backbone: str) -> Classifier:
    return build_classifier(make_config(backbone=backbone).model, 2, 1)


def depends_on_trained(tensor: Any, known: dict[int, bool]) -> bool:
    """Return whether a trained layer is below `tensor` in the graph, searching backwards from it."""
    stack = [tensor]
    while stack:
        operation = get_producer(stack[-1])
        inputs = [] if isinstance(operation, keras.layers.InputLayer) else keras.tree.flatten(operation.input)
        if missing := [t for t in inputs if id(t) not in known]:
            stack += missing
            continue
        trained = isinstance(operation, keras.Layer) and bool(operation.trainable_weights)
        known[id(stack.pop())] = trained or any(known[id(t)] for t in inputs)
    return known[id(tensor)]


def decide_for(classifier: Classifier) -> Computation:
    facts = PhaseWorkload(10**9, len(classifier.backbone.layers), find_differentiated_operations(classifier.backbone))
    return decide_computation(make_config(), "head", H100, facts)


def check_decisions(backbone: str) -> dict[str, bool]:
    """Return for each thaw rule whether XLA compiles the step on an H100, after a check by a backward search."""
    classifier, decisions = build(backbone), {}
    for thaw in THAWS:
        set_trainable_layers(classifier, thaw, "frozen")
        decision, known = decide_for(classifier), dict[int, bool]()
        pools = [op for op in classifier.backbone.operations if type(op).__name__ in NO_DETERMINISTIC_XLA_GRADIENT]
        needed = [op.name for op in pools if depends_on_trained(op.input, known)]
        assert decision.xla is not bool(needed), (backbone, thaw)
        assert not needed or needed[0] in decision.reason
        decisions[thaw] = decision.xla
    return decisions


def make_gradient(classifier: Classifier, thaw: str, xla: bool = False, batch_norm: str = "frozen") -> Any:
    """Return a function that computes the gradients of images, as a training step does."""
    plan = set_trainable_layers(classifier, thaw, batch_norm)  # type: ignore[arg-type]
    trained = plan.trainable

    def differentiate(images: tf.Tensor) -> Any:
        raw = [v.value for v in trained.values()]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(raw)
            logits = classifier.logits(
                images, training=True, batch_norm_training=plan.batch_norm_training, weight=tf.ones(images.shape[:1])
            )
            loss = tf.reduce_sum(logits)
        return tape.gradient(loss, raw, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    return tf.function(differentiate, jit_compile=xla, autograph=False)


def check_gradient(backbone: str, thaw: str) -> None:
    """Compare the operations of the traced gradient with the tables."""
    classifier = build(backbone)
    spec = tf.TensorSpec((2, classifier.image_size, classifier.image_size, 3), tf.uint8)
    kinds = {op.type for op in make_gradient(classifier, thaw).get_concrete_function(spec).graph.get_operations()}
    assert not kinds & NOT_DETERMINISTIC
    computed = {operation.class_name for operation in find_differentiated_operations(classifier.backbone)}
    assert bool(computed & set(NO_DETERMINISTIC_XLA_GRADIENT)) is ("MaxPoolGrad" in kinds), (backbone, thaw)


@pytest.mark.parametrize(
    ("backbone", "decisions"),
    [
        ("VGG16", {"none": True, "last_blocks:1": False, "all": False}),  # a block of VGG ends with pooling
        ("ResNet50", {"none": True, "last_blocks:1": True, "all": False}),  # pooling is in the stem
        ("MobileNetV2", {"none": True, "last_blocks:1": True, "all": True}),  # there is none
    ],
)
def test_pooling_above_the_first_thawed_layer_forbids_xla(backbone: str, decisions: dict[str, bool]) -> None:
    assert check_decisions(backbone) == decisions


@pytest.mark.parametrize("thaw", THAWS)
def test_the_gradient_has_the_operations_of_the_graph(thaw: str) -> None:
    check_gradient("VGG16", thaw)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backbone", [spec.name for spec in get_backbones().values()])
def test_every_backbone_has_a_decision_in_every_phase(backbone: str) -> None:
    decisions = check_decisions(backbone)
    keras.backend.clear_session()
    assert decisions["none"], "no gradient passes through a frozen backbone"
    rows = re.findall(
        r"^\| ([\w, ]+) \| [^|]+ \| (on|off) \| (on|off) \|$", (ROOT / "docs" / "speed.md").read_text(), re.M
    )
    (documented,) = ({"last_blocks:1": one == "on", "all": every == "on"} for names, one, every in rows
                     if backbone.startswith(tuple(names.split(", "))))  # fmt: skip
    assert {thaw: decisions[thaw] for thaw in documented} == documented


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("thaw", ["last_blocks:1", "all"])
@pytest.mark.parametrize(
    "backbone",
    ["MobileNet", "MobileNetV2", "MobileNetV3Small", "Xception", "InceptionV3", "InceptionResNetV2", "NASNetMobile",
     "ResNet50", "ResNet50V2", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0", "ConvNeXtTiny"],
)  # fmt: skip
def test_the_gradient_of_every_family_has_the_operations_of_its_graph(backbone: str, thaw: str) -> None:
    check_gradient(backbone, thaw)


# The quick backbone has the same kinds of layers, and half as many.
@pytest.mark.parametrize("backbone", ["MobileNet", pytest.param("MobileNetV2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch_norm", ["affine", "train"])
def test_normalization_that_trains_has_deterministic_gradients(batch_norm: str, backbone: str) -> None:
    classifier = build(backbone)
    spec = tf.TensorSpec((2, classifier.image_size, classifier.image_size, 3), tf.uint8)
    traced = make_gradient(classifier, "all", batch_norm=batch_norm).get_concrete_function(spec).graph.get_operations()
    assert not {op.type for op in traced} & NOT_DETERMINISTIC


# What TensorFlow's library prints of operations without a deterministic kernel on GPUs, and where the tables have them.
MESSAGES = {
    "A deterministic GPU implementation of AdjustContrast is not currently available.": "AdjustContrast",
    "A deterministic GPU implementation of AdjustContrastv2 is not currently available.": "AdjustContrastv2",
    "A deterministic GPU implementation of ResizeNearestNeighborGrad is not currently available.": (
        "ResizeNearestNeighborGrad"
    ),
    "A deterministic GPU implementation of SparseTensorDenseMatmulOp is not currently available.": (
        "SparseTensorDenseMatMul"
    ),
    "A deterministic GPU implementation of fused batch-norm backprop, when training is disabled, is not currently "
    "available.": "FusedBatchNormGradV3",
    "Deterministic GPU implementation of CropAndResizeBackpropBoxes not available.": "CropAndResizeGradBoxes",
    "Deterministic GPU implementation of CropAndResizeBackpropImage not available.": "CropAndResizeGradImage",
    "Deterministic GPU implementation of sorted segment reduction op not available.": "SegmentSum",
    "Deterministic GPU implementation of unsorted segment reduction op not available.": "UnsortedSegmentSum",
}


@pytest.mark.slow
def test_the_tables_have_every_operation_of_which_tensorflow_has_a_message() -> None:
    """The library of TensorFlow for CPUs and GPUs is the same."""
    library = Path(tf.sysconfig.get_lib()) / "libtensorflow_cc.so.2"
    texts = set()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for phrase in (b"eterministic GPU implementation of", b"a deterministic XLA implementation"):
            at = content.find(phrase)
            while at >= 0:
                end = content.find(b"\0", at)
                texts.add(content[content.rfind(b"\0", 0, at) + 1 : end].decode())
                at = content.find(phrase, end)
    old_cudnn = {text for text in texts if "Please build with cuDNN version 7.6.3 or later" in text}
    xla = {text for text in texts if "XLA" in text}
    assert {f"{text}." for text in NO_DETERMINISTIC_XLA_GRADIENT.values()} == xla
    assert texts - old_cudnn - xla == set(MESSAGES)
    assert set(MESSAGES.values()) <= NOT_DETERMINISTIC


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backbone", ["ResNet50", "VGG16", "MobileNetV2"])
def test_a_gpu_computes_the_gradient_that_the_decision_allows(backbone: str) -> None:
    """Its CPU twin is `test_pooling_above_the_first_thawed_layer_forbids_xla`."""
    if not tf.config.list_physical_devices("GPU"):
        pytest.skip("needs a GPU")
    classifier = build(backbone)
    set_trainable_layers(classifier, "all", "frozen")
    tf.config.experimental.enable_op_determinism()
    images = tf.zeros((2, classifier.image_size, classifier.image_size, 3), tf.uint8)
    assert make_gradient(classifier, "all", decide_for(classifier).xla)(images)
