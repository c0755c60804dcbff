"""Choose the input of each phase, images or cached features, and the library that computes them (docs/features.md)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.cluster.control import ControlChannel
from trainer.config.schema import Phase, RunConfig
from trainer.data.images import ImageStore
from trainer.data.sharding import count_steps_per_epoch
from trainer.errors import ConfigError, ModelError, format_count
from trainer.features.cut import Cut, find_cut
from trainer.features.store import count_feature_bytes
from trainer.models.classifier import Classifier
from trainer.models.freezing import set_trainable_layers
from trainer.models.gradients import DifferentiatedOperation, find_differentiated_operations
from trainer.monitoring.log import log
from trainer.storage.disk import choose_disk_budget, format_bytes
from trainer.types import Dataset, Device

# What a phase reads: "cached" features, "live" images, or images for training and features for "validation".
InputKind = Literal["cached", "live", "validation"]
# The library that computes the frozen layers below the cut.
TrunkEngine = Literal["tensorflow", "litert"]

# Networks, by the start of their names, whose frozen layers LiteRT computes 1.2 to 2 times as fast as TensorFlow on a
# CPU. Others, such as ResNet50, InceptionV3, Xception and NASNetMobile, take as long, or longer (docs/features.md).
LITERT_BACKBONES = ("DenseNet", "EfficientNet", "MobileNet")
# LiteRT pays off above this number of pixels in a phase, as converting the layers takes about a second: of 4,000 images
# of 160 x 160 pixels. In a phase with fewer, TensorFlow takes at most about 5 seconds longer.
MIN_LITERT_PIXELS = 100_000_000


@dataclass(frozen=True)
class FeatureChoice:
    """The input of one phase, and the reason for it."""

    input_kind: InputKind
    reason: str

    def describe(self, name: str) -> str:
        """Return a log line: whether the phase `name` trains on cached features, and why."""
        return f"features of phase {name}: {'cached' if self.input_kind == 'cached' else 'live'}, {self.reason}"


@dataclass(frozen=True)
class EngineChoice:
    """The library that computes the frozen layers of one phase, and the reason for it."""

    engine: TrunkEngine
    reason: str  # a phrase, such as "as configured"

    def describe(self, name: str) -> str:
        """Return a log line about phase `name`."""
        library = "LiteRT" if self.engine == "litert" else "TensorFlow"
        return f"frozen layers of phase {name}: {library}, {self.reason}"


@dataclass(frozen=True)
class Division:
    """How a phase divides the classifier: where it can be cut into frozen trunk and tail, and what is trained."""

    cut: Cut | None  # None if no frozen layers with weights can be cut off
    updated: frozenset[str]  # names, as in `Classifier.variables`, of the variables that the phase can change
    differentiated: tuple[DifferentiatedOperation, ...]  # operations of the backbone that gradients pass through


@dataclass
class FeaturePlan:
    """The inputs of all phases in a run, by phase name.

    If there is no space for a phase's features when the phase begins, its input is changed to "live".
    """

    divisions: Mapping[str, Division]
    input_kinds: dict[str, InputKind]
    engines: dict[str, TrunkEngine]

    def cut(self, phase: str) -> Cut:
        """Return the cut of a phase that reads features, or whose frozen layers LiteRT computes."""
        cut = self.divisions[phase].cut
        assert cut is not None, "such a phase has a cut"
        return cut

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return the choices as fields of run.json, each a dict by phase name."""
        return {"features": self.input_kinds, "engines": self.engines}


def select_stored_dtype(phase: Phase, cut: Cut) -> str:
    """Return the dtype of stored features: `features_dtype` if the trunk's output is float32, otherwise its dtype."""
    return phase.features_dtype if cut.dtype == "float32" else cut.dtype


def divide_phases(config: RunConfig, classifier: Classifier) -> dict[str, Division]:
    """Freeze and unfreeze layers for each phase in turn, and return each phase's division by phase name.

    The layers remain as the last phase sets them.

    Raises:
        ModelError: a thaw rule cannot be applied. The error's key begins with `phases.NAME`.
    """
    divisions = {}
    for name, phase in config.phases.items():
        try:
            plan = set_trainable_layers(
                classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay
            )
        except ModelError as error:
            key = f"phases.{name}.{error.key}" if error.key else f"phases.{name}"
            raise ModelError(error.problem, key=key, value=error.value, fix=error.fix) from None
        updated = set(plan.trainable)
        norm_ids = {id(variable) for norm in classifier.normalizations.values() for variable in norm.weights}
        updated |= {key for key, variable in classifier.variables.items() if id(variable) in norm_ids}
        divisions[name] = Division(
            find_cut(classifier), frozenset(updated), find_differentiated_operations(classifier.backbone)
        )
    return divisions


