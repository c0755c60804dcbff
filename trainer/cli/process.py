"""The parts of every process of the command line: a quiet start, monitoring, and the exit code."""

import importlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.cli.compose import compose
from trainer.cluster.signals import ignore_sigterm
from trainer.config.schema import RequestedConfig, Runtime, load
from trainer.errors import BUG, DONE, DRIFTED, INTERRUPTED, ConfigError, TrainerError
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import configure, log, log_traceback, without

# Lines that TensorFlow prints on every machine without a GPU, before its log level is in effect.
_CHATTER = re.compile(r"All log messages before absl|port\.cc:\d+\] oneDNN|Could not find cuda drivers")
# Keras imports these for wrappers and plots that are not used here, which takes seconds.
_NEEDLESS = ("sklearn", "matplotlib")

_log_is_configured = False


@contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """Make packages appear not to be installed; those imported already stay, all can be imported after."""
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
    """Suppress the lines that TensorFlow prints when it is imported; all others still reach stderr.

    Keras is imported first, without scikit-learn and matplotlib, which it then does not use in this process.
    """
    has_gpu = Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if has_gpu else "3")  # CUDA's errors are noise then
    with without(_CHATTER):
        with _hidden(_NEEDLESS):
            importlib.import_module("keras")
        yield


def start_monitoring(config: RequestedConfig, worker: int, workers: int) -> None:
    """Set up the log, the termination message, and `/healthz` and `/metrics`, as configured in `runtime`.

    Raises:
        ConfigError: the port is in use or not allowed.
    """
    run = {"run": config.output_dir} if config.output_dir else {}
    configure_log(config.runtime, worker=str(worker), **run)
    health.set_gauges(workers=workers)
    if config.runtime.http_port:
        from trainer.monitoring.http import serve

        serve(config.runtime.http_port, health, config.output_dir or config.experiment_name or "")


def configure_log(runtime: Runtime, **labels: str) -> None:
    """Set up the log, with these labels in JSON, and the termination message."""
    global _log_is_configured
    health.stuck_after = runtime.stuck_after
    termination.set_path(runtime.termination_log)
    configure(json_lines=runtime.log_format == "json", **labels)
    _log_is_configured = True


def _configure_log_for_error() -> None:
    """Set up the log of a process that ends before its configuration is known, from its arguments of `runtime`."""
    for keys in (r"runtime(\.\w+)?", r"runtime(\.log_format|\.termination_log)?"):  # the rest may be the error
        own = [a for a in sys.argv[1:] if re.match(rf"\+*({keys})=", a)]
        with suppress(ConfigError):
            return configure_log(load(compose(["data=digits", *own]) or {}).runtime) if own else None


@contextmanager
def exit_with_code() -> Iterator[None]:
    """Run a whole command, and exit with a documented code (`trainer.errors`).

    A `TrainerError` becomes one message on stderr, any other error a traceback; either is the termination message too.
    """
    code, reason = DONE, ""
    configure()
    try:
        yield
    except TrainerError as error:
        if not _log_is_configured:
            _configure_log_for_error()
        code, reason = error.exit_code, str(error)
        named = {"key": error.key, "value": error.value, "fix": error.fix}
        fields: dict[str, object] = {"exit_code": code} | {k: value for k, value in named.items() if value is not None}
        if isinstance(error, ConfigError) and error.faults:
            parts = ("key", "value", "problem", "fix")
            fields["faults"] = [{part: getattr(fault, part) for part in parts} for fault in error.faults]
        outcome = {INTERRUPTED: "interrupted", DRIFTED: "drift"}.get(code, "error")
        level = logging.ERROR if outcome == "error" else logging.WARNING
        log.log(level, f"{outcome}: {reason}", extra={"fields": fields})
    except KeyboardInterrupt:
        code, reason = INTERRUPTED, "interrupted before anything was trained"
        log.warning(reason, extra={"fields": {"exit_code": code}})
    except SystemExit as stop:  # Hydra's --help
        code = stop.code if isinstance(stop.code, int) else (BUG if stop.code else DONE)
    except Exception as error:
        code, reason = BUG, f"{type(error).__name__}: {error}; the log has the traceback"
        log_traceback(error)
    termination.write(code, reason)
    ignore_sigterm()
    sys.exit(code)
