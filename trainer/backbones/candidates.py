"""The networks of a comparison, and the configuration with which the head of each is trained."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from trainer.config.augmentation import Augmentation
from trainer.config.phases import AutoPhases, EarlyStopping
from trainer.config.schema import Model, RequestedConfig
from trainer.errors import ConfigError
from trainer.models.backbones import BackboneSpec, find_backbone, parse_backbones

MAX_FOLDS = 100
_CHOSEN_BY_AMONG = ("model", "model.backbone", "model.alpha")


@dataclass(frozen=True)
class Candidate:
    """A network to compare, as `among` names it."""

    spec: BackboneSpec
    alpha: float | None  # width multiplier; None: 1
    weights: str | None  # its own weights, as in model.weights; None: those of all networks

    @property
    def name(self) -> str:
        """The name of the network, with its width multiplier if it is not 1."""
        return self.spec.name + (f" {self.alpha:g}" if self.alpha else "")


@dataclass(frozen=True)
class Choices:
    """What a comparison computes: a configuration for each network, which differ in `model` only."""

    config: RequestedConfig  # its only phase trains the head
    phase: str  # name of that phase
    models: dict[str, Model]  # by the name in the table


def parse_candidates(text: str) -> list[Candidate]:
    """Parse [mobilenet_v2:0.35,vgg16@none], the value of `among`.

    Raises:
        ConfigError: it is empty, a network is not known or listed twice, or its alpha or weights cannot be read.
    """
    candidates = list[Candidate]()
    items = [item.strip() for item in text.strip("[] ").split(",") if item.strip()]
    for item in items:
        name, at, weights = item.partition("@")
        ((spec, alpha),) = parse_backbones(name, "among")
        if at and not weights:
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
    """Parse the number of folds; None if it is not given. Raises a ConfigError if it is not a whole number above 0."""
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_FOLDS):
        raise ConfigError(f"is not a whole number from 1 to {MAX_FOLDS}", key="folds", value=text, fix="write folds=5")
    return int(text)


def apply_choices(config: RequestedConfig, candidates: Sequence[Candidate], given: Set[str]) -> Choices:
    """Apply the networks to a configuration, whose first phase with thaw=none trains the head.

    Weights and image size of the composed configuration are those of one network, so they apply only if `given`, the
    keys and groups on the command line, has them. Otherwise each network has its ImageNet weights and its own size.

    Raises:
        ConfigError: no phase trains the head alone, or the arguments choose a network, augmentation or a teacher.
    """
    for key in sorted(given):
        if key in _CHOSEN_BY_AMONG:
            raise ConfigError("is not read here, among=[...] chooses the networks", key=key, fix="remove it")
        if key.split(".")[0] in ("augmentation", "distillation", "output_dir", "warm_start", "resume", "debug.overfit"):
            problem = "is of runs only: heads are trained on features, which are computed once"
            raise ConfigError(problem, key=key, fix="remove it")
    if isinstance(config.phases, AutoPhases):
        raise ConfigError("is chosen for one run", key="phases", value="auto", fix="use phases=head_only")
    name = next((name for name, phase in config.phases.items() if phase.thaw == "none"), None)
    if name is None:
        problem, fix = "has no phase that trains the head alone (thaw=none)", "use phases=head_only"
        raise ConfigError(problem, key="phases", value=", ".join(config.phases), fix=fix)
    unread = (*(f"phases.{other}" for other in config.phases if other != name),
              *(f"phases.{name}.{key}" for key in ("early_stopping", "augmented_views", "features")))  # fmt: skip
    for key in sorted(given):
        if f"{key}.".startswith(tuple(f"{prefix}." for prefix in unread)):
            problem = f"is not read here: {name} is trained for its whole length, on features"
            raise ConfigError(problem, key=key, fix="remove it")
    weights = config.model.weights if "model.weights" in given else "imagenet"
    size = config.model.image_size if "model.image_size" in given else None
    models: dict[str, Model] = {}
    for candidate in candidates:
        values = config.model.model_dump() | {
            "backbone": candidate.spec.name, "alpha": candidate.alpha, "weights": candidate.weights or weights,
            "image_size": size,
        }  # fmt: skip
        model = Model.model_validate(values)
        _check_size(candidate.spec, model)
        label = candidate.name
        if candidate.weights and any(other != candidate and other.name == label for other in candidates):
            file = candidate.weights.rstrip("/").rpartition("/")[2]  # the whole path if two files have this name
            label = f"{label}@{candidate.weights if f'{label}@{file}' in models else file}"
        models[label] = model
    phase = config.phases[name].model_copy(update={"early_stopping": EarlyStopping(), "augmented_views": None,
                                                   "features": "cached"})  # fmt: skip
    update = {"phases": {name: phase}, "augmentation": Augmentation(), "distillation": None, "output_dir": None}
    return Choices(config.model_copy(update=update), name, models)


def _check_size(spec: BackboneSpec, model: Model) -> None:
    """Raise the error of the build before anything is computed."""
    if (model.image_size or spec.default_size) < spec.min_size:
        problem, fix = f"is too small for {spec.name}", f"use at least {spec.min_size}, or compare other networks"
        raise ConfigError(problem, key="model.image_size", value=model.image_size, fix=fix)


def find_size(model: Model) -> int:
    """Return the side of the images of a network, in pixels."""
    return model.image_size or find_backbone(model.backbone).default_size
