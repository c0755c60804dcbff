"""Find configuration keys that a run does not read: because of another key, such as data.source, or in any case."""

from collections.abc import Iterable, Iterator
from typing import Any

from trainer.config.base import Section
from trainer.config.diff import flatten
from trainer.config.phases import AutoPhases, Phase
from trainer.config.schema import OVERFIT_VALUES, Data, RequestedConfig, derive_teacher_config
from trainer.errors import ConfigError

# Key of `data` -> values of data.source with which the key is read. For other keys, the source makes no difference.
_SOURCES: dict[str, tuple[str, ...]] = {
    "root": ("image_folder", "csv", "tfds"),
    "name": ("tfds",),
    "data_dir": ("tfds",),
    "download": ("tfds",),
    "pattern": ("tfrecords",),
    "image_field": ("tfds", "tfrecords"),
    "label_field": ("tfds", "tfrecords"),
    "train_split": ("tfds",),
    "validation_split": ("tfds",),
    "test_split": ("tfds",),
    "validation_fraction": ("image_folder", "csv", "tfds", "tfrecords"),
    "test_fraction": ("image_folder", "csv", "tfds", "tfrecords"),
    "split_seed": ("image_folder", "csv", "tfds"),
    "shuffle_window": ("digits", "tfds", "tfrecords"),
    "label_kind": ("tfds", "tfrecords"),
    "shard_by": ("tfds", "tfrecords"),
}
# Keys of `augmentation` whose transformations expose pixels outside the image, which `fill` determines.
_GEOMETRIC_KEYS = ("rotation", "shift", "shear", "zoom", "stretch", "randaugment")
Reasons = Iterator[tuple[str, str]]  # pairs: key in a section, reason why it is not read


def find_unread_keys(config: RequestedConfig) -> dict[str, str]:
    """Find the keys that differ from their default but are not read.

    Returns:
        A dict from dotted key to reason, a verb phrase such as "is not read without momentum". If there are several
        reasons, it has the last one. The keys of the teacher's model and phases begin with "distillation.".
    """
    sections: list[tuple[str, Section, Reasons]] = [
        ("data", config.data, _check_data(config.data)),
        ("augmentation", config.augmentation, _check_augmentation(config)),
        ("model", config.model, _check_model(config)),
        ("training", config.training, _check_overfit(config, *OVERFIT_VALUES["training"])),
        ("debug", config.debug, _check_overfit(config, "max_examples")),
        ("export", config.export, _check_export(config)),
        ("", config, _check_run(config)),
    ]
    for name, phase in _list_phases(config).items():
        sections += [(f"phases.{name}", phase, _check_phase(phase, config)),
                  (f"phases.{name}.optimizer", phase.optimizer, _check_optimizer(phase)),
                  (f"phases.{name}.schedule", phase.schedule, _check_schedule(phase))]  # fmt: skip
    reasons_by_key = {
        f"{prefix}.{key}".lstrip("."): reason
        for prefix, section, reasons in sections
        for key, reason in reasons
        if getattr(section, key) != type(section).model_fields[key].default
    }
    if config.distillation:
        values = flatten(config.distillation.model_dump(mode="json", exclude_defaults=True), "distillation.")
        reasons_by_key |= dict(_check_overfit(config, *values))
    if teacher := derive_teacher_config(config):
        teacher_reasons = find_unread_keys(teacher).items()
        # The other keys of the teacher's run are not set below `distillation`.
        reasons_by_key |= {
            f"distillation.{key}": reason for key, reason in teacher_reasons if key.startswith(("model.", "phases."))
        }
    return reasons_by_key


def _list_phases(config: RequestedConfig) -> dict[str, Phase]:
    """Return the phases by their key below `phases`, such as "head".

    With phases=auto, these are the phases of all rows of `PhaseTable`: "auto.few_similar.head".
    """
    if not isinstance(config.phases, AutoPhases):
        return config.phases
    phases_by_row = {row: row_phases for row, row_phases in config.phases.auto if isinstance(row_phases, dict)}
    return {
        f"auto.{row}.{name}": phase for row, row_phases in phases_by_row.items() for name, phase in row_phases.items()
    }