def reads_images_only_once(config: RunConfig, input_kinds: Mapping[str, InputKind], first: int = 0) -> bool:
    """Return whether the training images are read only to compute features, so that caching them is useless.

    `first` is the index of the first phase to consider, which has not yet ended.
    """
    is_reread = config.augmentation.active or config.distillation is not None
    return not is_reread and all(input_kinds.get(name) == "cached" for name in list(config.phases)[first:])


def plan_features(
    config: RunConfig, divisions: Mapping[str, Division], dataset: Dataset, budget: int
) -> dict[str, FeatureChoice]:
    """Choose the input of each phase.

    Args:
        divisions: division of each phase, by phase name.
        budget: bytes that a phase's features may use, in memory or on disk.

    Returns:
        The choice for each phase, by phase name.

    Raises:
        ConfigError: a phase with `features=cached` cannot have cached features.
    """
    num_train = dataset.splits["train"].count
    num_validation = dataset.splits["validation"].count if "validation" in dataset.splits else 0
    steps_per_epoch = count_steps_per_epoch(dataset.splits["train"], config.training.batch_size)
    choices = {}
    for name, phase in config.phases.items():
        if error := config.find_feature_error(name):  # automatic phases were not validated before
            raise error
        cut = divisions[name].cut
        epochs = config.count_phase_steps(phase, steps_per_epoch) / steps_per_epoch
        choice = _choose_input(config, phase, cut, epochs, num_train + num_validation, budget)
        if phase.features == "cached" and choice.input_kind != "cached":
            key, fix = f"phases.{name}.features", "use features=auto or live"
            raise ConfigError(choice.reason, key=key, value="cached", fix=fix)
        if cut and choice.input_kind != "cached" and phase.features == "auto" and epochs > 1:
            num_bytes = count_feature_bytes(
                cut.shape, select_stored_dtype(phase, cut), num_views=1, num_examples=num_validation
            )
            if num_bytes <= budget:
                clause = f"validation on features of {num_validation:,} images at {cut}, {format_bytes(num_bytes)}"
                choice = FeatureChoice("validation", f"{choice.reason}; {clause}")
        choices[name] = choice
    return choices


