"""The choice between cached features of frozen layers and images for each phase (docs/features.md)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.cluster.control import ControlChannel
from trainer.config.schema import Phase, RunConfig
from trainer.data.images import ImageStore, megabytes
from trainer.errors import ConfigError, ModelError
from trainer.features.cut import Cut, find_cut, is_moving
from trainer.features.store import bytes_of
from trainer.models.classifier import Classifier
from trainer.models.freezing import apply_thaw
from trainer.monitoring.log import log
from trainer.runs.folder import note_facts, read_facts
from trainer.types import Dataset

# Input of a phase: features; images; images to train on, and features of those that validate.
Reads = Literal["cached", "live", "validation"]


@dataclass(frozen=True)
class FeatureChoice:
    """Input of one phase, and why."""

    reads: Reads
    reason: str

    def describe(self, name: str) -> str:
        """One line for the log on phase `name`."""
        return f"features of phase {name}: {'cached' if self.reads == 'cached' else 'live'}, {self.reason}"


@dataclass(frozen=True)
class Division:
    """Division of the classifier by a phase: where it can be cut, and the names of the variables that it updates."""

    cut: Cut | None
    updated: frozenset[str]


@dataclass
class FeaturePlan:
    """Inputs of all phases of a run; a phase without room for its features becomes `live`."""

    divisions: Mapping[str, Division]
    reads: dict[str, Reads]

    def cut(self, phase: str) -> Cut:
        """The cut of a phase that reads features."""
        cut = self.divisions[phase].cut
        assert cut is not None, "a phase reads features where there is a cut"
        return cut


def stored_dtype(phase: Phase, cut: Cut) -> str:
    """Dtype of stored features: the one asked for, but features computed in fewer bits keep their own."""
    return phase.features_dtype if cut.dtype == "float32" else cut.dtype


def divide(config: RunConfig, classifier: Classifier) -> dict[str, Division]:
    """The division of each phase; the classifier is left as the last phase has it.

    Raises:
        ModelError: a rule of freezing matches nothing; names the phase.
    """
    divisions = {}
    for name, phase in config.phases.items():
        try:
            plan = apply_thaw(classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
        except ModelError as error:
            raise ModelError(f"phases.{name}: {error}") from None
        updated = set(plan.trainable)
        if plan.batch_norm_training:
            moving = {id(v) for layer in classifier.backbone.layers if is_moving(layer) for v in layer.weights}
            updated |= {n for n, v in classifier.variables.items() if id(v) in moving}
        divisions[name] = Division(find_cut(classifier), frozenset(updated))
    return divisions


def train_images_read_once(config: RunConfig, reads: Mapping[str, Reads], first: int = 0) -> bool:
    """True if the phases from number `first` on read the training images once, for cached features alone.

    Where nothing trains (`reads` is empty) the images themselves are asked for.
    """
    several = config.augmentation.active or config.distillation is not None
    return not several and all(reads.get(name) == "cached" for name in list(config.phases)[first:])


def plan_features(
    config: RunConfig, divisions: Mapping[str, Division], dataset: Dataset, budget: int
) -> dict[str, FeatureChoice]:
    """Choose cached features or images for each phase; features may take `budget` bytes, in memory or on disk.

    Raises:
        ConfigError: a phase says `features=cached`, and that cannot be.
    """
    count = dataset.splits["train"].count
    scored = dataset.splits["validation"].count if "validation" in dataset.splits else 0
    steps = -(-count // config.training.batch_size)
    choices = {}
    for name, phase in config.phases.items():
        if fault := config.feature_fault(name):  # of phases that the advice table chose
            raise fault
        cut, epochs = divisions[name].cut, config.phase_steps(phase, steps) / steps
        choice = _choose(config, phase, cut, epochs, count + scored, budget)
        if phase.features == "cached" and choice.reads != "cached":
            raise ConfigError(f"phases.{name}.features=cached: {choice.reason}; say features=auto or live")
        if cut and choice.reads != "cached" and phase.features == "auto" and epochs > 1:
            needed = bytes_of(cut.shape, stored_dtype(phase, cut), 1, scored)
            what = f"validation on features of {scored:,} images at {cut}, {megabytes(needed)}"
            if needed <= budget:
                choice = FeatureChoice("validation", f"{choice.reason}; {what}")
        choices[name] = choice
    return choices


def choose_features(
    control: ControlChannel, images: ImageStore, divisions: Mapping[str, Division], folder: Path, begun: bool
) -> dict[str, Reads]:
    """Inputs of each phase: as run.json in the run's folder records, or chosen and recorded now, by the chief for all.

    `begun` says that the run has taken a step.
    """
    config = images.config

    def choose() -> tuple[dict[str, Reads], list[str]]:
        before = read_facts(folder).get("features")
        if before is None and begun:
            before = dict.fromkeys(config.phases, "live")  # by a version that had no others
        if before is not None:
            return {name: before.get(name, "live") for name in config.phases}, []
        choices = plan_features(config, divisions, images.dataset, max(images.memory_left, config.runtime.disk_budget))
        chosen = {name: choice.reads for name, choice in choices.items()}
        note_facts(folder, {"features": chosen})
        return chosen, [choice.describe(name) for name, choice in choices.items()]

    reads, lines = control.broadcast("features", choose)
    for line in lines:
        log.info(line)
    return reads


def _choose(
    config: RunConfig, phase: Phase, cut: Cut | None, epochs: float, examples: int, budget: int
) -> FeatureChoice:
    if phase.features == "live":
        return FeatureChoice("live", "as asked")
    if why := config.why_not_cacheable(phase):
        return FeatureChoice("live", why)
    if cut is None:
        return FeatureChoice("live", f"no layers with weights stay frozen below all that thaw={phase.thaw} trains")
    views = phase.augmented_views or 1
    needed = bytes_of(cut.shape, stored_dtype(phase, cut), views, examples)
    several = f"{views} view{'s' * (views > 1)}"
    what = f"{several} of {examples:,} images at {cut}, {megabytes(needed)}"
    if needed > budget:
        return FeatureChoice("live", f"{what} fit neither runtime.memory_budget_gb nor runtime.disk_budget_gb")
    whole = math.ceil(epochs)
    length = f"{whole} epoch{'s' * (whole > 1)}"
    if phase.features == "auto" and views >= whole:
        return FeatureChoice("live", f"{several} would be computed for {length}")
    return FeatureChoice("cached", f"{what}, computed once for {length}")
