"""The parts of every process of the command line: a quiet start, monitoring, and the exit code."""

import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from trainer.cli.compose import conf_folder
from trainer.cluster.signals import take_no_signal
from trainer.config.schema import RunConfig, Runtime
from trainer.errors import BUG, DONE, INTERRUPTED, TrainerError
from trainer.monitoring import log as lines
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import without

# What TensorFlow says on every machine without a GPU, before its log level counts.
_CHATTER = re.compile(r"All log messages before absl|port\.cc:\d+\] oneDNN|Could not find cuda drivers")
# Keras imports them for wrappers and plots that nothing here uses, which takes seconds.
_NEEDLESS = ("sklearn", "matplotlib")


@contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """Make packages look as if they were not installed; those imported already stay, all can be imported after."""
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
    """Leave out what TensorFlow prints when it is imported; every other line still reaches stderr.

    Keras is imported first, without scikit-learn and matplotlib; its own use of both stays off in this process.
    """
    has_gpu = Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if has_gpu else "3")  # without one, CUDA's errors mean nothing
    with without(_CHATTER):
        with _hidden(_NEEDLESS):
            importlib.import_module("keras")
        yield


def configure_log_early(arguments: list[str]) -> None:
    """Set the format of the log and the termination message from the arguments, until the configuration is known.

    So faults of the configuration appear where they are looked for. `--help` and `--cfg` are read by people.
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
    """The values in a file of the group `runtime`, over its defaults; none where there is no such file."""
    file = conf_folder() / "runtime" / f"{name}.yaml"
    own = yaml.safe_load(file.read_text()) if file.is_file() else {}
    settings: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        settings |= own if base == "_self_" else _preset(base)
    return settings | own


def start_monitoring(config: RunConfig, worker: int, workers: int) -> None:
    """Set up the log, the termination message, and `/healthz` and `/metrics` as the section `runtime` says.

    Raises:
        ConfigError: the port cannot be had.
    """
    run = {"run": config.output_dir} if config.output_dir else {}
    configure_log(config.runtime, worker=str(worker), **run)
    health.set_gauges(workers=workers)
    if config.runtime.http_port:
        from trainer.monitoring.http import serve

        serve(config.runtime.http_port, health, config.output_dir or config.experiment_name or "")


def configure_log(runtime: Runtime, **labels: str) -> None:
    """Set up the log, with these labels in JSON, and the termination message."""
    health.stuck_after = runtime.stuck_after
    termination.leave_in(runtime.termination_log)
    if runtime.log_format == "json":
        lines.as_json(**labels)


@contextmanager
def exit_with_code() -> Iterator[None]:
    """Run a whole command, and exit with a documented code (`trainer.errors`).

    Failures we can explain become one message on stderr, all others a traceback; either is the termination message too.
    """
    code, reason = DONE, ""
    try:
        yield
    except TrainerError as error:
        code, reason = error.exit_code, str(error)
        if code == INTERRUPTED:
            lines.say(f"interrupted: {reason}", "WARNING", exit_code=code)
        else:
            lines.say(f"error: {reason}", "ERROR", exit_code=code)
    except KeyboardInterrupt:
        code, reason = INTERRUPTED, "interrupted before anything was trained"
        lines.say(reason, "WARNING", exit_code=code)
    except SystemExit as stop:  # Hydra's --help
        code = stop.code if isinstance(stop.code, int) else (BUG if stop.code else DONE)
    except Exception as error:
        code, reason = BUG, f"{type(error).__name__}: {error}; the log has the traceback"
        lines.say_traceback(error)
    termination.leave(code, reason)
    take_no_signal()
    sys.exit(code)