def plan_engines(
    config: RunConfig, device: Device, dataset: Dataset, image_size: int, divisions: Mapping[str, Division],
    compiled: Mapping[str, bool], input_kinds: Mapping[str, InputKind],
) -> dict[str, EngineChoice]:  # fmt: skip
    """Choose for each phase, by name, the library that computes its frozen layers, whatever the number of workers.

    Args:
        image_size: side of the images in pixels.
        divisions: division of each phase, by phase name.
        compiled: by phase name, whether XLA compiles the training step.
        input_kinds: by phase name, what the phase reads.

    Raises:
        ConfigError: `runtime.trunk_engine` is `litert`, and a phase cannot use LiteRT.
    """
    requested = config.runtime.trunk_engine
    counts = {name: split.count for name, split in dataset.splits.items()}
    steps_per_epoch = count_steps_per_epoch(dataset.splits["train"], config.training.batch_size)
    choices = {}
    for name, phase in config.phases.items():
        if input_kinds[name] == "cached":
            images = counts["train"] * (phase.augmented_views or 1) + counts.get("validation", 0)
        else:
            images = config.count_phase_steps(phase, steps_per_epoch) * config.training.batch_size
        obstacle = _find_litert_obstacle(config, device, compiled[name])
        if requested == "litert" and obstacle:
            fix = "use auto or tensorflow"
            raise ConfigError(obstacle, key="runtime.trunk_engine", value="litert", fix=fix)
        if divisions[name].cut is None:
            choices[name] = EngineChoice("tensorflow", "there are none below the layers that train")
        elif requested != "auto":
            choices[name] = EngineChoice(requested, "as configured")
        elif obstacle:
            choices[name] = EngineChoice("tensorflow", obstacle)
        elif not config.model.backbone.startswith(LITERT_BACKBONES):
            choices[name] = EngineChoice("tensorflow", f"as fast for {config.model.backbone}")
        else:
            is_long = images * image_size**2 >= MIN_LITERT_PIXELS
            min_images = -(-MIN_LITERT_PIXELS // image_size**2)
            reason = f"{images:,} images to compute, and converting the layers pays from {min_images:,} on"
            choices[name] = EngineChoice("litert" if is_long else "tensorflow", reason)
    return choices


def _find_litert_obstacle(config: RunConfig, device: Device, xla: bool) -> str:
    """Return why LiteRT cannot compute the frozen layers of a phase, or "". `xla`: whether XLA compiles its step."""
    if device.kind != "CPU":
        return "LiteRT computes on CPUs only"
    if config.runtime.precision != "float32":
        return f"LiteRT computes in float32, not in {config.runtime.precision}"
    return "XLA, which compiles the step, cannot call LiteRT" if xla else ""


def choose_features(
    control: ControlChannel, images: ImageStore, divisions: Mapping[str, Division], device: Device,
    compiled: Mapping[str, bool], run_json: Mapping[str, Any],
) -> FeaturePlan:  # fmt: skip
    """Return the plan of the phases' inputs, the same on all workers. All workers call this together.

    In a new run, whose `run_json` is empty, the chief chooses. A run that resumes has the choices in `run_json`. If
    they are missing there, the run began with a version of this package without cached features, and every phase reads
    images, or with one without LiteRT.

    Args:
        compiled: by phase name, whether XLA compiles the training step.

    Raises:
        ConfigError: a phase cannot have cached features or use LiteRT, as configured.
    """
    config, dataset = images.config, images.dataset

    def choose() -> tuple[dict[str, InputKind], dict[str, TrunkEngine], list[str]]:
        """Return the input kind and engine of each phase, by name, and log lines about them."""
        if run_json:
            features, engines = run_json.get("features", {}), run_json.get("engines", {})
            kinds = {name: features.get(name, "live") for name in config.phases}
            return kinds, {name: engines.get(name, "tensorflow") for name in config.phases}, []
        disk_budget, _ = choose_disk_budget(config.runtime.disk_budget, config.runtime.cache_folder)
        choices = plan_features(config, divisions, dataset, max(images.memory_left, disk_budget))
        kinds = {name: choice.input_kind for name, choice in choices.items()}
        by_phase = plan_engines(config, device, dataset, images.size, divisions, compiled, kinds)
        lines = [choice.describe(name) for name, choice in choices.items()]
        lines += [choice.describe(name) for name, choice in by_phase.items() if choice.engine == "litert"]
        return kinds, {name: choice.engine for name, choice in by_phase.items()}, lines

    input_kinds, engines, lines = control.broadcast("features", choose)
    for line in lines:
        log.info(line)
    return FeaturePlan(divisions, input_kinds, engines)


def _choose_input(
    config: RunConfig, phase: Phase, cut: Cut | None, epochs: float, num_examples: int, budget: int
) -> FeatureChoice:
    """Choose "cached" or "live" for one phase.

    Args:
        epochs: length of the phase in epochs.
        num_examples: number of training and validation examples.
        budget: maximum size of the features in bytes.
    """
    if phase.features == "live":
        return FeatureChoice("live", "as configured")
    if reason := config.find_uncacheable_reason(phase):
        return FeatureChoice("live", reason)
    if cut is None:
        return FeatureChoice("live", f"no frozen layer with weights is below all layers that thaw={phase.thaw} trains")
    views = phase.augmented_views or 1
    num_bytes = count_feature_bytes(cut.shape, select_stored_dtype(phase, cut), views, num_examples)
    views_text = format_count(views, "view")
    description = f"{views_text} of {num_examples:,} images at {cut}, {format_bytes(num_bytes)}"
    if num_bytes > budget:
        return FeatureChoice("live", f"{description} fit neither runtime.memory_budget_gb nor runtime.disk_budget_gb")
    num_epochs = math.ceil(epochs)
    epochs_text = format_count(num_epochs, "epoch")
    if phase.features == "auto" and views >= num_epochs:
        return FeatureChoice("live", f"{views_text} would be computed for {epochs_text}")
    return FeatureChoice("cached", f"{description}, computed once for {epochs_text}")
