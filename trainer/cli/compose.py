"""Compose the configuration of a run from command-line arguments with Hydra."""

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

import trainer
from trainer.cli.overrides import (
    GROUPS,
    list_argument_keys,
    move_options_first,
    parse_names,
    parse_weights,
    suggest_choice_fix,
    translate_overrides,
)
from trainer.config.keys import add_defaults, list_keys, suggest_key, suggest_name
from trainer.config.schema import RequestedConfig, validate_config
from trainer.config.unread import require_read
from trainer.errors import ConfigError


def find_conf_folder() -> Path:
    """Return the `conf` folder: inside `trainer` in an installed package, next to `trainer` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged_conf = package / "conf"
    return packaged_conf if packaged_conf.is_dir() else package.parent / "conf"


def list_choices(group: str) -> list[str]:
    """List the choices of a config group, such as `model`: the names of the YAML files in its folder.

    Files in subfolders are omitted, because they belong to individual experiments.
    """
    return sorted(path.stem for path in (find_conf_folder() / group).glob("*.yaml"))


def format_help() -> str:
    """Format the text of `--help`, with a description and the choices of each config group."""
    template = yaml.safe_load((find_conf_folder() / "config.yaml").read_text())["hydra"]["help"]["template"]
    groups = [f"  {group:14}{summary}\n{textwrap.indent(textwrap.fill(', '.join(list_choices(group)), 106), '    ')}"
              for group, summary in GROUPS.items()]  # fmt: skip
    return Template(template).substitute(APP_CONFIG_GROUPS="\n".join(groups) + "\n")


def _allow_new_key(argument: str) -> str:
    """Turn `a.b=1` into `++a.b=1`, so that Hydra accepts unknown keys, which `validate_config` reports.

    Config groups, Hydra's own keys and arguments that are not KEY=VALUE are returned unchanged.
    """
    match = re.match(r"\+*([A-Za-z_][\w.]*)=", argument)
    keep_unchanged = not match or match[1].startswith("hydra") or match[1] in GROUPS
    return argument if keep_unchanged else "++" + argument.lstrip("+")


def _expand_teacher_group(argument: str) -> str:
    """Turn `distillation.model=NAME` into `+model@distillation.model=NAME`, so that Hydra reads conf/model/NAME.yaml.

    `distillation.phases=NAME` is treated in the same way. Any other argument is returned unchanged. Raises ConfigError
    if NAME.yaml does not exist.
    """
    match = re.fullmatch(r"\+*(distillation\.(model|phases))=([\w,-]+)", argument)
    if not match or match[3] == "null":
        return argument
    key, group, names = match.groups()
    # phases=auto is excluded, because conf/phases/auto.yaml also sets keys outside `phases`.
    choices = [name for name in list_choices(group) if (group, name) != ("phases", "auto")]
    if unknown := next((name for name in names.split(",") if name not in choices), None):
        fix = "leave it out: the teacher then has the phases of the run" if unknown == "auto" else ""
        raise ConfigError(
            f"there is no such {group}", key=key, value=unknown, fix=fix or suggest_name(unknown, choices)
        )
    return f"+{group}@{key}={names}"


def requests_sweep(arguments: list[str]) -> bool:
    """Return whether the arguments request several runs, by `-m`, `hydra/sweeper=...` or `sweep=...`."""
    return any(a in ("-m", "--multirun") or re.match(r"hydra/sweeper=|\+*sweep=(?!null$)", a) for a in arguments)


# Function that runs one job of a sweep. Its arguments are the job's configuration, its overrides and Hydra's own
# configuration. It returns the job's score, which a search maximizes, or None if the job has no score.
RunJob = Callable[[DictConfig, list[str], Any], float | None]


def compose(arguments: list[str], run_job: RunJob | None = None) -> dict[str, Any] | None:
    """Compose the configuration with Hydra, and resolve its interpolations.

    If the arguments choose neither `experiment` nor `data`, the experiment is `quickstart`.

    Args:
        arguments: command-line arguments of a run, without the command.
        run_job: called for each job of a sweep. If it is None, a sweep returns the configuration of its first job.

    Returns:
        The configuration as dicts, lists and scalars; None after `--help`, `--version` or `--cfg`, or if `run_job` was
        called.

    Raises:
        ConfigError: an option, group or file is unknown, a value cannot be parsed or resolved, or a required value
            (`???`) is missing.
    """
    if {"-h", "--help"} & set(arguments):
        print(format_help())
        return None
    if "--version" in arguments:
        print(f"kubetune {trainer.__version__}")
        return None
    arguments, print_config = _remove_cfg_job(translate_overrides(arguments, is_sweep=requests_sweep(arguments)))
    composed_trees: list[DictConfig] = []

    def job(tree: DictConfig) -> float | None:
        """Run a job of a sweep, or store the composed configuration of a single run. Hydra calls this function."""
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN and run_job is not None:
            return run_job(tree, list(hydra_config.overrides.task), hydra_config)
        composed_trees.append(tree)
        return None

    # Makes Hydra raise its errors instead of printing them and exiting with code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # conf/config.yaml reads the folder of a sweep from this variable.
    os.environ.setdefault("KUBETUNE_SWEEP", f"outputs/sweep-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    argument_keys = {a.split("=")[0] for a in arguments}
    arguments = [_allow_new_key(_expand_teacher_group(a)) for a in arguments]
    # conf/sweep/optuna.yaml replaces the plugin's defaults, which minimize, run two jobs at once and set no seed.
    if "sweep" not in argument_keys:
        arguments = ["sweep=optuna" if a == "hydra/sweeper=optuna" else a for a in arguments]
    if not argument_keys & {"experiment", "data"}:
        arguments.append("experiment=quickstart")
    original_argv, sys.argv = sys.argv, ["python -m trainer", *move_options_first(arguments)]
    try:
        hydra.main(config_path=str(find_conf_folder()), config_name="config", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise _translate_error(error) from None
    finally:
        sys.argv = original_argv
    if composed_trees and print_config:
        tree: Any = OmegaConf.to_container(composed_trees[0], resolve=True, throw_on_missing=False)
        print(_format_yaml(add_defaults(RequestedConfig, tree)), end="")
        return None
    return resolve(composed_trees[0]) if composed_trees else None


def _format_yaml(tree: dict[str, Any]) -> str:
    """Format a configuration as YAML, with a comment that lists the keys of each section that is null."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    for name in (name for name, value in tree.items() if value is None):
        if keys := [key for key in list_keys(RequestedConfig) if key.startswith(f"{name}.")]:
            text = re.sub(rf"^{name}: null$", f"{name}: null # {', '.join(keys)}", text, flags=re.M)
    return text