def _check_run(config: RequestedConfig) -> Reasons:
    if not config.output_dir:
        yield "resume", "is not read without output_dir, as each run then has a new folder"


def _check_model(config: RequestedConfig) -> Reasons:
    yield from _check_overfit(config, *OVERFIT_VALUES["model"])
    if not config.model.hidden_units:
        yield "hidden_batch_norm", "is not read without model.hidden, whose layers it normalizes"


def _check_export(config: RequestedConfig) -> Reasons:
    if not config.export.formats:
        yield "max_accuracy_drop", "is not read with export.formats=[]"


def _check_overfit(config: RequestedConfig, *keys: str) -> Reasons:
    """Yield `keys`, which are read only without debug.overfit, if debug.overfit is set."""
    if config.debug.overfit:
        yield from ((key, "is not read with debug.overfit") for key in keys)


def _check_data(data: Data) -> Reasons:
    """Yield the keys of `data` that are not read with this data source."""
    yield "shards", "is read only by python -m trainer.prepare"
    for key, sources in _SOURCES.items():
        if data.source not in sources:
            yield key, f"is not read with data.source={data.source}, only with {' or '.join(sources)}"
    if data.source == "tfds":
        for key in ("name", "data_dir", "download") if data.root else ():
            yield key, "is not read when data.root is set"
        for split in ("validation", "test"):
            if getattr(data, f"{split}_split") not in (None, "", "none"):
                yield f"{split}_fraction", f"is not read when data.{split}_split is set"


def _check_augmentation(config: RequestedConfig) -> Reasons:
    """Yield the keys of `augmentation` that are not read without another augmentation."""
    yield from _check_overfit(config, *type(config.augmentation).model_fields)
    if not config.augmentation.randaugment:
        yield "magnitude", "is not read without augmentation.randaugment"
    if not any(getattr(config.augmentation, key) for key in _GEOMETRIC_KEYS):
        yield "fill", f"is not read without one of {', '.join(_GEOMETRIC_KEYS)}"


def _check_phase(phase: Phase, config: RequestedConfig) -> Reasons:
    """Yield the keys of a phase that are not read with its other keys."""
    if not config.augmentation.active:
        yield "augmented_views", "is not read without augmentation"
    if phase.thaw == "all":
        yield "features_dtype", "is not read with thaw=all, where no layers are frozen"
    if phase.thaw == "none":
        for key in ("backbone_rate", "layer_decay", "batch_norm"):
            yield key, "is not read with thaw=none, where no layer of the backbone trains"
    if phase.features == "live":
        yield "features_dtype", "is not read with features=live, which stores none"


def _check_optimizer(phase: Phase) -> Reasons:
    if not phase.optimizer.momentum:
        yield "nesterov", "is not read without momentum"


def _check_schedule(phase: Phase) -> Reasons:
    keys_by_name = {"cosine": {"final"}, "exponential": {"decay", "every"}, "time": {"decay"}, "step": {"decay", "at"}}
    for key in {"final", "decay", "every", "at"} - keys_by_name.get(phase.schedule.name, set()):
        yield key, f"is not read with schedule.name={phase.schedule.name}"


def require_read(config: RequestedConfig, keys: Iterable[str]) -> None:
    """Raise a ConfigError if any of the command-line `keys` differs from its default but is not read.

    The error's `errors` contain one ConfigError for each such key.
    """
    reasons_by_key = find_unread_keys(config)
    if errors := [ConfigError(reasons_by_key[key], key=key, value=_get_value(config, key), fix="remove it")
                  for key in sorted(set(keys) & reasons_by_key.keys())]:  # fmt: skip
        raise ConfigError.combine(errors)


def _get_value(config: RequestedConfig, key: str) -> Any:
    """Return the value of a dotted key; a bool as users write it, "true" or "false"."""
    value: Any = config
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return str(value).lower() if isinstance(value, bool) else value
