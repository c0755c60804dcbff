"""Composing the configuration from the arguments of a command, with Hydra."""

import datetime
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.base import nearest
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError


def conf_folder() -> Path:
    """`conf/`: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def _groups() -> list[str]:
    return [p.name for p in conf_folder().iterdir() if p.is_dir()]


def _add_freely(argument: str) -> str:
    """`a.b=1` -> `++a.b=1`, so that a mistyped key reaches the validator, which knows the nearest name.

    Group choices (`data=digits`), Hydra's own keys and explicit `+`, `~`, `++` stay as they are.
    """
    match = re.match(r"([A-Za-z_][\w.]*)=", argument)
    keep = not match or match[1].startswith("hydra") or match[1] in _groups()
    return argument if keep else "++" + argument


def asks_for_sweep(arguments: list[str]) -> bool:
    """Whether many runs are asked for: by `-m`, or by a file of the group `sweep`."""
    return any(a in ("-m", "--multirun") or re.match(r"hydra/sweeper=|\+*sweep=(?!null$)", a) for a in arguments)


# Runs a job of a sweep, given its configuration, its overrides and Hydra's settings for it; returns its score.
RunJob = Callable[[DictConfig, list[str], Any], float | None]


def compose(arguments: list[str], run_job: RunJob | None = None) -> dict[str, Any] | None:
    """Compose the configuration that the arguments ask for. With neither `experiment` nor `data` it is the quickstart.

    Returns:
        The resolved tree, or None where Hydra itself answered (`--help`, `--cfg`) or `run_job` ran the jobs of a sweep.

    Raises:
        ConfigError: an unknown group or file, a value that does not parse, an unresolved `???`.
    """
    composed: list[DictConfig] = []

    def job(tree: DictConfig) -> float | None:
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN and run_job is not None:
            return run_job(tree, list(settings.overrides.task), settings)
        composed.append(tree)
        return None

    # Without this Hydra prints its own traceback and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("KUBETUNE_SWEEP", f"outputs/sweep-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    chosen = {a.split("=")[0] for a in arguments}
    arguments = [_add_freely(a) for a in arguments]
    if "sweep" not in chosen:  # the plugin's own defaults minimize, two at once, without a seed
        arguments = ["sweep=optuna" if a == "hydra/sweeper=optuna" else a for a in arguments]
    if not chosen & {"experiment", "data"}:  # beside the other values: Hydra wants them in one piece
        values = [i for i, a in enumerate(arguments, start=1) if "=" in a or a.startswith("~")]
        arguments.insert(max(values, default=len(arguments)), "experiment=quickstart")
    before, sys.argv = sys.argv, ["python -m trainer", *arguments]
    try:
        hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_sentence(error)) from None
    finally:
        sys.argv = before
    return resolved(composed[0]) if composed else None


def compose_alone(arguments: list[str], keys: str) -> dict[str, Any]:
    """The configuration that only the arguments ask for whose keys match the regular expression `keys`.

    Raises:
        ConfigError: as `compose`.
    """
    own = [_add_freely(a) for a in arguments if re.match(rf"\+*({keys})=", a)]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return resolved(hydra.compose("config", own))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_sentence(error)) from None


def resolved(tree: DictConfig) -> dict[str, Any]:
    """The values of a composed configuration, its interpolations resolved.

    Raises:
        ConfigError: a `???`, or an interpolation that leads nowhere.
    """
    if missing := OmegaConf.missing_keys(tree):
        raise ConfigError(f"must be given on the command line: {', '.join(f'{k}=...' for k in sorted(missing))}")
    try:
        return OmegaConf.to_container(tree, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_one_sentence(error)) from None


def _one_sentence(error: Exception) -> str:
    text = str(error) or str(error.__cause__)  # Hydra often keeps the reason in the cause
    if "Could not find 'hydra/sweeper/optuna'" in text:
        return "a search by Optuna needs the extra `sweep`, which is not installed: pip install 'kubetune[sweep]'"
    if choice := re.search(r"Could not find '(\w+)/([\w.-]+)'", text):
        group, name = choice.groups()
        known = sorted(p.stem for p in (conf_folder() / group).glob("*.yaml"))
        return f"{group}={name}: there is no such {group}.{nearest(name, known)} Known: {', '.join(known)}"
    if unknown := re.search(r"Could not override '(\w+)'", text):
        return f"{unknown[1]}: there is no such key.{nearest(unknown[1], [*_groups(), *RunConfig.model_fields])}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line)
