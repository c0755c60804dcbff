"""What every command has in common: a quiet import of TensorFlow, monitoring, and the exit code."""

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
from trainer.monitoring.log import configure, drop_stderr_lines, log, log_traceback

# Lines that TensorFlow prints on every machine without a GPU, before its log level is in effect.
_TENSORFLOW_NOISE = re.compile(r"All log messages before absl|port\.cc:\d+\] oneDNN|Could not find cuda drivers")
# Keras imports these for wrappers and plots that are not used here; importing them takes seconds.
_UNUSED_BY_KERAS = ("sklearn", "matplotlib")

_log_is_configured = False


@contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """Make packages that are not imported yet appear not to be installed within this block."""
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
    """Suppress what TensorFlow prints on every start when it is imported in this block; other lines reach stderr.

    Keras is imported first, while scikit-learn and matplotlib are hidden, so that it does not import them.
    """
    has_gpu = Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if has_gpu else "3")  # without a GPU, errors of CUDA are expected
    with drop_stderr_lines(_TENSORFLOW_NOISE):
        with _hidden(_UNUSED_BY_KERAS):
            importlib.import_module("keras")
        yield


def start_monitoring(config: RequestedConfig, worker: int, workers: int) -> None:
    """Set up what `runtime` configures: log, termination message, `/healthz` and `/metrics`.

    Raises ConfigError if the process cannot listen on `runtime.http_port`.
    """
    run = {"run": config.output_dir} if config.output_dir else {}
    configure_log(config.runtime, worker=str(worker), **run)
    health.set_gauges(workers=workers)
    if config.runtime.http_port:
        from trainer.monitoring.http import serve

        serve(config.runtime.http_port, health, config.output_dir or config.experiment_name or "")


def configure_log(runtime: Runtime, **labels: str) -> None:
    """Set up the log, with these labels in JSON, the termination message and the limit of a stall."""
    global _log_is_configured
    health.stuck_after = runtime.stuck_after
    termination.set_path(runtime.termination_log)
    configure(json_lines=runtime.log_format == "json", **labels)
    _log_is_configured = True


def _configure_log_for_error() -> None:
    """Set up the log from the `runtime` arguments only, for an error before the configuration is loaded."""
    # The second pattern leaves out the other keys of `runtime`, one of which may be the error.
    for keys in (r"runtime(\.\w+)?", r"runtime(\.log_format|\.termination_log)?"):
        arguments = [a for a in sys.argv[1:] if re.match(rf"\+*({keys})=", a)]
        with suppress(ConfigError):
            return configure_log(load(compose(["data=digits", *arguments]) or {}).runtime) if arguments else None


@contextmanager
def exit_with_code() -> Iterator[None]:
    """Run a whole command in this block, then exit with a code of `trainer.errors`.

    A `TrainerError` is logged as one message, any other exception with its traceback; both set the termination message.
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
