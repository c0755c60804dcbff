"""Which keys of a configuration are not read, because of the source, optimizer, loss or phase that it chooses."""

from collections.abc import Iterable, Iterator
from typing import Any

from trainer.config.base import Section
from trainer.config.phases import AutoPhases, Phase
from trainer.config.schema import Data, RequestedConfig
from trainer.errors import ConfigError

# Keys of `data` -> the sources that read them; the others are read for every source.
_SOURCES: dict[str, tuple[str, ...]] = {
    "root": ("image_folder", "tfds"),
    "name": ("tfds",),
    "data_dir": ("tfds",),
    "download": ("tfds",),
    "pattern": ("tfrecords",),
    "image_field": ("tfds", "tfrecords"),
    "label_field": ("tfds", "tfrecords"),
    "train_split": ("tfds",),
    "validation_split": ("tfds",),
    "test_split": ("tfds",),
    "validation_fraction": ("image_folder", "tfds", "tfrecords"),
    "test_fraction": ("image_folder", "tfds", "tfrecords"),
    "split_seed": ("image_folder", "tfds"),
    "shuffle_window": ("digits", "tfds", "tfrecords"),
    "label_kind": ("tfds", "tfrecords"),
    "shard_by": ("tfds", "tfrecords"),
}
_GEOMETRY = ("rotation", "shift", "shear", "zoom", "stretch", "randaugment")  # what leaves pixels to fill
Reasons = Iterator[tuple[str, str]]


def unread_keys(config: RequestedConfig) -> dict[str, str]:
    """Return the keys that differ from their default but are not read, each with the reason."""
    sections: list[tuple[str, Section, Reasons]] = [
        ("data", config.data, _of_data(config.data)),
        ("augmentation", config.augmentation, _of_augmentation(config)),
        ("model", config.model, _of_overfit(config, "dropout", "l2")),
        ("training", config.training, _of_overfit(config, "label_smoothing", "ema", "keep")),
        ("debug", config.debug, _of_overfit(config, "max_examples")),
        ("export", config.export, _of_export(config)),
        ("", config, _of_run(config)),
    ]
    for name, phase in _phases(config).items():
        sections += [(f"phases.{name}", phase, _of_phase(phase, config)),
                  (f"phases.{name}.optimizer", phase.optimizer, _of_optimizer(phase)),
                  (f"phases.{name}.schedule", phase.schedule, _of_schedule(phase))]  # fmt: skip
    return {
        f"{prefix}.{key}".lstrip("."): reason
        for prefix, section, reasons in sections
        for key, reason in reasons
        if getattr(section, key) != type(section).model_fields[key].default
    }


def _phases(config: RequestedConfig) -> dict[str, Phase]:
    """Return the phases by their key below `phases`; with phases=auto those of each row of the table."""
    if not isinstance(config.phases, AutoPhases):
        return config.phases
    rows = {row: named for row, named in config.phases.auto if isinstance(named, dict)}
    return {f"auto.{row}.{name}": phase for row, named in rows.items() for name, phase in named.items()}


def _of_run(config: RequestedConfig) -> Reasons:
    if not config.output_dir:
        yield "resume", "is not read without output_dir, as each run then has a new folder"


def _of_export(config: RequestedConfig) -> Reasons:
    if not config.export.formats:
        yield "max_accuracy_drop", "is not read with export.formats=[]"


def _of_overfit(config: RequestedConfig, *keys: str) -> Reasons:
    """Yield what `apply_overfit` switches off."""
    if config.debug.overfit:
        yield from ((key, "is not read with debug.overfit") for key in keys)


def _of_data(data: Data) -> Reasons:
    yield "shards", "is read only by python -m trainer.prepare"
    for key, sources in _SOURCES.items():
        if data.source not in sources:
            yield key, f"is not read with data.source={data.source}, only with {' or '.join(sources)}"
    if data.source == "tfds":
        for key in ("name", "data_dir", "download") if data.root else ():
            yield key, "is not read when data.root is set"
        for split in ("validation", "test"):
            if getattr(data, f"{split}_split"):
                yield f"{split}_fraction", f"is not read when data.{split}_split is set"


def _of_augmentation(config: RequestedConfig) -> Reasons:
    yield from _of_overfit(config, *type(config.augmentation).model_fields)
    if not config.augmentation.randaugment:
        yield "magnitude", "is not read without augmentation.randaugment"
    if not any(getattr(config.augmentation, key) for key in _GEOMETRY):
        yield "fill", f"is not read without one of {', '.join(_GEOMETRY)}"


def _of_phase(phase: Phase, config: RequestedConfig) -> Reasons:
    if not config.augmentation.active:
        yield "augmented_views", "is not read without augmentation"
    if phase.thaw == "all":
        yield "features_dtype", "is not read with thaw=all, where no layers are frozen"
    if phase.thaw == "none":
        for key in ("backbone_rate", "layer_decay", "batch_norm"):
            yield key, "is not read with thaw=none, where no layer of the backbone trains"
    if phase.features == "live":
        yield "features_dtype", "is not read with features=live, which stores none"


def _of_optimizer(phase: Phase) -> Reasons:
    if not phase.optimizer.momentum:
        yield "nesterov", "is not read without momentum"


def _of_schedule(phase: Phase) -> Reasons:
    read = {"cosine": {"final"}, "exponential": {"decay", "every"}, "time": {"decay"}, "step": {"decay", "at"}}
    for key in {"final", "decay", "every", "at"} - read.get(phase.schedule.name, set()):
        yield key, f"is not read with schedule.name={phase.schedule.name}"


def require_read(config: RequestedConfig, keys: Iterable[str]) -> None:
    """Raise a ConfigError if one of these keys, those of a command line, has a value that is not read."""
    unread = unread_keys(config)
    if faults := [ConfigError(unread[key], key=key, value=_value(config, key), fix="remove it")
                  for key in sorted(set(keys) & unread.keys())]:  # fmt: skip
        raise ConfigError.of_faults(faults)


def _value(config: RequestedConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return str(value).lower() if isinstance(value, bool) else value
