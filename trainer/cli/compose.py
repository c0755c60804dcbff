"""Composing the configuration from the arguments of a command, with Hydra."""

import datetime
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.base import closest
from trainer.config.schema import RequestedConfig
from trainer.errors import ConfigError

GROUPS = {
    "data": "source of the images, and their splits",
    "model": "backbone, weights and image size",
    "augmentation": "random changes of the training images",
    "phases": "trainable layers, lengths and learning rates",
    "runtime": "devices, logs and caches",
    "debug": "trial runs",
    "experiment": "a whole recipe: data, model, augmentation and phases",
    "sweep": "a search over many runs",
}


def conf_folder() -> Path:
    """Return `conf/`: in an installed package inside of it, in a checkout next to it."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def choices(group: str) -> list[str]:
    """The files of a group that can be chosen; those in its subfolders belong to one experiment each."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def help_text() -> str:
    """The text of `--help`, with every group, its meaning and its choices."""
    template = yaml.safe_load((conf_folder() / "config.yaml").read_text())["hydra"]["help"]["template"]
    groups = [f"  {group:14}{meaning}\n{textwrap.indent(textwrap.fill(', '.join(choices(group)), 106), '    ')}"
              for group, meaning in GROUPS.items()]  # fmt: skip
    return Template(template).substitute(APP_CONFIG_GROUPS="\n".join(groups) + "\n")


def _add_freely(argument: str) -> str:
    """`a.b=1` -> `++a.b=1`, so that a mistyped key reaches the validator, which knows the nearest name.

    Group choices (`data=digits`), Hydra's own keys and explicit `+`, `~`, `++` stay as they are.
    """
    match = re.match(r"([A-Za-z_][\w.]*)=", argument)
    keep = not match or match[1].startswith("hydra") or match[1] in GROUPS
    return argument if keep else "++" + argument


def is_sweep(arguments: list[str]) -> bool:
    """Return whether the arguments request many runs: by `-m`, or by a file of the group `sweep`."""
    return any(a in ("-m", "--multirun") or re.match(r"hydra/sweeper=|\+*sweep=(?!null$)", a) for a in arguments)


# Runs a job of a sweep, given its configuration, its overrides and Hydra's settings for it; returns its score.
RunJob = Callable[[DictConfig, list[str], Any], float | None]


def compose(arguments: list[str], run_job: RunJob | None = None) -> dict[str, Any] | None:
    """Compose the configuration of these arguments; without `experiment` and `data` it is the quickstart.

    Returns:
        The resolved tree, or None after `--help` or `--cfg`, and where `run_job` ran the jobs of a sweep.

    Raises:
        ConfigError: an unknown group or file, a value that does not parse, an unresolved `???`.
    """
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return None
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
    if not chosen & {"experiment", "data"}:  # next to the other values: Hydra needs them in one piece
        values = [i for i, a in enumerate(arguments, start=1) if "=" in a or a.startswith("~")]
        arguments.insert(max(values, default=len(arguments)), "experiment=quickstart")
    before, sys.argv = sys.argv, ["python -m trainer", *arguments]
    try:
        hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise _config_error(error) from None
    finally:
        sys.argv = before
    return resolved(composed[0]) if composed else None


def resolved(tree: DictConfig) -> dict[str, Any]:
    """The values of a composed configuration, its interpolations resolved.

    Raises:
        ConfigError: a `???`, or an interpolation that leads nowhere.
    """
    if missing := sorted(OmegaConf.missing_keys(tree)):
        given = " ".join(f"{key}=..." for key in missing)
        raise ConfigError("must be given", key=missing[0], fix=f"add {given} to the command line")
    try:
        return OmegaConf.to_container(tree, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise _config_error(error) from None


def _config_error(error: Exception) -> ConfigError:
    text = str(error) or str(error.__cause__)  # Hydra often has the reason in the cause
    if "Could not find 'hydra/sweeper/optuna'" in text:
        problem = "a search by Optuna needs the extra `sweep`, which is not installed"
        return ConfigError(problem, fix="pip install 'kubetune[sweep]'")
    if choice := re.search(r"Could not find '(\w+)/([\w./-]+)'", text):
        group, name = choice.groups()
        return ConfigError(f"there is no such {group}", key=group, value=name, fix=closest(name, choices(group)))
    if unknown := re.search(r"Could not override '(\w+)'", text):
        known = [*GROUPS, *RequestedConfig.model_fields]
        return ConfigError("there is no such key", key=unknown[1], fix=closest(unknown[1], known))
    lines = [line.strip() for line in text.splitlines()]
    problem = " ".join(line for line in lines if line and "HYDRA_FULL_ERROR" not in line)
    return ConfigError(problem, fix="write KEY=VALUE in the syntax of Hydra, quoted for the shell")