def _remove_cfg_job(arguments: list[str]) -> tuple[list[str], bool]:
    """Remove `--cfg job` and `--resolve` if there are no other options; otherwise, Hydra prints the configuration.

    Returns the arguments, and whether `--cfg job` was removed.
    """
    other_arguments = []
    has_cfg_job = False
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        has_cfg_job |= argument in ("--cfg=job", "-c=job") or (argument == "job" and previous in ("--cfg", "-c"))
        if argument not in ("--cfg", "-c", "--cfg=job", "-c=job", "--resolve") and previous not in ("--cfg", "-c"):
            other_arguments.append(argument)
    only_cfg_job = has_cfg_job and not any(argument.startswith("-") for argument in other_arguments)
    return (other_arguments, True) if only_cfg_job else (arguments, False)


def load_and_require_read(composed: dict[str, Any], arguments: list[str]) -> RequestedConfig:
    """Validate a composed configuration, and require that each key in the command-line `arguments` has an effect.

    Raises ConfigError, whose `errors` are all errors in the configuration, or else all keys in `arguments` without an
    effect.
    """
    config = validate_config(composed)
    require_read(config, list_argument_keys(arguments))
    return config


def resolve(tree: DictConfig) -> dict[str, Any]:
    """Resolve the interpolations of a composed configuration, and return it as plain dicts, lists and scalars.

    Hydra composes mappings in training.class_weights and data.class_names as strings. Here they become dicts.

    Raises ConfigError if a required value (`???`) is missing, an interpolation cannot be resolved, or one of these
    mappings cannot be parsed.
    """
    try:
        if missing_keys := sorted(OmegaConf.missing_keys(tree)):
            arguments = " ".join(f"{key}=..." for key in missing_keys)
            raise ConfigError("must be given", key=missing_keys[0], fix=f"add {arguments} to the command line")
        values: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise _translate_error(error) from None
    if isinstance(training := values.get("training"), dict) and "class_weights" in training:
        training["class_weights"] = parse_weights(training["class_weights"], "training.class_weights")
    if isinstance(data := values.get("data"), dict) and "class_names" in data:
        data["class_names"] = parse_names(data["class_names"], "data.class_names")
    return values


def _translate_error(error: Exception) -> ConfigError:
    """Translate a Hydra or OmegaConf exception to a ConfigError."""
    message = str(error) or str(error.__cause__)  # some Hydra exceptions have a message only in their cause
    if "Could not find 'hydra/sweeper/optuna'" in message:
        problem = "a search by Optuna needs the extra `sweep`, which is not installed"
        return ConfigError(problem, fix="pip install 'kubetune[sweep]'")
    if group_match := re.search(r"Could not find '(\w+)/([\w./-]+)'", message):
        group, name = group_match.groups()
        if group not in GROUPS:
            return ConfigError(f"there is no {name}", key=group, fix="see the documentation of Hydra")
        fix = suggest_choice_fix(group, name)
        fix = fix if fix.startswith("write") else suggest_name(name, list_choices(group))
        return ConfigError(f"there is no such {group}", key=group, value=name, fix=fix)
    if key_match := re.search(r"Could not override '([^']+)'", message):
        return ConfigError(
            "there is no such key",
            key=key_match[1],
            fix=suggest_key(key_match[1], [*GROUPS, *list_keys(RequestedConfig)]),
        )
    lines = [line.strip() for line in message.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    if interpolation_match := re.search(r"full_key: (\S+)", message):
        fix = r"refer to another key, such as ${seed}, or write \${ for these characters"
        return ConfigError(f"cannot be resolved: {lines[0]}", key=interpolation_match[1], fix=fix)
    return ConfigError(" ".join(lines), fix="write KEY=VALUE in the syntax of Hydra, quoted for the shell")
