"""Whether a phase trains on cached features of its frozen layers or on images (docs/features.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.config.schema import Phase, RunConfig
from trainer.data.images import megabytes
from trainer.errors import ConfigError, ModelError
from trainer.features.cut import Cut, find_cut, is_moving
from trainer.features.store import bytes_of
from trainer.models.classifier import Classifier
from trainer.models.freezing import apply_thaw

# What a phase reads: features; images; images to train on, and features of those that validate.
Reads = Literal["cached", "live", "validation"]


@dataclass(frozen=True)
class Choice:
    """For one phase."""

    reads: Reads
    why: str

    @property
    def cached(self) -> bool:
        """Whether it trains on features."""
        return self.reads == "cached"

    def line(self, name: str) -> str:
        """For people."""
        return f"features of phase {name}: {'cached' if self.cached else 'live'}, {self.why}"


def stored_dtype(phase: Phase, cut: Cut) -> str:
    """What features are stored in: what was asked for, but what is computed in fewer bits keeps its own."""
    return phase.features_dtype if cut.dtype == "float32" else cut.dtype


@dataclass(frozen=True)
class Division:
    """How a phase divides the classifier."""

    cut: Cut | None
    moves: frozenset[str]  # the variables that it changes


def divisions(config: RunConfig, classifier: Classifier) -> dict[str, Division]:
    """Of each phase; the classifier is left as the last phase has it.

    Raises:
        ModelError: a rule of freezing matches nothing; names the phase.
    """
    found = {}
    for name, phase in config.phases.items():
        try:
            plan = apply_thaw(classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
        except ModelError as error:
            raise ModelError(f"phases.{name}: {error}") from None
        moves = set(plan.trainable)
        if plan.batch_norm_training:
            moving = {id(v) for layer in classifier.backbone.layers if is_moving(layer) for v in layer.weights}
            moves |= {n for n, v in classifier.variables.items() if id(v) in moving}
        found[name] = Division(find_cut(classifier), frozenset(moves))
    return found


def phase_epochs(config: RunConfig, examples: int) -> dict[str, float]:
    """The most epochs of each phase, for so many training examples."""
    batch = config.training.batch_size
    steps = -(-examples // batch)
    most = config.debug.max_steps
    return {n: min(p.duration.steps(steps, batch), most or math.inf) / steps for n, p in config.phases.items()}


def images_again(config: RunConfig, reads: Mapping[str, Reads], first: int = 0) -> bool:
    """Whether the training images are read more than once by the phases from number `first` on: not so where all of
    them train on cached features, which are computed in one pass. Where nothing trains (`reads` is empty) the images
    themselves are what is asked for.
    """
    several = config.augmentation.active or config.distillation is not None
    return several or any(reads.get(name) != "cached" for name in list(config.phases)[first:])


def choose(
    config: RunConfig,
    parts: Mapping[str, Division],
    epochs: Mapping[str, float],
    examples: int,
    scored: int,
    budget: int,
) -> dict[str, Choice]:
    """Cached or live, a phase.

    Args:
        epochs: of each phase.
        examples: of training and validation together.
        scored: of validation.
        budget: bytes that features may take, in memory or on disk.

    Raises:
        ConfigError: a phase says `features=cached`, and that cannot be.
    """
    choices = {}
    for name, phase in config.phases.items():
        if misfit := config.misfit(phase):  # of phases that the advice table chose
            raise ConfigError(f"phases.{name}.{misfit}")
        cut = parts[name].cut
        choice = _choose(config, phase, cut, epochs[name], examples, budget)
        if phase.features == "cached" and not choice.cached:
            raise ConfigError(f"phases.{name}.features=cached: {choice.why}; say features=auto or live")
        if cut and not choice.cached and phase.features == "auto" and epochs[name] > 1:
            needed = bytes_of(cut.shape, stored_dtype(phase, cut), 1, scored)
            if needed <= budget:
                what = f"validation on features of {scored:,} images at {cut}, {megabytes(needed)}"
                choice = Choice("validation", f"{choice.why}; {what}")
        choices[name] = choice
    return choices


def _choose(config: RunConfig, phase: Phase, cut: Cut | None, epochs: float, examples: int, budget: int) -> Choice:
    if phase.features == "live":
        return Choice("live", "as asked")
    if why := config.never_cached(phase):
        return Choice("live", why)
    if cut is None:
        return Choice("live", f"no layers with weights stay frozen below all that thaw={phase.thaw} trains")
    views = phase.augmented_views or 1
    needed = bytes_of(cut.shape, stored_dtype(phase, cut), views, examples)
    what = f"{views} view{'s' * (views > 1)} of {examples:,} images at {cut}, {megabytes(needed)}"
    if needed > budget:
        return Choice("live", f"{what} fit neither runtime.memory_budget_gb nor runtime.disk_budget_gb")
    whole = math.ceil(epochs)
    if phase.features == "auto" and views >= whole:
        return Choice("live", f"{views} view{'s' * (views > 1)} would be computed for {whole} epoch{'s' * (whole > 1)}")
    return Choice("cached", f"{what}, computed once for {whole} epoch{'s' * (whole > 1)}")
