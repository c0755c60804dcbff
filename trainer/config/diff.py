"""Differences of two configurations that a resumed run may have, and values that may differ between workers."""

from typing import Any

from trainer.config.phases import UNITS
from trainer.config.schema import RequestedConfig, RunConfig, Runtime

# What a resumed run may change: nothing here reaches the weights.
FREE = (
    "output_dir",
    "resume",
    "export",
    "experiment_name",
    "debug.profile_steps",
    *(f"runtime.{key}" for key in Runtime.model_fields if key not in ("precision", "xla", "deterministic", "replicas")),
)
# What may differ between the workers of a run.
_OWN = ("cache_dir", "memory_budget_gb", "disk_budget_gb", "data_threads", "progress", "http_port", "log_format")
OWN = tuple(f"runtime.{key}" for key in (*_OWN, "termination_log"))


def is_free(key: str) -> bool:
    """Return whether a key, or the section that holds it, is in `FREE`."""
    return f"{key}.".startswith(tuple(f"{name}." for name in FREE))


def in_common(config: RequestedConfig) -> dict[str, Any]:
    """Every value that must be equal on all workers of a run, {"training.batch_size": 32, ...}."""
    return {key: value for key, value in flat(config.model_dump(mode="json")).items() if key not in OWN}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if isinstance(tree, dict) and tree:
        return {k: v for name, branch in tree.items() for k, v in flat(branch, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """The differences that make it another run, one "key: before -> now" a line.

    The last phase may be made longer (a finished run can be extended); everything in `FREE` may change.
    """
    old, new = flat(before.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    lengths = {f"phases.{list(now.phases)[-1]}.{unit}" for unit in UNITS} | {"debug.max_steps"}
    changed = []
    for key in sorted(old.keys() | new.keys()):
        was, is_now = old.get(key), new.get(key)
        longer = key in lengths and was is not None and (is_now is None or is_now >= was)
        if was != is_now and not is_free(key) and not longer:
            changed.append(f"{key}: {was} -> {is_now}")
    return changed
