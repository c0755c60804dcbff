"""Draw the network as a PNG (`trainer.plan --plot`): its stages, and which stages each phase trains.

A stage is the stem, a block, several merged blocks, or the top of the backbone.
"""

import math
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from trainer.models.batch_norm import BATCH_NORM_CLASS
from trainer.models.classifier import Classifier, count_parameters
from trainer.planning.estimates import PhasePlan, count_model_parameters
from trainer.report.figures import GRID_LINE, INK, MUTED, create_figure, format_label, save

FROZEN, TRAINS_PARTLY, TRAINS = "#d8dee6", "#a7c4f5", "#2563eb"  # colors of a stage
MAX_LAYER_GROUPS = 36  # in a network with more stages, consecutive blocks of one resolution are merged
# x coordinates of the columns, and the width of the column of a phase. The height of a row is 1.
CENTER_X, OUTPUT_X, LAYERS_X, PARAMETERS_X, FIRST_PHASE_X, PHASE_WIDTH = 2.9, 6.3, 9.6, 11.6, 12.2, 1.5


@dataclass(frozen=True)
class Stage:
    """Consecutive layers of the backbone that are drawn as one box."""

    name: str
    layers: range  # indices in backbone.layers
    shape: tuple[int, ...]  # shape of the output, without the batch dimension
    parameters: int  # number of parameters


# Name, output shape, number of layers, number of parameters, and the stage, "head", or None for a row without weights.
Row = tuple[str, tuple[int, ...], int, int, Stage | str | None]


def divide_into_stages(classifier: Classifier) -> list[Stage]:
    """Divide the backbone into stem, blocks and top.

    If there are more than `MAX_LAYER_GROUPS` stages, consecutive ones whose feature maps have the same size are merged.
    """
    spec = classifier.spec
    names = [layer.name for layer in classifier.backbone.layers]
    first_layers = list(spec.find_block_starts(names).items())  # (block, index)
    top_start = 1 + max(i for i, name in enumerate(names) if spec.find_block(name) == first_layers[-1][0])
    if first_layers[0][1] > 0:
        first_layers.insert(0, ("stem", 0))
    if top_start < len(names):
        first_layers.append(("top", top_start))
    intervals = pairwise([*first_layers, ("end", len(names))])
    stages = [_make_stage(classifier, name, range(first, stop)) for (name, first), (_, stop) in intervals]
    if len(stages) <= MAX_LAYER_GROUPS:
        return stages
    merged_stages: list[Stage] = []
    for _, group in groupby(stages, key=lambda stage: stage.shape[:2]):
        members = list(group)
        name = members[0].name if len(members) == 1 else f"{members[0].name} to {members[-1].name}"
        merged_stages.append(_make_stage(classifier, name, range(members[0].layers.start, members[-1].layers.stop)))
    return merged_stages


def _make_stage(classifier: Classifier, name: str, indices: range) -> Stage:
    """Build the stage of the backbone layers with these indices."""
    layers = classifier.backbone.layers[indices.start : indices.stop]
    weights = [variable for layer in layers for variable in layer.weights]
    return Stage(name, indices, tuple(layers[-1].output.shape[1:]), count_parameters(weights))


