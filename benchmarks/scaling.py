"""Estimate data-parallel scaling on 2 to 64 nodes with one GPU each. Nothing is measured on a cluster.

    python -m benchmarks.scaling

Counted in the models: trainable parameters (`set_trainable_layers`, batch norm frozen, which is the default) and the
multiply-adds of a forward pass (TensorFlow's profiler, convolutions and matrix products). Assumed: all constants below.
efficiency = compute / (compute + all-reduce). The two do not overlap, because one packed collective waits for the end
of the backward pass.
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
LINKS = (10, 100)  # rates of the network links in Gb/s, full duplex
LINK_EFFICIENCY = 0.8  # fraction of the link's rate that is left after framing and the network stack
HOP_SECONDS = 20e-6  # latency of one of the 2 * (W - 1) hops of a ring
COLLECTIVES = 2  # per step: example count and packed gradients (counted in its graph); the sums are once per call
NODE_BATCH, GLOBAL_BATCH = 64, 1024  # images: per GPU in weak scaling, per step in strong scaling
# Sustained FLOP/s of one A100 in mixed precision, 19 % of its peak of 312e12. NVIDIA (DeepLearningExamples, TensorFlow)
# publishes 2,375 images/s for training ResNet50 v1.5, times 3 x 8.2 GFLOP = 58e12.
GPU_RATE = 60e12
# Depthwise networks are bound by memory: the same source (PyTorch) has 2,489 images/s for EfficientNet-B0, times
# 3 x 0.78 GFLOP = 5.8e12. A slower GPU hides more of the network, so GPU_RATE is the pessimistic figure for scaling.
SLOW_RATE = GPU_RATE / 10
MIN_EFFICIENCY = 0.8  # "stops scaling" below this efficiency
ASSUMPTIONS = f"""## Calculated estimate: data-parallel scaling, one GPU per node

- Not measured. One GPU sustains {GPU_RATE / 1e12:g} TFLOP/s (ResNet50 on an A100, mixed precision);
  depthwise networks (MobileNet, EfficientNet) about {SLOW_RATE / 1e12:g}: for them read "stops" at that.
- 1 multiply-add (MAC) = 2 FLOPs. Head phase: a forward pass of the live backbone (not cached features); all: 3 x that.
- Ring all-reduce of float32 gradients at {LINK_EFFICIENCY:g} of the line rate, no overlap with compute,
  {COLLECTIVES} collectives per step with 2 (W - 1) x {HOP_SECONDS * 1e6:g} µs of latency each, batch norm frozen.
- Weak: {NODE_BATCH} images per GPU. Strong: {GLOBAL_BATCH:,} over all. Cells: at {LINKS[0]} / {LINKS[1]} Gb/s."""


@dataclass(frozen=True)
class Phase:
    """A training phase of a backbone: what a node computes and sends per step."""

    name: str  # two cells of a table, separated by " | "
    parameters: int  # number of trainable parameters
    flops: float  # floating-point operations per image: 2 per multiply-add

    def compute_seconds(self, images: int, rate: float = GPU_RATE) -> float:
        """Return the seconds to compute a step with `images` images on one GPU of `rate` FLOP/s."""
        return images * self.flops / rate

    def bytes_per_node(self, nodes: int) -> float:
        """Return the bytes that a node sends (and also receives) in a ring all-reduce of float32 gradients."""
        return 4 * self.parameters * 2 * (nodes - 1) / nodes

    def all_reduce_seconds(self, nodes: int, link_rate: int) -> float:
        """Return the seconds of a step's collectives; `link_rate` is in Gb/s."""
        transfer = self.bytes_per_node(nodes) / (link_rate * 1e9 / 8 * LINK_EFFICIENCY)
        return transfer + COLLECTIVES * 2 * (nodes - 1) * HOP_SECONDS

    def efficiency(self, nodes: int, link_rate: int, strong: bool, rate: float = GPU_RATE) -> float:
        """Return the fraction of a step's time that is computation, in strong or weak scaling."""
        compute_seconds = self.compute_seconds(math.ceil(GLOBAL_BATCH / nodes) if strong else NODE_BATCH, rate)
        return compute_seconds / (compute_seconds + self.all_reduce_seconds(nodes, link_rate))

    def max_images_per_second(self, link_rate: int) -> float:
        """Return the images/s of a GPU up to which weak scaling to all `NODES` has at least `MIN_EFFICIENCY`."""
        return NODE_BATCH * (1 / MIN_EFFICIENCY - 1) / self.all_reduce_seconds(NODES[-1], link_rate)

    def find_first_inefficient_size(self, link_rate: int, strong: bool, rate: float) -> str:
        """Return the smallest number of nodes with an efficiency below `MIN_EFFICIENCY`; it falls with each node."""
        below = (n for n in range(2, NODES[-1] + 1) if self.efficiency(n, link_rate, strong, rate) < MIN_EFFICIENCY)
        return str(next(below, f">{NODES[-1]}"))


