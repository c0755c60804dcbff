"""What every `python -m trainer...` shares: composing the configuration, sweeps, and exit codes."""

from __future__ import annotations

import datetime
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.base import nearest
from trainer.config.schema import RunConfig, Runtime
from trainer.errors import BUG, DONE, INTERRUPTED, ConfigError, TrainerError
from trainer.monitoring import log as lines
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import without


def conf_folder() -> Path:
    """`conf/`: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def _add_freely(argument: str) -> str:
    """`a.b=1` -> `++a.b=1`, so that a mistyped key reaches the validator, which knows the nearest name.

    Group choices (`data=digits`), Hydra's own keys and explicit `+`, `~`, `++` stay as they are.
    """
    match = re.match(r"([A-Za-z_][\w.]*)=", argument)
    if not match or match[1].startswith("hydra"):
        return argument
    groups = {p.name for p in conf_folder().iterdir() if p.is_dir()}
    return argument if match[1] in groups else "++" + argument


def asks_for_sweep(arguments: list[str]) -> bool:
    """Whether many runs are asked for: by `-m`, or by a file of the group `sweep`."""
    return any(a in ("-m", "--multirun") or re.match(r"hydra/sweeper=|\+*sweep=(?!null$)", a) for a in arguments)


# What runs a job of a sweep: its configuration, what it was told, Hydra's settings for it; returns its score.
RunJob = Callable[[DictConfig, list[str], Any], float | None]


def compose(arguments: list[str], run_job: RunJob | None = None) -> dict[str, Any] | None:
    """Compose the configuration that the arguments ask for. With neither `experiment` nor `data` it is the quickstart.

    Returns:
        The resolved tree, or None where Hydra itself answered (`--help`, `--cfg`) or `run_job` ran the jobs of a sweep.

    Raises:
        ConfigError: an unknown group or file, a value that does not parse, an unresolved `???`.
    """
    found: list[DictConfig] = []

    def job(tree: DictConfig) -> float | None:
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN and run_job is not None:
            return run_job(tree, list(settings.overrides.task), settings)
        found.append(tree)
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
    return resolved(found[0]) if found else None


def resolved(tree: DictConfig) -> dict[str, Any]:
    """The values of a composed configuration.

    Raises:
        ConfigError: a `???`, or an interpolation that leads nowhere.
    """
    missing = OmegaConf.missing_keys(tree)
    if missing:
        raise ConfigError(f"must be given on the command line: {', '.join(f'{k}=...' for k in sorted(missing))}")
    try:
        return OmegaConf.to_container(tree, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_one_sentence(error)) from None


def _one_sentence(error: Exception) -> str:
    text = str(error) or str(error.__cause__)  # Hydra often keeps the reason in the cause
    if "Could not find 'hydra/sweeper/optuna'" in text:
        return "a search by Optuna needs the extra `sweep`, which is not installed: pip install 'kubetune[sweep]'"
    choice = re.search(r"Could not find '(\w+)/([\w.-]+)'", text)
    if choice:
        group, name = choice.groups()
        known = sorted(p.stem for p in (conf_folder() / group).glob("*.yaml"))
        return f"{group}={name}: there is no such {group}.{nearest(name, known)} Known: {', '.join(known)}"
    strange = re.search(r"Could not override '(\w+)'", text)
    if strange:
        groups = [p.name for p in conf_folder().iterdir() if p.is_dir()]
        return f"{strange[1]}: there is no such key.{nearest(strange[1], [*groups, *RunConfig.model_fields])}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line)


# What TensorFlow says on every machine without a GPU, before its log level counts.
_CHATTER = re.compile(r"All log messages before absl|port\.cc:\d+\] oneDNN|Could not find cuda drivers")


# Keras imports them for wrappers and plots that nothing here uses, which takes seconds.
_NEEDLESS = ("sklearn", "matplotlib")


@contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """As if these packages were not installed; those that are imported already stay, and all can be imported after."""
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def quiet_start() -> Iterator[None]:
    """Around what imports TensorFlow: its greetings are left out, every other line still reaches stderr.

    Keras is imported first, without scikit-learn and matplotlib; its own use of both stays off in this process.
    """
    has_gpu = Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if has_gpu else "3")  # without one, CUDA's errors mean nothing
    with without(_CHATTER):
        with _hidden(_NEEDLESS):
            importlib.import_module("keras")
        yield


def speak_early(arguments: list[str]) -> None:
    """Until the configuration is known: the form of the log and the termination message, as far as the arguments tell.

    So what is wrong with the configuration is said where it is looked for. `--help` and `--cfg` are read by people.
    """
    if any(a.startswith("-") and a not in ("-m", "--multirun") for a in arguments):
        return
    given = {m[1]: m[2] for a in arguments if (m := re.match(r"\+*([\w.]+)=(.*)", a))}
    settings = _preset(given.get("runtime", "default"))
    if given.get("runtime.log_format", settings.get("log_format")) == "json":
        lines.as_json()
    file = given.get("runtime.termination_log", settings.get("termination_log"))
    if file and file != "null" and "$" not in file:
        termination.leave_in(file.strip("'\""))


def _preset(name: str) -> dict[str, Any]:
    """What a file of the group `runtime` says, over those it builds on; nothing where there is no such file."""
    file = conf_folder() / "runtime" / f"{name}.yaml"
    own = yaml.safe_load(file.read_text()) if file.is_file() else {}
    settings: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        settings |= own if base == "_self_" else _preset(base)
    return settings | own


def be_seen(config: RunConfig, worker: int, workers: int) -> None:
    """From here on the process can be watched as `runtime` says: log lines, a port, a last message.

    Raises:
        ConfigError: the port cannot be had.
    """
    speak_as(config.runtime, worker=str(worker), **({"run": config.output_dir} if config.output_dir else {}))
    health.set_gauges(workers=workers)
    if config.runtime.http_port:
        from trainer.monitoring.http import serve

        serve(config.runtime.http_port, health, config.output_dir or config.experiment_name or "")


def speak_as(runtime: Runtime, **labels: str) -> None:
    """The form of the log and the termination message, as configured."""
    health.stuck_after = runtime.stuck_after
    termination.leave_in(runtime.termination_log)
    if runtime.log_format == "json":
        lines.as_json(**labels)


def exit_code_of(action: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a command; failures we can explain become one message on stderr and their exit code."""
    code, reason = _end_of(action, arguments)
    termination.leave(code, reason)
    return code


def _end_of(action: Callable[[list[str]], None], arguments: list[str]) -> tuple[int, str]:
    try:
        action(arguments)
    except TrainerError as error:
        if error.exit_code == INTERRUPTED:
            lines.say(f"interrupted: {error}", "WARNING", exit_code=INTERRUPTED)
        else:
            lines.say(f"error: {error}", "ERROR", exit_code=error.exit_code)
        return error.exit_code, str(error)
    except KeyboardInterrupt:
        lines.say(text := "interrupted before anything was trained", "WARNING", exit_code=INTERRUPTED)
        return INTERRUPTED, text
    except SystemExit as stop:  # Hydra's --help and argparse
        return stop.code if isinstance(stop.code, int) else (BUG if stop.code else DONE), ""
    except Exception as error:
        lines.say_traceback(error)
        return BUG, f"{type(error).__name__}: {error}; the log has the traceback"
    return DONE, ""
