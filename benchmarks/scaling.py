"""Calculated estimate of data-parallel scaling on 2 to 64 nodes with one GPU each; nothing is measured on a cluster.

    python -m benchmarks.scaling

Counted on the models: trainable parameters (`set_trainable_layers`, batch norm frozen, which is the default) and the
multiply-adds of a forward pass (TensorFlow's profiler, convolutions and matrix products). Assumed: all constants below.
efficiency = compute / (compute + all-reduce), no overlap: one packed collective waits for the whole backward pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from trainer.config.schema import Model
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.freezing import set_trainable_layers

# Backbone -> bounds of the giga-multiply-adds of a forward pass with 1,000 classes, 5 % around torchvision's table of
# the same networks. Keras' ResNet50 is v1 (He et al. 2016: 3.8; stride in the first 1x1), torchvision's is v1.5 (4.1).
BACKBONES = {"MobileNetV2": (0.285, 0.315), "EfficientNetB0": (0.37, 0.41), "ResNet50": (3.8, 4.1)}
BACKBONES |= {"EfficientNetV2S": (7.95, 8.79), "ConvNeXtBase": (14.6, 16.1)}
NODES = (2, 4, 8, 16, 32, 64)
LINES = (10, 100)  # Gb/s, full duplex
LINE_EFFICIENCY = 0.8  # of the line rate, after framing and the stack
HOP_SECONDS = 20e-6  # latency of one of the 2 * (W - 1) hops of a ring
COLLECTIVES = 2  # per step: example count and packed gradients (counted in its graph); the sums are once per call
NODE_BATCH, GLOBAL_BATCH = 64, 1024  # images: per GPU in weak scaling, per step in strong scaling
# Sustained FLOP/s of one A100 in mixed precision, 19 % of its peak of 312e12. NVIDIA (DeepLearningExamples, TensorFlow)
# publishes 2,375 images/s for training ResNet50 v1.5, times 3 x 8.2 GFLOP = 58e12.
GPU_RATE = 60e12
# Depthwise networks are bound by memory: the same source (PyTorch) has 2,489 images/s for EfficientNet-B0, times
# 3 x 0.78 GFLOP = 5.8e12. A slower GPU hides more of the network, so GPU_RATE is the pessimistic figure for scaling.
SLOW_RATE = GPU_RATE / 10
FLOOR = 0.8  # "stops scaling" below this efficiency
ASSUMPTIONS = f"""## Calculated estimate: data-parallel scaling, one GPU per node

- Not measured. One GPU sustains {GPU_RATE / 1e12:g} TFLOP/s (ResNet50 on an A100, mixed precision);
  depthwise networks (MobileNet, EfficientNet) about {SLOW_RATE / 1e12:g}: for them read "stops" at that.
- 1 multiply-add (MAC) = 2 FLOPs. Head phase: a forward pass of the live backbone (not cached features); all: 3 x that.
- Ring all-reduce of float32 gradients at {LINE_EFFICIENCY:g} of the line rate, no overlap with compute,
  {COLLECTIVES} collectives per step with 2 (W - 1) x {HOP_SECONDS * 1e6:g} µs of latency each, batch norm frozen.
- Weak: {NODE_BATCH} images per GPU. Strong: {GLOBAL_BATCH:,} over all. Cells: at {LINES[0]} / {LINES[1]} Gb/s."""


@dataclass(frozen=True)
class Phase:
    name: str  # two cells
    parameters: int  # trainable
    flops: float  # per image: 2 per multiply-add

    def compute(self, images: int, rate: float = GPU_RATE) -> float:
        """Seconds for that many images on one GPU."""
        return images * self.flops / rate

    def traffic(self, nodes: int) -> float:
        """Bytes that every node sends, and as many that it receives, in a ring all-reduce of float32 gradients."""
        return 4 * self.parameters * 2 * (nodes - 1) / nodes

    def all_reduce(self, nodes: int, line: int) -> float:
        """Seconds of a step's collectives."""
        transfer = self.traffic(nodes) / (line * 1e9 / 8 * LINE_EFFICIENCY)
        return transfer + COLLECTIVES * 2 * (nodes - 1) * HOP_SECONDS

    def efficiency(self, nodes: int, line: int, strong: bool, rate: float = GPU_RATE) -> float:
        """Fraction of a step that is compute."""
        compute = self.compute(math.ceil(GLOBAL_BATCH / nodes) if strong else NODE_BATCH, rate)
        return compute / (compute + self.all_reduce(nodes, line))

    def fastest_gpu(self, line: int) -> float:
        """Images/s of one GPU up to which all NODES keep FLOOR in weak scaling; assumes nothing about the GPU."""
        return NODE_BATCH * (1 / FLOOR - 1) / self.all_reduce(NODES[-1], line)

    def stops(self, line: int, strong: bool, rate: float) -> str:
        """The first number of nodes with an efficiency below FLOOR; it falls with every node."""
        below = (n for n in range(2, NODES[-1] + 1) if self.efficiency(n, line, strong, rate) < FLOOR)
        return str(next(below, f">{NODES[-1]}"))


