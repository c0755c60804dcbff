"""Compare configurations: which keys can change when a run is resumed, and which can differ between its workers."""

from typing import Any

from trainer.config.distillation import TRAIN_TEACHER
from trainer.config.model import NAMED_WEIGHTS
from trainer.config.phases import LENGTH_KEYS
from trainer.config.schema import RequestedConfig, RunConfig, Runtime

# Keys of `runtime` that affect the trained weights of a run.
KEYS_AFFECTING_WEIGHTS = ("precision", "xla", "trunk_engine", "deterministic", "replicas")
# Keys and sections that can change on resume, because they do not affect how the weights are trained.
KEYS_CHANGEABLE_ON_RESUME = (
    "output_dir",
    "resume",
    "export",
    "experiment_name",
    "data.fingerprint",
    "debug.profile_steps",
    *(f"runtime.{key}" for key in Runtime.model_fields if key not in KEYS_AFFECTING_WEIGHTS),
)
# Keys whose value is the address (local path or bucket URL) of data. The address can change on resume if the content at
# the new address has the fingerprint that the run recorded.
ADDRESS_KEYS = ("data.root", "data.pattern", "data.data_dir", "data.corrections", "distillation.teacher")
# Keys whose value is the address of initial weights, which only the first start (process) of a run reads.
INITIAL_WEIGHTS_KEYS = ("model.weights", "warm_start")
# Keys that can differ between the workers of a run.
KEYS_PER_WORKER = {f"runtime.{key}" for key in ("cache_dir", "memory_budget_gb", "disk_budget_gb", "data_threads",
              "progress", "http_port", "log_format", "termination_log")}  # fmt: skip


def may_change_on_resume(key: str) -> bool:
    """Return whether a key, or a section that contains it, is in `KEYS_CHANGEABLE_ON_RESUME`."""
    return f"{key}.".startswith(tuple(f"{name}." for name in KEYS_CHANGEABLE_ON_RESUME))


def select_common_settings(config: RequestedConfig) -> dict[str, Any]:
    """Return the values that must be equal on all workers of a run, by dotted key: {"training.batch_size": 32, ...}."""
    return {key: value for key, value in flatten(config.model_dump(mode="json")).items() if key not in KEYS_PER_WORKER}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to dotted keys, which begin with `prefix`: {"a": {"b": 1}} -> {"a.b": 1}.

    An empty dict counts as a value.
    """
    if isinstance(tree, dict) and tree:
        return {
            key: value for name, branch in tree.items() for key, value in flatten(branch, f"{prefix}{name}.").items()
        }
    return {prefix.rstrip("."): tree}


def list_forbidden_changes(before: RunConfig, now: RunConfig) -> list[str]:
    """List the changes between a run's two configurations that are forbidden on resume, as "KEY: BEFORE -> NOW".

    A longer last phase or a higher debug.max_steps is allowed, to extend a finished run, and so are changes of keys in
    `KEYS_CHANGEABLE_ON_RESUME`. A key in `ADDRESS_KEYS` or `INITIAL_WEIGHTS_KEYS` can change from one address to
    another; callers must compare the content's fingerprint or checksum.
    """
    old, new = flatten(before.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    length_keys = {f"phases.{list(now.phases)[-1]}.{unit}" for unit in LENGTH_KEYS} | {"debug.max_steps"}
    changes = []
    for key in sorted(old.keys() | new.keys()):
        old_value, new_value = old.get(key), new.get(key)
        is_longer = key in length_keys and old_value is not None and (new_value is None or new_value >= old_value)
        is_moved = _is_address(key, old_value) and _is_address(key, new_value)
        if old_value != new_value and not may_change_on_resume(key) and not is_longer and not is_moved:
            changes.append(f"{key}: {old_value} -> {new_value}")
    return changes


def _is_address(key: str, value: Any) -> bool:
    """Return whether the value is an address, and not null or a name such as "imagenet"."""
    return key in (*ADDRESS_KEYS, *INITIAL_WEIGHTS_KEYS) and value not in (None, TRAIN_TEACHER, *NAMED_WEIGHTS)


def list_moved_addresses(before: RunConfig, now: RunConfig, keys: tuple[str, ...] = ADDRESS_KEYS) -> list[str]:
    """List the addresses at `keys` that differ between two configurations, as "KEY: BEFORE -> NOW"."""
    old, new = flatten(before.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    return [f"{key}: {old[key]} -> {new[key]}" for key in keys if key in old and old[key] != new.get(key)]