def draw_network(classifier: Classifier, phases: list[PhasePlan], num_classes: int, path: Path) -> Path:
    """Draw the network from images to head as a PNG, and return `path`.

    Each row has a box for a stage. The width of the box shows the side of the stage's feature maps, and its color
    whether the stage trains in the last phase. One column per phase shows whether the stage trains in that phase.

    Args:
        path: the PNG file to write.
    """
    image_size = classifier.image_size
    stages = divide_into_stages(classifier)
    head_size = count_parameters(classifier.head_variables.values())
    hidden = f"hidden {', '.join(str(layer.dense.units) for layer in classifier.hidden)}, " if classifier.hidden else ""
    rows: list[Row] = [("images", (image_size, image_size, 3), 0, 0, None)]
    rows += [(s.name, s.shape, len(s.layers), s.parameters, s) for s in stages]
    rows.append((f"{classifier.pooling} pooling", (stages[-1].shape[-1],), 0, 0, None))
    rows.append((f"head: {hidden}{num_classes} classes", (num_classes,), 1 + len(classifier.hidden), head_size, "head"))

    width = FIRST_PHASE_X + PHASE_WIDTH * len(phases)
    figure = create_figure(0.36 * (len(rows) + 3.4), width=max(8.0, 0.68 * width))
    axes = figure.subplots()
    axes.set_xlim(-0.2, width)
    axes.set_ylim(len(rows) + 0.9, -2.15)
    axes.axis("off")
    title = f"{classifier.spec.name}, {count_model_parameters(classifier):,} parameters"
    axes.text(0, -1.65, title, fontsize=12, weight="bold", color=INK)
    axes.plot([0, width - 0.1], [-1.15, -1.15], color=GRID_LINE, linewidth=0.8)
    columns = [(OUTPUT_X, "output", "left"), (LAYERS_X, "layers", "right"), (PARAMETERS_X, "parameters", "right")]
    columns += [
        (FIRST_PHASE_X + PHASE_WIDTH * (n + 0.5), format_label(p.name, max_length=12), "center")
        for n, p in enumerate(phases)
    ]
    for x, name, align in columns:
        axes.text(x, -0.72, name, fontsize=8.5, color=MUTED, ha=align, va="center")
    for y, row in enumerate(rows):
        _draw_row(axes, y, row, [_choose_color(classifier, phase, row[-1]) for phase in phases], image_size)
        if y + 1 < len(rows):
            arrow = {"arrowstyle": "-|>", "color": MUTED, "lw": 0.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
            axes.annotate("", (CENTER_X, y + 0.7), (CENTER_X, y + 0.3), arrowprops=arrow)
    legend = ((TRAINS, "trains"), (TRAINS_PARTLY, "trains in part"), (FROZEN, "frozen"))
    for i, (color, name) in enumerate(legend):
        x = 0.2 + 2.4 * i
        _draw_box(axes, x, len(rows) + 0.35, width=0.36, height=0.36, color=color)
        axes.text(x + 0.5, len(rows) + 0.35, name, fontsize=8.5, va="center", color=INK)
    return save(figure, path)


def _draw_row(axes: Axes, y: int, row: Row, colors: list[str | None], size: int) -> None:
    """Draw a row. `colors` has the color of its box in each phase, and `size` is the side of the images in pixels."""
    name, shape, layers, parameters, _ = row
    # The side of the feature maps on a logarithmic scale, so that each halving narrows the box by the same amount.
    relative_side = math.log2(shape[0]) / math.log2(size) if len(shape) == 3 and shape[0] > 1 else 0.0
    box_width = 3.4 + 2.4 * relative_side
    text_color = "white" if colors[-1] == TRAINS else INK
    _draw_box(axes, CENTER_X - box_width / 2, y, box_width, height=0.6, color=colors[-1])
    axes.text(CENTER_X, y, format_label(name, max_length=30), fontsize=9, ha="center", va="center", color=text_color)
    axes.text(OUTPUT_X, y, " × ".join(str(n) for n in shape), fontsize=9, va="center", color=INK)
    for x, count in ((LAYERS_X, layers), (PARAMETERS_X, parameters)):
        axes.text(x, y, f"{count:,}" if count else "", fontsize=9, va="center", ha="right", color=INK)
    for column, color in enumerate(colors):
        if color:
            _draw_box(axes, FIRST_PHASE_X + PHASE_WIDTH * column + 0.1, y, PHASE_WIDTH - 0.2, height=0.6, color=color)


def _draw_box(axes: Axes, left: float, center_y: float, width: float, height: float, color: str | None) -> None:
    """Draw a filled box with rounded corners, or only its edge if `color` is None."""
    face, edge, style = color or "white", "none" if color else MUTED, "round,pad=0,rounding_size=0.11"
    corner = (left, center_y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=face, edgecolor=edge, linewidth=0.8))


def _choose_color(classifier: Classifier, phase: PhasePlan, stage: Stage | str | None) -> str | None:
    """Return the color of a row in a phase, which shows whether all, some or none of the stage's layers train.

    The head ("head") trains in every phase. A row without weights (None) has no color.
    """
    if stage is None or isinstance(stage, str):
        return TRAINS if stage else None
    layers = classifier.backbone.layers
    # BatchNormalization is excluded, so that a stage does not appear partly trained with batch_norm=frozen.
    layers_with_weights = {i for i in stage.layers if layers[i].weights and not isinstance(layers[i], BATCH_NORM_CLASS)}
    if layers_with_weights and layers_with_weights <= phase.trained_layers:
        return TRAINS
    return FROZEN if phase.trained_layers.isdisjoint(stage.layers) else TRAINS_PARTLY
