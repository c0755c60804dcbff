"""Freeze and unfreeze layers: select a phase's trainable layers, and compute their learning-rate multipliers.

The configuration key `thaw` of a phase is the rule that selects the layers. Messages call the selected layers thawed.
"""

import bisect
import difflib
import re
from dataclasses import dataclass
from itertools import chain

import keras

from trainer.errors import ModelError
from trainer.models.batch_norm import BATCH_NORM_CLASS, PaddingAwareBatchNormalization, tracks_statistics
from trainer.models.classifier import Classifier, count_parameters, count_variable_bytes
from trainer.private_api import swap_class

# Groups of variables in the order of the log: a part of the classifier, and what training does with its variables.
GROUPS = ("head, trains", "backbone, trains", "batch norm, trains", "batch norm, moving averages",
          "backbone, frozen", "batch norm, frozen")  # fmt: skip


@dataclass(frozen=True)
class FreezingPlan:
    """The trainable and frozen variables of a classifier in one phase, and the learning-rate multipliers."""

    thaw: str  # the rule that selects the trainable layers, such as "last_blocks:2"
    batch_norm: str  # frozen | affine | train
    trainable: dict[str, keras.Variable]  # the variables that the optimizer updates, by name, in a fixed order
    groups: dict[str, list[keras.Variable]]  # all variables by group, in the order of `GROUPS`, without empty groups
    first_trainable: int | None  # index of the first backbone layer with trainable weights; None if all are frozen
    first_trainable_name: str | None  # name of the layer with index `first_trainable`
    num_selected_layers: int  # number of backbone layers that the rule selects
    num_layers: int  # number of backbone layers
    batch_norm_training: bool  # whether training updates moving averages in the backbone
    lr_multipliers: tuple[float, ...]  # per variable of `trainable`, relative to the head; empty if all are 1
    lr_summary: str  # text with each block's multiplier; empty if all are 1

    def format_lines(self) -> list[str]:
        """Format the plan as lines for the log: a heading, a table with a row per group, and the multipliers."""
        summary = f"all {self.num_layers} layers of the backbone are frozen"
        if self.first_trainable is not None:
            summary = (f"{self.num_selected_layers} of {self.num_layers} layers thawed, the first trainable one is "
                       f"{self.first_trainable} ({self.first_trainable_name})")  # fmt: skip
        table = [("", "variables", "parameters", "size")]
        for group_name, group in {**self.groups, "all": list(chain(*self.groups.values()))}.items():
            sizes = f"{count_parameters(group):,}", f"{count_variable_bytes(group) / 1e6:,.2f} MB"
            table.append((group_name, f"{len(group):,}", *sizes))
        name_width, *widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = ["  " + "  ".join([name.ljust(name_width), *map(str.rjust, cells, widths)]) for name, *cells in table]
        return [f"thaw {self.thaw}, batch_norm {self.batch_norm}: {summary}", *rows, *filter(None, [self.lr_summary])]


def set_trainable_layers(
    classifier: Classifier, thaw: str, batch_norm: str, backbone_rate: float = 1.0, layer_decay: float = 1.0
) -> FreezingPlan:
    """Freeze or unfreeze every backbone layer for a phase (Keras' `trainable`). The head always trains.

    Training steps must be traced after this call, because an already traced function ignores the change.

    Args:
        thaw: rule that selects the trainable layers, such as "none", "last_blocks:2" or "pattern:^block_1"
            (docs/phases.md).
        batch_norm: for the BatchNormalization layers of the backbone. "frozen" freezes all of them. "affine" trains
            gamma and beta of the selected ones, and leaves their moving averages unchanged. "train" also normalizes by
            the statistics over the examples of all replicas, and updates the moving averages.
        backbone_rate: learning-rate multiplier of the backbone.
        layer_decay: factor per block. The learning-rate multiplier of a backbone layer is `backbone_rate *
            layer_decay ** d`, where d is 1 in the last block and grows by 1 per block towards the stem (discriminative
            fine-tuning, Howard & Ruder 2018; d as in BEiT, Bao et al. 2022).

    Raises:
        ModelError: the rule is invalid, selects no layer, or only layers without trainable weights. Its `key` is
            "thaw".
    """
    layers, head = classifier.backbone.layers, classifier.head_variables
    selected_indices = _select_layers(classifier, thaw)
    classifier.backbone.trainable = True
    for index, layer in enumerate(layers):
        is_norm = isinstance(layer, BATCH_NORM_CLASS)
        layer.trainable = index in selected_indices and not (is_norm and batch_norm == "frozen")
        if is_norm:  # batch statistics must exclude padding
            uses_batch_statistics = layer.trainable and batch_norm == "train"
            swap_class(layer, PaddingAwareBatchNormalization if uses_batch_statistics else BATCH_NORM_CLASS)
    trainable_indices = [index for index in sorted(selected_indices) if layers[index].trainable_weights]
    if selected_indices and not trainable_indices:
        frozen_class = BATCH_NORM_CLASS if batch_norm == "frozen" else ()
        *_, last_index = (i for i, layer in enumerate(layers) if layer.weights and not isinstance(layer, frozen_class))
        fix = f"include layer {last_index} ({layers[last_index].name}), or use none to train the head alone"
        raise ModelError("thaws no layer with trainable weights", key="thaw", value=thaw, fix=fix)

    # Sets of `id`s of variables. The last two have the moving averages that training updates.
    trained_ids = {id(variable) for layer in layers for variable in layer.trainable_weights}
    norm_ids = {id(variable) for layer in layers if isinstance(layer, BATCH_NORM_CLASS) for variable in layer.weights}
    moving_ids = {id(v) for layer in layers if tracks_statistics(layer) for v in layer.non_trainable_weights}
    average_ids = moving_ids | {id(v) for norm in classifier.head_normalizations for v in norm.non_trainable_weights}
    groups: dict[str, list[keras.Variable]] = {name: [] for name in GROUPS}
    for name, variable in classifier.variables.items():
        is_head = name in head and id(variable) not in average_ids
        component = "head" if is_head else "batch norm" if name in head or id(variable) in norm_ids else "backbone"
        role = "trains" if name in head or id(variable) in trained_ids else "frozen"
        groups[f"{component}, {'moving averages' if id(variable) in average_ids else role}"].append(variable)
    expected = {id(v) for v in classifier.backbone.weights} | {id(v) for v in head.values()}
    assert {id(v) for v in classifier.variables.values()} == expected, "the plan lacks a variable"
    assert sum(map(len, groups.values())) == len(expected), "a variable is in the plan twice"
    trainable = {n: v for n, v in classifier.variables.items() if (n in head and v.trainable) or id(v) in trained_ids}
    multipliers, summary = _compute_lr_multipliers(classifier, trainable, backbone_rate, layer_decay)
    return FreezingPlan(
        thaw=thaw,
        batch_norm=batch_norm,
        trainable=trainable,
        groups={name: group for name, group in groups.items() if group},
        first_trainable=trainable_indices[0] if trainable_indices else None,
        first_trainable_name=layers[trainable_indices[0]].name if trainable_indices else None,
        num_selected_layers=len(selected_indices),
        num_layers=len(layers),
        batch_norm_training=bool(moving_ids),
        lr_multipliers=multipliers,
        lr_summary=summary,
    )


