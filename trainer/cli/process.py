"""Code common to all commands: the import of TensorFlow, the set-up of monitoring, and the exit code."""

import gc
import importlib
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.cli.compose import compose
from trainer.cli.source import choose_source
from trainer.cluster.processes import replace_process
from trainer.cluster.signals import ignore_sigterm
from trainer.config.schema import RequestedConfig, Runtime, validate_config
from trainer.errors import (
    BUG,
    DONE,
    DRIFTED,
    INTERRUPTED,
    NOT_PROMOTED,
    UNREADABLE,
    ConfigError,
    Interrupted,
    TrainerError,
)
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import (
    configure,
    discard,
    discard_if_closed,
    drop_stderr_lines,
    log,
    log_traceback,
    stdout_lost_lines,
)
from trainer.storage.disk import FREE_SPACE_FIX, translate_file_errors
from trainer.storage.scratch import scratch_folder

# TensorFlow prints these lines on every machine without a GPU, before its log level takes effect.
_TENSORFLOW_NOISE = re.compile(r"All log messages before absl|port\.cc:\d+\] oneDNN|Could not find cuda drivers")
# Keras imports these packages, which takes seconds, for wrappers and plots that this project does not use.
_UNUSED_BY_KERAS = ("sklearn", "matplotlib")
# Python collects garbage less often than by default: TensorFlow creates millions of objects while it traces, few of
# which are garbage. A small run then takes 8 % less CPU time and 90 MB more memory (docs/log.md).
_GARBAGE_THRESHOLDS = (50_000, 20, 10)

_log_is_configured = False  # set by `configure_log`


class RestartProcess(Exception):
    """Raised to restart this process: `exit_with_code` replaces it by a new process with the same command.

    A process that has trained a teacher raises this exception, so that the new process trains the student.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], has_stop_request: Callable[[], bool]
    ) -> None:
        """Store the arguments to append, the new environment, and a function that returns whether to stop instead."""
        super().__init__()
        self.arguments, self.environment, self.has_stop_request = arguments, environment, has_stop_request


@contextmanager
def _hide_packages(names: Iterable[str]) -> Iterator[None]:
    """Make imports of these packages fail in the block, as if they were not installed, unless already imported."""
    hidden_names = [name for name in names if name not in sys.modules]
    for name in hidden_names:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden_names:
            del sys.modules[name]


@contextmanager
def suppress_import_noise(with_keras: bool = True) -> Iterator[None]:
    """Import Keras or TensorFlow, then run the block, and drop the lines that TensorFlow prints on every import.

    Other lines reach stderr. Keras is imported as if scikit-learn and matplotlib, which take seconds, were missing.

    Args:
        with_keras: False for a command that builds no network. TensorFlow, which imports Keras if it is installed, is
            then imported as if it were not, to save seconds.
    """
    has_gpu = Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if has_gpu else "3")  # without a GPU, CUDA errors are expected
    with drop_stderr_lines(_TENSORFLOW_NOISE):
        with _hide_packages(_UNUSED_BY_KERAS if with_keras else ("keras",)):
            importlib.import_module("keras" if with_keras else "tensorflow")
        yield


def start_monitoring(config: RequestedConfig, worker_index: int, num_workers: int) -> socket.socket | None:
    """Set up the log, the termination message and the HTTP server as `config.runtime` specifies.

    Args:
        config: the run's configuration.
        worker_index: index of this worker, from 0.
        num_workers: number of workers.

    Returns:
        The HTTP server's listening socket; None if `runtime.http_port` is null.

    Raises:
        ConfigError: the server cannot listen on `runtime.http_port`.
    """
    configure_log(config.runtime, **make_log_labels(config, worker_index))
    health.set_gauges(workers=num_workers)
    if config.runtime.http_port:
        from trainer.monitoring.http import serve

        return serve(config.runtime.http_port, health, config.output_dir or config.experiment_name or "").socket
    return None


def make_log_labels(config: RequestedConfig, worker: int) -> dict[str, str]:
    """Return the labels of a worker's log lines: its index as "worker", and output_dir as "run" unless it is null."""
    return {"worker": str(worker)} | ({"run": config.output_dir} if config.output_dir else {})


def configure_log(runtime: Runtime, **labels: str) -> None:
    """Set up the log, the termination message and the stall timeout. Only JSON log lines contain `labels`."""
    global _log_is_configured
    health.stuck_after = runtime.stuck_after
    termination.set_path(runtime.termination_log)
    configure(json_lines=runtime.log_format == "json", **labels)
    _log_is_configured = True


