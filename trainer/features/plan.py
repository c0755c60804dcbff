"""The choice between cached features and images for each phase (docs/features.md)."""

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
from trainer.runs.folder import read_run_json, update_run_json
from trainer.types import Dataset

# Input of a phase: features; images; or images for training and features for validation.
Reads = Literal["cached", "live", "validation"]


@dataclass(frozen=True)
class FeatureChoice:
    """Input of one phase, with the reason."""

    reads: Reads
    reason: str

    def describe(self, name: str) -> str:
        """Return the log line of phase `name`."""
        return f"features of phase {name}: {'cached' if self.reads == 'cached' else 'live'}, {self.reason}"


@dataclass(frozen=True)
class Division:
    """The cut of the classifier in a phase, and the names of the variables that the phase updates."""

    cut: Cut | None
    updated: frozenset[str]


@dataclass
class FeaturePlan:
    """Inputs of all phases of a run; a phase without room for its features becomes `live`."""

    divisions: Mapping[str, Division]
    reads: dict[str, Reads]

    def cut(self, phase: str) -> Cut:
        """Return the cut of a phase that reads features."""
        cut = self.divisions[phase].cut
        assert cut is not None, "a phase that reads features has a cut"
        return cut


def stored_dtype(phase: Phase, cut: Cut) -> str:
    """Return the dtype of stored features: the configured one, or that of the cut if it has less than 32 bits."""
    return phase.features_dtype if cut.dtype == "float32" else cut.dtype


def divide(config: RunConfig, classifier: Classifier) -> dict[str, Division]:
    """Return the division of each phase; leaves the classifier as in the last phase.

    Raises:
        ModelError: a thaw rule matches no layer; names the phase.
    """
    divisions = {}
    for name, phase in config.phases.items():
        try:
            plan = apply_thaw(classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
        except ModelError as error:
            key = f"phases.{name}.{error.key}" if error.key else f"phases.{name}"
            raise ModelError(error.problem, key=key, value=error.value, fix=error.fix) from None
        updated = set(plan.trainable)
        if plan.batch_norm_training:
            moving = {id(v) for layer in classifier.backbone.layers if is_moving(layer) for v in layer.weights}
            updated |= {n for n, v in classifier.variables.items() if id(v) in moving}
        divisions[name] = Division(find_cut(classifier), frozenset(updated))
    return divisions


def train_images_read_once(config: RunConfig, reads: Mapping[str, Reads], first: int = 0) -> bool:
    """True if the phases from number `first` on read the training images once, only for cached features."""
    repeated = config.augmentation.active or config.distillation is not None
    return not repeated and all(reads.get(name) == "cached" for name in list(config.phases)[first:])


def plan_features(
    config: RunConfig, divisions: Mapping[str, Division], dataset: Dataset, budget: int
) -> dict[str, FeatureChoice]:
    """Choose cached features or images for each phase; features may take `budget` bytes, in memory or on disk.

    Raises:
        ConfigError: `features=cached` is not possible.
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
            key, fix = f"phases.{name}.features", "use features=auto or live"
            raise ConfigError(choice.reason, key=key, value="cached", fix=fix)
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
    """Return the inputs of each phase from run.json in `folder`, or choose and record them, on the chief for all.

    `begun`: the run has taken a step.
    """
    config = images.config

    def choose() -> tuple[dict[str, Reads], list[str]]:
        before = read_run_json(folder).get("features")
        if before is None and begun:
            before = dict.fromkeys(config.phases, "live")  # of a version without cached features
        if before is not None:
            return {name: before.get(name, "live") for name in config.phases}, []
        choices = plan_features(config, divisions, images.dataset, max(images.memory_left, config.runtime.disk_budget))
        chosen = {name: choice.reads for name, choice in choices.items()}
        update_run_json(folder, {"features": chosen})
        return chosen, [choice.describe(name) for name, choice in choices.items()]

    reads, lines = control.broadcast("features", choose)
    for line in lines:
        log.info(line)
    return reads


def _choose(
    config: RunConfig, phase: Phase, cut: Cut | None, epochs: float, examples: int, budget: int
) -> FeatureChoice:
    if phase.features == "live":
        return FeatureChoice("live", "as configured")
    if why := config.why_not_cacheable(phase):
        return FeatureChoice("live", why)
    if cut is None:
        return FeatureChoice("live", f"no layers with weights stay frozen below all that thaw={phase.thaw} trains")
    views = phase.augmented_views or 1
    needed = bytes_of(cut.shape, stored_dtype(phase, cut), views, examples)
    counted_views = f"{views} view{'s' * (views > 1)}"
    what = f"{counted_views} of {examples:,} images at {cut}, {megabytes(needed)}"
    if needed > budget:
        return FeatureChoice("live", f"{what} fit neither runtime.memory_budget_gb nor runtime.disk_budget_gb")
    whole = math.ceil(epochs)
    length = f"{whole} epoch{'s' * (whole > 1)}"
    if phase.features == "auto" and views >= whole:
        return FeatureChoice("live", f"{counted_views} would be computed for {length}")
    return FeatureChoice("cached", f"{what}, computed once for {length}")
