"""Parse the arguments of a comparison, and derive the configuration that trains a head on each backbone."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from trainer.config.augmentation import Augmentation
from trainer.config.phases import AutoPhases, EarlyStopping
from trainer.config.schema import Model, RequestedConfig
from trainer.errors import ConfigError
from trainer.models.backbones import BackboneSpec, find_backbone, parse_backbones

MAX_FOLDS = 100  # bounds the number of heads that are trained per backbone
_KEYS_SET_BY_AMONG = ("model", "model.backbone", "model.alpha")
# Prefixes, each ending in a dot, of keys that only runs read.
_KEYS_OF_RUNS = ("augmentation.", "distillation.", "output_dir.", "warm_start.", "resume.", "debug.overfit.")


@dataclass(frozen=True)
class Candidate:
    """A backbone to compare: one item of the argument `among`."""

    spec: BackboneSpec
    alpha: float | None  # width multiplier; None means 1
    weights: str | None  # replaces model.weights for this backbone; None if the item names none

    @property
    def name(self) -> str:
        """The backbone's name, followed by its width multiplier if that is not 1, such as "MobileNetV2 0.35"."""
        return self.spec.name + (f" {self.alpha:g}" if self.alpha else "")


@dataclass(frozen=True)
class ComparisonConfig:
    """The backbones to compare, as `model` sections, and the configuration that they have in common."""

    common: RequestedConfig  # has a single phase, which trains the head
    head_phase: str  # name of that phase
    models: dict[str, Model]  # label in the table -> `model` section that replaces the one in `common`


def parse_candidates(text: str) -> list[Candidate]:
    """Parse the argument `among`, a list of NAME[:ALPHA][@WEIGHTS] such as `[mobilenet_v2:0.35,vgg16@none]`.

    Raises:
        ConfigError: the list is empty, a backbone is unknown or listed twice, an alpha is invalid, or nothing is
            after an @.
    """
    candidates = list[Candidate]()
    items = [item.strip() for item in text.strip("[] ").split(",") if item.strip()]
    for item in items:
        name, separator, weights = item.partition("@")
        ((spec, alpha),) = parse_backbones(name, "among")
        if separator and not weights:
            problem, fix = "names no weights after @", f"write {name}@none, {name}@imagenet or {name}@FILE"
            raise ConfigError(problem, key="among", value=item, fix=fix)
        candidate = Candidate(spec, None if alpha == 1.0 else alpha, weights or None)
        if candidate in candidates:
            raise ConfigError("is listed twice", key="among", value=item, fix="list each network once")
        candidates.append(candidate)
    if not candidates:
        raise ConfigError("names no backbone", key="among", value=text, fix="write among=[mobilenet_v2,xception]")
    return candidates


def parse_folds(text: str | None) -> int | None:
    """Parse the argument `folds`. Return None if it is not set; 1 means that the validation split is scored once.

    Raises:
        ConfigError: the argument is not a whole number from 1 to `MAX_FOLDS`.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_FOLDS):
        raise ConfigError(f"is not a whole number from 1 to {MAX_FOLDS}", key="folds", value=text, fix="write folds=5")
    return int(text)


def configure_comparison(config: RequestedConfig, candidates: Sequence[Candidate], given: Set[str]) -> ComparisonConfig:
    """Derive the configuration of a comparison: the first phase with thaw=none, no augmentation, a model per backbone.

    The composed `config` has the weights and the image size of one backbone. They apply to all backbones only if the
    user set them. By default, each backbone has its ImageNet weights and its default image size.

    Args:
        given: keys and config groups that are set on the command line, such as "model.weights".

    Raises:
        ConfigError: no phase trains only the head, a key of `given` has no effect in a comparison (such as
            model.backbone, augmentation or resume), or the images are too small for a backbone.
    """
    for key in sorted(given):
        if key in _KEYS_SET_BY_AMONG:
            problem = "has no effect in a comparison: among=[...] chooses the networks"
            raise ConfigError(problem, key=key, fix="remove it")
        if f"{key}.".startswith(_KEYS_OF_RUNS):
            problem = "has no effect in a comparison: heads are trained on features, which are computed once"
            raise ConfigError(problem, key=key, fix="remove it")
    if isinstance(config.phases, AutoPhases):
        raise ConfigError("is chosen for one run", key="phases", value="auto", fix="use phases=head_only")
    phase_name = next((name for name, phase in config.phases.items() if phase.thaw == "none"), None)
    if phase_name is None:
        problem, fix = "has no phase that trains the head alone (thaw=none)", "use phases=head_only"
        raise ConfigError(problem, key="phases", value=", ".join(config.phases), fix=fix)
    other_phases = tuple(f"phases.{name}." for name in config.phases if name != phase_name)
    ignored_keys = tuple(f"phases.{phase_name}.{key}." for key in ("early_stopping", "augmented_views", "features"))
    for key in sorted(given):
        if f"{key}.".startswith(other_phases):
            problem = f"has no effect in a comparison: only {phase_name} is trained"
            raise ConfigError(problem, key=key, fix="remove it")
        if f"{key}.".startswith(ignored_keys):
            problem = f"has no effect in a comparison: {phase_name} is trained for its whole length, on features"
            raise ConfigError(problem, key=key, fix="remove it")
    default_weights = config.model.weights if "model.weights" in given else "imagenet"
    image_size = config.model.image_size if "model.image_size" in given else None
    models: dict[str, Model] = {}
    for candidate in candidates:
        model_values = config.model.model_dump() | {
            "backbone": candidate.spec.name, "alpha": candidate.alpha, "weights": candidate.weights or default_weights,
            "image_size": image_size,
        }  # fmt: skip
        model = Model.model_validate(model_values)
        _require_image_size(candidate.spec, model)
        label = candidate.name
        # If a backbone has several weights, append the file's name, or its path if two files have the same name.
        if candidate.weights and any(other != candidate and other.name == label for other in candidates):
            weights_file = candidate.weights.rstrip("/").rpartition("/")[2]
            label = f"{label}@{candidate.weights if f'{label}@{weights_file}' in models else weights_file}"
        models[label] = model
    head_phase = config.phases[phase_name].model_copy(
        update={"early_stopping": EarlyStopping(), "augmented_views": None, "features": "cached"}
    )
    update = {
        "phases": {phase_name: head_phase}, "augmentation": Augmentation(), "distillation": None, "output_dir": None,
    }  # fmt: skip
    return ComparisonConfig(config.model_copy(update=update), phase_name, models)


def _require_image_size(spec: BackboneSpec, model: Model) -> None:
    """Raise a ConfigError if the images are too small for the backbone, before any features are computed."""
    if (model.image_size or spec.default_size) < spec.min_size:
        problem, fix = f"is too small for {spec.name}", f"use at least {spec.min_size}, or compare other networks"
        raise ConfigError(problem, key="model.image_size", value=model.image_size, fix=fix)


def find_image_size(model: Model) -> int:
    """Return the height and width of a backbone's images, in pixels: model.image_size, or the backbone's default."""
    return model.image_size or find_backbone(model.backbone).default_size
