"""Format the layers of a classifier as a text table: output shapes, parameters, and the phases that train them."""

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from trainer.models.batch_norm import BATCH_NORM_CLASS
from trainer.models.classifier import Classifier, count_parameters
from trainer.planning.estimates import PhasePlan, count_model_parameters
from trainer.report.figures import shorten_name

PIPE_WIDTH = 80  # characters per line if neither a terminal nor $COLUMNS determines them
_COLUMNS = ("#", "layer", "type", "output", "dtype", "parameters", "trains in")
_NAME, _TYPE = 1, 2  # indices of the columns that are shortened in a narrow terminal, first the type
_RIGHT_ALIGNED = (0, 5)  # indices of the columns with numbers
_MIN_NAME, _MIN_TYPE = 16, 9  # minimum widths of the columns `_NAME` and `_TYPE` in characters


def format_layers(classifier: Classifier, phases: Sequence[PhasePlan], width: int) -> list[str]:
    """Return one line per layer, and lines with the number of all parameters and of those that each phase trains.

    Backbone layers have the index that thaw rules such as from_layer:100 use. Head layers have no index, and train in
    every phase.

    Args:
        width: maximum number of characters per line, at least 72.
    """
    rows = [_COLUMNS, *_describe_backbone(classifier, phases), *_describe_head(classifier, len(phases))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for column, min_width in ((_TYPE, _MIN_TYPE), (_NAME, _MIN_NAME)):
        excess = sum(widths) + 2 + len(widths) - 1 - width  # 2: indentation; one space between columns
        widths[column] -= max(0, min(excess, widths[column] - min_width))
    lines = []
    for row in rows:
        shortened_row = [shorten_name(text, text_width) for text, text_width in zip(row, widths, strict=True)]
        cells = [
            f"{t:>{w}}" if i in _RIGHT_ALIGNED else f"{t:{w}}"
            for i, (t, w) in enumerate(zip(shortened_row, widths, strict=True))
        ]
        lines.append(f"  {' '.join(cells)}".rstrip())
    trained_counts = ", ".join(f"{number} {p.name} {p.trainable_parameters:,}" for number, p in enumerate(phases, 1))
    totals = f"{count_model_parameters(classifier):,} parameters; trainable ones by phase: {trained_counts}"
    return [*lines, *textwrap.wrap(totals, width, initial_indent="  ", subsequent_indent="  ")]


def _describe_backbone(classifier: Classifier, phases: Sequence[PhasePlan]) -> list[tuple[str, ...]]:
    """Return the table rows of the backbone's layers, as cells of `_COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for index, layer in enumerate(classifier.backbone.layers):
        phase_numbers = [number for number, phase in enumerate(phases, 1) if index in phase.trained_layers]
        output = layer.output[0] if isinstance(layer.output, list | tuple) else layer.output
        rows.append((str(index), layer.name, *_describe(layer, output.shape[1:]), _format_numbers(phase_numbers)))
    return rows


def _describe_head(classifier: Classifier, phases: int) -> list[tuple[str, ...]]:
    """Return the table rows of the pooling and the head, which all phases train. `phases` is the number of phases."""
    num_channels = classifier.backbone.output_shape[-1]
    numbers = _format_numbers(range(1, phases + 1))
    pooling = "GlobalAveragePooling2D" if classifier.pooling == "avg" else "GlobalMaxPooling2D"
    rows = [("", f"{classifier.pooling} pooling", pooling, str(num_channels), "float32", "", "")]
    for hidden in classifier.hidden:
        shape = (hidden.dense.units,)
        rows += [("", layer.name, *_describe(layer, shape), numbers) for layer in (hidden.dense, hidden.norm) if layer]
    output = classifier.output
    return [*rows, ("", output.name, *_describe(output, (output.units,)), numbers)]


def _describe(layer: Any, shape: Sequence[int | None]) -> tuple[str, str, str, str]:
    """Return a layer's cells type, output, dtype and parameters. `shape` is the output shape without the batch axis."""
    # With batch_norm=train, a thawed layer has the subclass PaddingAwareBatchNormalization.
    class_name = BATCH_NORM_CLASS.__name__ if isinstance(layer, BATCH_NORM_CLASS) else type(layer).__name__
    parameters = count_parameters(layer.weights)
    return class_name, "x".join(map(str, shape)), layer.compute_dtype, f"{parameters:,}" if parameters else ""


def _format_numbers(numbers: Sequence[int]) -> str:
    """Format increasing numbers with ranges: [1, 3, 4, 5] -> "1,3-5"."""
    # Consecutive numbers have the same difference from their index.
    groups = [[n for _, n in group] for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)
