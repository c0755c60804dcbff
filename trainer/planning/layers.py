"""Format the layers of a network as a table: index, name, type, output, dtype, parameters, phases that train them."""

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from trainer.models.batch_norm import NORM
from trainer.models.classifier import Classifier, count_parameters
from trainer.planning.estimates import PhasePlan, count_model_parameters
from trainer.report.figures import shorten_name

PIPE_WIDTH = 80  # characters per line if the output is not a terminal
_COLUMNS = ("#", "layer", "type", "output", "dtype", "parameters", "trains in")
_NAME, _TYPE = 1, 2  # columns that are shortened in a narrow terminal, first the type
_RIGHT = (0, 5)  # columns of numbers
_MIN_NAME, _MIN_TYPE = 16, 9  # characters


def format_layers(classifier: Classifier, phases: Sequence[PhasePlan], width: int) -> list[str]:
    """Format a line per layer of at most `width` characters (72 or more), and lines with the totals.

    Layers have the indices that thaw rules such as from_layer:100 count. The head has none, and trains in each phase.
    """
    rows = [_COLUMNS, *_describe_backbone(classifier, phases), *_describe_head(classifier, len(phases))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for column, least in ((_TYPE, _MIN_TYPE), (_NAME, _MIN_NAME)):
        excess = sum(widths) + 2 + len(widths) - 1 - width
        widths[column] -= max(0, min(excess, widths[column] - least))
    lines = []
    for row in rows:
        cells = [shorten_name(text, wide) for text, wide in zip(row, widths, strict=True)]
        padded = [
            f"{c:>{w}}" if i in _RIGHT else f"{c:{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(f"  {' '.join(padded)}".rstrip())
    trained = ", ".join(f"{number} {p.name} {p.trainable_parameters:,}" for number, p in enumerate(phases, 1))
    totals = f"{count_model_parameters(classifier):,} parameters; trainable ones by phase: {trained}"
    return [*lines, *textwrap.wrap(totals, width, initial_indent="  ", subsequent_indent="  ")]


def _describe_backbone(classifier: Classifier, phases: Sequence[PhasePlan]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for index, layer in enumerate(classifier.backbone.layers):
        numbers = [number for number, phase in enumerate(phases, 1) if index in phase.trained_layers]
        output = layer.output[0] if isinstance(layer.output, list | tuple) else layer.output
        rows.append((str(index), layer.name, *_describe(layer, output.shape[1:]), _format_numbers(numbers)))
    return rows


def _describe_head(classifier: Classifier, phases: int) -> list[tuple[str, ...]]:
    channels, numbers = classifier.backbone.output_shape[-1], _format_numbers(range(1, phases + 1))
    pooling = "GlobalAveragePooling2D" if classifier.pooling == "avg" else "GlobalMaxPooling2D"
    rows = [("", f"{classifier.pooling} pooling", pooling, str(channels), "float32", "", "")]
    for hidden in classifier.hidden:
        shape = (hidden.dense.units,)
        rows += [("", layer.name, *_describe(layer, shape), numbers) for layer in (hidden.dense, hidden.norm) if layer]
    output = classifier.output
    return [*rows, ("", output.name, *_describe(output, (output.units,)), numbers)]


def _describe(layer: Any, shape: Sequence[int | None]) -> tuple[str, str, str, str]:
    """Return the type, the output without the batch dimension, the compute dtype and the parameters of a layer."""
    kind = (
        NORM.__name__ if isinstance(layer, NORM) else type(layer).__name__
    )  # a thawed one has a class of this project
    parameters = count_parameters(layer.weights)
    return kind, "x".join(map(str, shape)), layer.compute_dtype, f"{parameters:,}" if parameters else ""


def _format_numbers(numbers: Sequence[int]) -> str:
    """Format increasing numbers with ranges: [1, 3, 4, 5] -> "1,3-5"."""
    groups = [[n for _, n in group] for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)