def _configure_log_from_arguments() -> None:
    """Set up the log from the `runtime` arguments alone, for messages before the configuration is loaded."""
    # The second attempt omits the other keys of `runtime`, since one of them may be invalid.
    for keys in (r"runtime(\.\w+)?", r"runtime(\.log_format|\.termination_log)?"):
        arguments = [a for a in sys.argv[1:] if re.match(rf"\+*({keys})=", a)]
        with suppress(ConfigError):
            if arguments:
                configure_log(validate_config(compose(["data=digits", *arguments]) or {}).runtime)
            return


def choose_and_log_source(arguments: list[str]) -> list[str]:
    """Choose the data source with `choose_source`, log the choice unless `--cfg` prints it, and return the arguments.

    Raises ConfigError or DataError if the source cannot be chosen.
    """
    arguments, log_line = choose_source(arguments)
    if log_line and not {"--cfg", "-c", "--cfg=job"} & set(arguments):
        _configure_log_from_arguments()
        log.info(log_line)
    return arguments


@contextmanager
def _stdout_errors() -> Iterator[None]:
    """Raise Interrupted if the block cannot write to stdout, for example on a full disk, and discard later output."""
    try:
        yield
    except OSError as error:
        if error.filename or not _stdout_fails():
            raise
        raise Interrupted(f"stdout: cannot be written to ({error.strerror or error})", fix=FREE_SPACE_FIX) from None


def _stdout_fails() -> bool:
    """Return whether stdout cannot be written to, except because of a closed pipe. If so, discard later output."""
    try:
        print(flush=True)  # without a buffer (PYTHONUNBUFFERED) there may be nothing to flush
    except BrokenPipeError:
        return False
    except OSError:
        discard(sys.stdout)
        return True
    return False


@contextmanager
def exit_with_code() -> Iterator[None]:
    """Run a command in the block, then exit with a code defined in `trainer.errors`, 0 if the block raises nothing.

    A `TrainerError` is logged as one message, any other exception with its traceback. Both set the termination message.
    `KeyboardInterrupt` exits with `INTERRUPTED`. After `RestartProcess`, the process is replaced instead.
    """
    exit_code, reason, restart_request = DONE, "", None
    gc.set_threshold(*_GARBAGE_THRESHOLDS)
    configure()
    try:
        with translate_file_errors(), _stdout_errors(), scratch_folder():
            yield
    except RestartProcess as restart:
        restart_request = restart
    except TrainerError as error:
        if not _log_is_configured:
            _configure_log_from_arguments()
        exit_code, reason = error.exit_code, str(error)
        error_fields = {"key": error.key, "value": error.value, "fix": error.fix}
        fields: dict[str, object] = {"exit_code": exit_code} | {
            field: value for field, value in error_fields.items() if value is not None
        }
        if isinstance(error, ConfigError) and error.errors:
            attributes = ("key", "value", "problem", "fix")
            fields["faults"] = [{name: getattr(listed, name) for name in attributes} for listed in error.errors]
        outcomes = {INTERRUPTED: "interrupted", DRIFTED: "drift", NOT_PROMOTED: "refused", UNREADABLE: "unreadable"}
        outcome = outcomes.get(exit_code, "error")
        level = logging.ERROR if outcome == "error" else logging.WARNING
        log.log(level, f"{outcome}: {reason}", extra={"fields": fields})
    except KeyboardInterrupt:
        exit_code, reason = INTERRUPTED, "interrupted before anything was trained"
        log.warning(reason, extra={"fields": {"exit_code": exit_code}})
    except SystemExit as system_exit:  # Hydra's --help
        exit_code = system_exit.code if isinstance(system_exit.code, int) else (BUG if system_exit.code else DONE)
    except BrokenPipeError as error:
        if not discard_if_closed(sys.stdout):  # `... | head` has read enough
            exit_code, reason = BUG, f"{type(error).__name__}: {error}; the log has the traceback"
            log_traceback(error)
    except Exception as error:
        exit_code, reason = BUG, f"{type(error).__name__}: {error}; the log has the traceback"
        log_traceback(error)
    if restart_request:
        replace_process(restart_request.arguments, restart_request.environment, restart_request.has_stop_request)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_if_closed(sys.stdout)
    except OSError as error:
        discard(sys.stdout)
        if exit_code == DONE and not stdout_lost_lines():
            exit_code, reason = (
                INTERRUPTED,
                f"stdout: cannot be written to ({error.strerror or error}); {FREE_SPACE_FIX}",
            )
            log.warning(f"interrupted: {reason}")
    termination.write(exit_code, reason)
    ignore_sigterm()
    sys.exit(exit_code)
