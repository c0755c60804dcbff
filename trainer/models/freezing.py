"""Freezing: the part of a classifier that trains in a phase."""

import bisect
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import keras
import tensorflow as tf

from trainer.errors import ModelError
from trainer.models.batch_norm import NORM, ExampleNormalization
from trainer.models.classifier import Classifier
from trainer.private_api import swap_class


@dataclass(frozen=True)
class Group:
    """One row of the table of what trains."""

    name: str
    variables: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class ThawPlan:
    """Trainable and frozen variables; covers every variable of the classifier exactly once."""

    thaw: str
    batch_norm: str  # frozen | train
    trainable: dict[str, keras.Variable]  # what the optimizer gets, in a fixed order
    groups: tuple[Group, ...]
    first_thawed: int | None  # index in backbone.layers of the first that has something to train
    first_name: str | None
    thawed_layers: int
    layer_count: int
    batch_norm_training: bool  # what `Classifier.features` must be called with in training
    lr_multipliers: tuple[float, ...] = ()  # one a variable of `trainable`; empty: 1 for all
    lr_multiplier_lines: tuple[str, ...] = ()  # the same for people

    def lines(self) -> list[str]:
        """The plan for people, one line a group."""
        where = f"all {self.layer_count} layers of the backbone are frozen"
        if self.first_thawed is not None:
            where = (f"{self.thawed_layers} of {self.layer_count} layers thawed, the first that trains is "
                     f"{self.first_thawed} ({self.first_name})")  # fmt: skip
        sums = [sum(getattr(g, part) for g in self.groups) for part in ("variables", "parameters", "bytes")]
        groups = [*self.groups, Group("all", *sums)]
        table = [(g.name, f"{g.variables:,}", f"{g.parameters:,}", f"{g.bytes / 1e6:,.2f} MB") for g in groups]
        table.insert(0, ("", "variables", "parameters", "size"))
        first, *others = [max(len(row[i]) for row in table) for i in range(4)]
        rows = ["  " + "  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in table]
        return [f"thaw {self.thaw}, batch_norm {self.batch_norm}: {where}", *rows, *self.lr_multiplier_lines]


def apply_thaw(
    classifier: Classifier, thaw: str, batch_norm: str, backbone_rate: float = 1.0, layer_decay: float = 1.0
) -> ThawPlan:
    """Set `.trainable` on every layer of the backbone by the rule `thaw`; the head always trains.

    `thaw` is none | all | from_layer:N | last_layers:N | percent:P | from_block:NAME | last_blocks:N | pattern:REGEX;
    layers are counted as `backbone.layers` lists them, `percent:P` is the last P %, a pattern is searched in the names
    of layers. `batch_norm=frozen` keeps every BatchNormalization layer as it is. `train` lets the thawed ones learn,
    with statistics over the examples of all replicas. Compile steps after this call: a traced function keeps what was
    trainable when it was traced.

    The head trains at the learning rate, a layer of the backbone at `backbone_rate * layer_decay ** d` times it, where
    d is 1 in the last block, 2 in the block before, and one more than in the first block in what comes before that
    (Howard & Ruder 2018, discriminative fine-tuning; the count is that of Bao et al. 2022, BEiT).

    Raises:
        ModelError: the rule matches nothing, or nothing that could train.
    """
    layers = classifier.backbone.layers
    chosen = _chosen(classifier, thaw)
    frozen_norm = batch_norm == "frozen"
    classifier.backbone.trainable = True
    for index, layer in enumerate(layers):
        is_norm = isinstance(layer, NORM)
        layer.trainable = index in chosen and not (is_norm and frozen_norm)
        if is_norm:
            # Backbones come with Keras' layer; the class that computes is another one where it trains.
            swap_class(layer, ExampleNormalization if layer.trainable else NORM)
    thawed = [index for index in sorted(chosen) if layers[index].trainable_weights]
    if chosen and not thawed:
        able = [i for i, layer in enumerate(layers) if layer.weights and not (isinstance(layer, NORM) and frozen_norm)]
        raise ModelError(
            f"thaw={thaw} thaws no layer that can train; the last one that can is {able[-1]} "
            f"({layers[able[-1]].name}). Use thaw=none to train the head alone"
        )
    plan = _plan(classifier, thaw, batch_norm, thawed, len(chosen))
    if backbone_rate == layer_decay == 1:
        return plan
    return _with_lr_multipliers(plan, classifier, backbone_rate, layer_decay)


def _plan(classifier: Classifier, thaw: str, batch_norm: str, thawed: list[int], thawed_layers: int) -> ThawPlan:
    layers = classifier.backbone.layers
    trains = {id(variable) for layer in layers for variable in layer.trainable_weights}
    norms = {id(variable) for layer in layers if isinstance(layer, NORM) for variable in layer.weights}
    moving = {id(v) for i in thawed if isinstance(layers[i], NORM) for v in layers[i].non_trainable_weights}
    variables, head = classifier.variables, classifier.head_variables
    order = ("head, trains", "backbone, trains", "batch norm, trains", "batch norm, moving averages",
             "backbone, frozen", "batch norm, frozen")  # fmt: skip
    members: dict[str, list[keras.Variable]] = {name: [] for name in order}
    for name, variable in variables.items():
        kind = "head" if name in head else "batch norm" if id(variable) in norms else "backbone"
        role = "trains" if name in head or id(variable) in trains else "frozen"
        role = "moving averages" if id(variable) in moving else role
        members[f"{kind}, {role}"].append(variable)
    groups = tuple(_group(name, rows) for name, rows in members.items() if rows)
    known = {id(v) for v in classifier.backbone.weights} | {id(v) for v in head.values()}
    assert {id(v) for v in variables.values()} == known, "a variable is missing from the plan"
    assert sum(group.variables for group in groups) == len(known), "a variable is in the plan twice"
    return ThawPlan(
        thaw=thaw,
        batch_norm=batch_norm,
        trainable={n: v for n, v in variables.items() if n in head or id(v) in trains},
        groups=groups,
        first_thawed=thawed[0] if thawed else None,
        first_name=layers[thawed[0]].name if thawed else None,
        thawed_layers=thawed_layers,
        layer_count=len(layers),
        batch_norm_training=bool(moving),
    )


def blocks(classifier: Classifier) -> list[tuple[str, int]]:
    """(name, index of its first layer) of the stem and every block of the backbone, in the order of the layers.

    A block reaches to the next one, the last to the end; the stem is what comes before the first.
    """
    starts = classifier.kind.block_starts([layer.name for layer in classifier.backbone.layers])
    return [("stem", 0), *sorted(starts.items(), key=lambda item: item[1])]


def _with_lr_multipliers(plan: ThawPlan, classifier: Classifier, backbone_rate: float, layer_decay: float) -> ThawPlan:
    """The plan with a factor of the learning rate for each variable."""
    parts = blocks(classifier)
    of_part = [backbone_rate * layer_decay ** (len(parts) - i) for i in range(len(parts))]
    bounds = [first for _, first in parts[1:]]
    of_variable: dict[int, float] = {}
    trains: dict[str, float] = {}
    for index, layer in enumerate(classifier.backbone.layers):
        part = bisect.bisect_right(bounds, index)
        of_variable |= {id(variable): of_part[part] for variable in layer.weights}
        if layer.trainable_weights:
            trains[parts[part][0]] = of_part[part]
    line = f"learning rate x {backbone_rate:g} in the backbone, x {layer_decay:g} a block down: head 1"
    line += "".join(f", {name} {factor:.3g}" for name, factor in reversed(trains.items()))
    of_trainable = tuple(of_variable.get(id(variable), 1.0) for variable in plan.trainable.values())
    return replace(plan, lr_multipliers=of_trainable, lr_multiplier_lines=(line,)) if trains else plan


def _group(name: str, variables: Iterable[keras.Variable]) -> Group:
    sizes = [(math.prod(v.shape), tf.as_dtype(v.dtype).size) for v in variables]
    return Group(name, len(sizes), sum(n for n, _ in sizes), sum(n * width for n, width in sizes))


def _chosen(classifier: Classifier, thaw: str) -> set[int]:
    names = [layer.name for layer in classifier.backbone.layers]
    rule, _, value = thaw.partition(":")
    count, what = len(names), f"thaw={thaw}"
    if rule == "none":
        return set()
    if rule == "all":
        return set(range(count))
    if rule == "from_layer":
        if int(value) >= count:
            raise ModelError(f"{what}: {classifier.kind.name} has {count} layers, 0 to {count - 1}")
        return set(range(int(value), count))
    if rule == "last_layers":
        if not 1 <= int(value) <= count:
            raise ModelError(f"{what}: {classifier.kind.name} has {count} layers; give 1 to {count}, or thaw=none")
        return set(range(count - int(value), count))
    if rule == "percent":
        first = int(count * (1 - float(value) / 100))
        if first >= count:
            raise ModelError(f"{what} thaws none of the {count} layers of {classifier.kind.name}: use thaw=none")
        return set(range(first, count))
    if rule == "from_block":
        starts = classifier.kind.block_starts(names)
        if value not in starts:
            close = difflib.get_close_matches(value, starts, 3, cutoff=0.5)
            near = f" Nearest: {', '.join(close)}." if close else ""
            known = ", ".join(starts)
            raise ModelError(f"{what}: {classifier.kind.name} has no such block.{near} Its blocks: {known}")
        return set(range(starts[value], count))
    if rule == "last_blocks":
        firsts = [first for _, first in blocks(classifier)[1:]]
        if not 1 <= int(value) <= len(firsts):
            raise ModelError(f"{what}: {classifier.kind.name} has {len(firsts)} blocks; give 1 to {len(firsts)}")
        return set(range(firsts[-int(value)], count))
    if rule == "pattern":
        try:
            matching = {index for index, name in enumerate(names) if re.search(value, name)}
        except re.error as error:
            raise ModelError(f"{what} is not a regular expression: {error}") from None
        if not matching:
            raise ModelError(f"{what} matches no layer of {classifier.kind.name}; layers are called like {names[-2]}")
        return matching
    raise ModelError(f"{what} is no rule for freezing")