def multiply_adds(classifier: Classifier) -> int:
    """Multiply-adds of the backbone's forward pass for one image; the profiler counts 2 FLOPs for each."""
    image = tf.TensorSpec((1, classifier.image_size, classifier.image_size, 3))
    # On a CPU Keras puts grouped convolutions into functions of their own: without this the profiler misses them.
    tf.config.run_functions_eagerly(True)
    graph = tf.function(classifier.features).get_concrete_function(image).graph
    tf.config.run_functions_eagerly(False)
    float_operations = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options = tf.compat.v1.profiler.ProfileOptionBuilder(float_operations).with_empty_output()
    options = options.with_accounted_types(["^Conv2D$", "^DepthwiseConv2dNative$", "^MatMul$"]).build()
    return tf.compat.v1.profiler.profile(graph, options=options).total_float_ops // 2


def phases(backbone: str) -> list[Phase]:
    """Head with 5 and with 1,000 classes on the live backbone, and everything thawed with 1,000."""
    classifier = build_classifier(Model(backbone=backbone, weights="none"), 5, seed=1)
    width = classifier.backbone.output_shape[-1]
    forward = multiply_adds(classifier)
    low, high = BACKBONES[backbone]
    assert low <= (forward + 1000 * width) / 1e9 <= high, f"{backbone}: {forward:,} multiply-adds"
    plans = (set_trainable_layers(classifier, thaw, "frozen") for thaw in ("none", "all"))
    head, everything = (sum(math.prod(v.shape) for v in plan.trainable.values()) for plan in plans)
    assert head == 5 * (width + 1), f"{backbone}: the head has {head:,} parameters"
    name = f"{backbone} {classifier.image_size} px, {forward / 1e9:.2f} GMAC"
    # Training: a forward and two as large backward products. A frozen backbone has no backward pass.
    heads = [Phase(f"{name} | head, {n:,}", n * (width + 1), 2.0 * (forward + 3 * n * width)) for n in (5, 1000)]
    thawed = everything - head + heads[1].parameters
    return [*heads, Phase(f"{name} | all, 1,000", thawed, 2.0 * 3 * (forward + 1000 * width))]


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    for row in (["backbone", "trains, classes", *columns], ["---", "---", *(["--:"] * len(columns))], *rows):
        print(f"| {' | '.join(row)} |")


def pair(kind: str, of_line: Callable[[int], float]) -> str:
    return " / ".join(format(of_line(line), kind) for line in LINES)


def main() -> None:
    tf.get_logger().setLevel("ERROR")  # hides the profiler's deprecation warnings
    example = Phase("", 1_000_000, 60e9)
    assert example.traffic(4) == 6e6
    assert math.isclose(example.all_reduce(2, 10), 4e-3 + 2 * 40e-6)  # 10 Gb/s x 0.8 = 1 GB/s
    every = [phase for backbone in BACKBONES for phase in phases(backbone)]
    print(ASSUMPTIONS)
    cases = [(strong, rate) for strong in (False, True) for rate in (GPU_RATE, SLOW_RATE)]
    stops = [f"stops, {'strong' if strong else 'weak'}, {rate / 1e12:g} TFLOP/s" for strong, rate in cases]
    columns = ["parameters", f"compute, s for {NODE_BATCH}", *stops, f"images/s for {FLOOR:.0%} on {NODES[-1]} nodes"]
    rows = []
    for p in every:
        cells = [" / ".join(p.stops(line, strong, rate) for line in LINES) for strong, rate in cases]
        rows.append([p.name, f"{p.parameters:,}", f"{p.compute(NODE_BATCH):.5f}", *cells, pair(",.0f", p.fastest_gpu)])
    table(f"Nodes from which the efficiency is below {FLOOR:.0%}; last: of a GPU, weak, at most", columns, rows)
    per_node: dict[str, Callable[[Phase, int], str]] = {
        "MB that a node sends (and receives) per step": lambda p, n: f"{p.traffic(n) / 1e6:.2f}",
        "Seconds of all-reduce per step": lambda p, n: pair(".4f", lambda g: p.all_reduce(n, g)),
        f"Weak efficiency, {GPU_RATE / 1e12:g} TFLOP/s": lambda p, n: pair(".2f", lambda g: p.efficiency(n, g, False)),
        f"Strong efficiency, {GPU_RATE / 1e12:g} TFLOP/s": lambda p, n: pair(".2f", lambda g: p.efficiency(n, g, True)),
    }
    for title, cell in per_node.items():
        table(title, [f"{n} nodes" for n in NODES], [[p.name, *(cell(p, n) for n in NODES)] for p in every])


if __name__ == "__main__":
    main()