def _compute_lr_multipliers(
    classifier: Classifier, trainable: dict[str, keras.Variable], backbone_rate: float, layer_decay: float
) -> tuple[tuple[float, ...], str]:
    """Return the learning-rate multiplier of each trainable variable, and a text with each block's multiplier.

    Both are empty if all multipliers are 1.
    """
    layers = classifier.backbone.layers
    starts = {"stem": 0, **classifier.spec.find_block_starts([layer.name for layer in layers])}
    block_names, first_layers = sorted(starts, key=starts.__getitem__), sorted(starts.values())
    multiplier_by_id: dict[int, float] = {}  # id of the variable -> multiplier
    multiplier_by_block: dict[str, float] = {}  # block name -> multiplier, only for blocks with trainable weights
    for index, layer in enumerate(layers):
        block_index = bisect.bisect_right(first_layers, index) - 1  # a block ends where the next one begins
        multiplier = backbone_rate * layer_decay ** (len(block_names) - block_index)
        multiplier_by_id |= {id(variable): multiplier for variable in layer.weights}
        if layer.trainable_weights:
            multiplier_by_block[block_names[block_index]] = multiplier
    if backbone_rate == layer_decay == 1 or not multiplier_by_block:
        return (), ""
    summary = f"learning rate x {backbone_rate:g} in the backbone, x {layer_decay:g} per block down: head 1"
    summary += "".join(f", {name} {multiplier:.3g}" for name, multiplier in reversed(multiplier_by_block.items()))
    return tuple(multiplier_by_id.get(id(variable), 1.0) for variable in trainable.values()), summary


def _select_layers(classifier: Classifier, thaw: str) -> set[int]:
    """Return the indices in backbone.layers that the rule `thaw` selects. Raise a ModelError if it is invalid."""
    names = [layer.name for layer in classifier.backbone.layers]
    starts = classifier.spec.find_block_starts(names)
    rule, _, value = thaw.partition(":")
    count = len(names)
    network = classifier.spec.name

    match rule:
        case "none" | "all":
            return set(range(count)) if rule == "all" else set()
        case "pattern":
            try:
                matching_indices = {index for index, name in enumerate(names) if re.search(value, name)}
            except re.error as error:
                problem = f"is not a valid regular expression: {error}"
                raise ModelError(problem, key="thaw", value=thaw, fix="correct it") from None
            if not matching_indices:
                fix = f"use names like {names[-2]}"
                raise ModelError(f"matches no layer of {network}", key="thaw", value=thaw, fix=fix)
            return matching_indices
        case "from_block":
            if value not in starts:
                suggestions = difflib.get_close_matches(value, starts, 3, cutoff=0.5) or ["one of these"]
                problem = f"is not a block of {network}, which has {', '.join(starts)}"
                raise ModelError(problem, key="thaw", value=thaw, fix=f"use {' or '.join(suggestions)}")
            first_index = starts[value]
        case "last_blocks":
            total = len(starts)
            if not 1 <= int(value) <= total:
                raise ModelError(f"{network} has {total} blocks", key="thaw", value=thaw, fix=f"use 1 to {total}")
            first_index = sorted(starts.values())[-int(value)]
        case "from_layer":
            first_index = int(value)
            if first_index >= count:
                raise ModelError(f"{network} has {count} layers", key="thaw", value=thaw, fix=f"use 0 to {count - 1}")
        case "last_layers":
            first_index = count - int(value)
            if not 0 <= first_index < count:
                raise ModelError(f"{network} has {count} layers", key="thaw", value=thaw, fix=f"use 1 to {count}")
        case "percent":
            first_index = int(count * (1 - float(value) / 100))
            if first_index >= count:
                problem = f"selects none of the {count} layers of {network}"
                raise ModelError(problem, key="thaw", value=thaw, fix="use none")
        case _:
            raise ModelError("is not a freezing rule", key="thaw", value=thaw, fix="use a rule in docs/phases.md")
    return set(range(first_index, count))