def count_multiply_adds(classifier: Classifier) -> int:
    """Count the multiply-adds of the backbone's forward pass for one image. The profiler counts 2 FLOPs for each."""
    image = tf.TensorSpec((1, classifier.image_size, classifier.image_size, 3))
    # On a CPU, Keras puts grouped convolutions into separate functions, which the profiler would not count.
    tf.config.run_functions_eagerly(True)
    graph = tf.function(classifier.features).get_concrete_function(image).graph
    tf.config.run_functions_eagerly(False)
    float_operations = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options = tf.compat.v1.profiler.ProfileOptionBuilder(float_operations).with_empty_output()
    options = options.with_accounted_types(["^Conv2D$", "^DepthwiseConv2dNative$", "^MatMul$"]).build()
    return tf.compat.v1.profiler.profile(graph, options=options).total_float_ops // 2


def list_phases(backbone: str) -> list[Phase]:
    """List three phases: the head with 5 and with 1,000 classes on the live backbone, and all layers with 1,000."""
    classifier = build_classifier(Model(backbone=backbone, weights="none"), 5, seed=1)
    width = classifier.backbone.output_shape[-1]
    forward = count_multiply_adds(classifier)
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


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table with its title."""
    print(f"\n{title}\n")
    for row in (["backbone", "trains, classes", *columns], ["---", "---", *(["--:"] * len(columns))], *rows):
        print(f"| {' | '.join(row)} |")


def format_per_line(number_format: str, function: Callable[[int], float]) -> str:
    """Format the values of a function of the link's rate, such as "0.95 / 0.99"."""
    return " / ".join(format(function(link_rate), number_format) for link_rate in LINKS)


def main() -> None:
    """Check the formulas with an example, and print the assumptions and all tables."""
    tf.get_logger().setLevel("ERROR")  # hides the profiler's deprecation warnings
    example = Phase("", 1_000_000, 60e9)
    assert example.bytes_per_node(4) == 6e6
    assert math.isclose(example.all_reduce_seconds(2, 10), 4e-3 + 2 * 40e-6)  # 10 Gb/s x 0.8 = 1 GB/s
    all_phases = [phase for backbone in BACKBONES for phase in list_phases(backbone)]
    print(ASSUMPTIONS)
    cases = [(strong, rate) for strong in (False, True) for rate in (GPU_RATE, SLOW_RATE)]
    find_first_inefficient_size = [
        f"stops, {'strong' if strong else 'weak'}, {rate / 1e12:g} TFLOP/s" for strong, rate in cases
    ]
    columns = [
        "parameters",
        f"compute, s for {NODE_BATCH}",
        *find_first_inefficient_size,
        f"images/s for {MIN_EFFICIENCY:.0%} on {NODES[-1]} nodes",
    ]
    rows = []
    for p in all_phases:
        cells = [
            " / ".join(p.find_first_inefficient_size(link_rate, strong, rate) for link_rate in LINKS)
            for strong, rate in cases
        ]
        rows.append(
            [
                p.name,
                f"{p.parameters:,}",
                f"{p.compute_seconds(NODE_BATCH):.5f}",
                *cells,
                format_per_line(",.0f", p.max_images_per_second),
            ]
        )
    print_table(
        f"Nodes from which the efficiency is below {MIN_EFFICIENCY:.0%}; last: of a GPU, weak, at most", columns, rows
    )
    per_node: dict[str, Callable[[Phase, int], str]] = {
        "MB that a node sends (and receives) per step": lambda p, n: f"{p.bytes_per_node(n) / 1e6:.2f}",
        "Seconds of all-reduce per step": lambda p, n: format_per_line(".4f", lambda g: p.all_reduce_seconds(n, g)),
        f"Weak efficiency, {GPU_RATE / 1e12:g} TFLOP/s": lambda p, n: format_per_line(
            ".2f", lambda g: p.efficiency(n, g, False)
        ),
        f"Strong efficiency, {GPU_RATE / 1e12:g} TFLOP/s": lambda p, n: format_per_line(
            ".2f", lambda g: p.efficiency(n, g, True)
        ),
    }
    for title, cell in per_node.items():
        print_table(title, [f"{n} nodes" for n in NODES], [[p.name, *(cell(p, n) for n in NODES)] for p in all_phases])


if __name__ == "__main__":
    main()
