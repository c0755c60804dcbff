"""Run one night of `trainer.nightly`: measure the drift of the served version, retrain, compare, and promote."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from trainer.cluster.signals import exit_on_sigterm
from trainer.config.schema import Runtime
from trainer.config.typed import quote_if_needed
from trainer.drift import measure
from trainer.errors import (
    BUG,
    DONE,
    GAVE_UP,
    INTERRUPTED,
    WRONG_INPUT,
    ConfigError,
    DataError,
    GaveUp,
    Interrupted,
    NoPredictions,
    NotPromoted,
    TrainerError,
)
from trainer.evaluation.drift import LogPeriod, find_version, get_most_severe_level
from trainer.monitoring.health import health
from trainer.monitoring.http import serve
from trainer.monitoring.log import log
from trainer.monitoring.termination import set_success_message
from trainer.storage.base import encode_json
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import parse_json

RECORDS = "nights"  # folder in `Settings.runs` that contains the records of all nights
# Outcomes of a night, as stored in its record. A second start on the same day measures again after STABLE and
# NO_PREDICTIONS, continues the run after FAILED, and does nothing after PROMOTED and NOT_PROMOTED.
STABLE, NO_PREDICTIONS, FAILED = "stable", "no predictions", "failed"
PROMOTED, NOT_PROMOTED = "promoted", "refused"


@dataclass(frozen=True)
class Settings:
    """The arguments of `trainer.nightly`. Addresses, local or in a bucket, do not end with a slash."""

    to: str  # folder with the served model's versions
    log: str  # prediction log
    runs: str  # folder of the runs and of `RECORDS`
    hours: float  # length of the period whose predictions are compared with the reference
    keep: int  # number of versions to retain
    overrides: tuple[str, ...]  # configuration of the runs, KEY=VALUE


@dataclass(frozen=True)
class Night:
    """The record of a night, `runs/nights/DAY.json`, written before the run starts and again with the outcome."""

    day: str  # in UTC, such as 2026-01-31; also the name of the run's folder
    warm_start: str | None = None  # output_dir of the run whose weights initialize this one; None for the backbone's
    levels: Mapping[str, str] | None = None  # level of each measure of drift; None if nothing was measured
    outcome: str | None = None  # None if this day's run is not finished
    reason: str = ""  # reason for the outcome, or for the run if it is not finished
    version: int | None = None  # number of the promoted version; None if none was promoted


def parse_night(value: Any) -> Night:
    """Convert a JSON object to a `Night`. Raise a TypeError for wrong fields, a ValueError for an unknown outcome."""
    night = Night(**value)
    if night.outcome not in (None, STABLE, NO_PREDICTIONS, FAILED, PROMOTED, NOT_PROMOTED):
        raise ValueError(f"unknown outcome {night.outcome!r}")
    return night


def choose_night(nights: list[Night], today: str) -> tuple[Night, bool]:
    """Choose the night of this process. Return its record, and whether an earlier process has already started its run.

    It is the newest night if its run is not finished, and otherwise the night of `today`, such as 2026-01-31, whose run
    was started before if the outcome is FAILED.
    """
    newest = max(nights, key=lambda night: night.day, default=None)
    if newest and newest.outcome is None:
        return newest, True
    todays_night = next((night for night in nights if night.day == today), Night(today))
    return todays_night, todays_night.outcome == FAILED


def run_night(settings: Settings, now: datetime, runtime: Runtime) -> None:
    """Run a night, or continue an unfinished one.

    Raises:
        NotPromoted: the run is worse than the served version.
        Interrupted: the run was interrupted; the next start of the command continues it.
        ConfigError, DataError: the reference, the log or a record cannot be used, or the run cannot be promoted.
        TrainerError: the run failed.
    """
    records = storage_path(settings.runs) / RECORDS
    with _serve_monitoring(runtime):
        night, has_begun = choose_night(_read_nights(records), f"{now:%Y-%m-%d}")
        if night.outcome in (PROMOTED, NOT_PROMOTED):
            return _finish(f"{settings.runs}/{night.day} is finished already: {night.outcome}; {night.reason}")
        if has_begun:
            log.info(f"continuing {settings.runs}/{night.day}")
            night = replace(night, outcome=None)
        else:
            night = _measure(settings, night.day, now)
        _write_night(records, night)
        if night.outcome:
            return _finish(f"{night.outcome}: {night.reason}; nothing to do")
    exit_code = train(settings, night)
    with _serve_monitoring(runtime):
        if exit_code == INTERRUPTED:
            raise Interrupted(f"{settings.runs}/{night.day} is not finished", fix="the next start continues it")
        if exit_code != DONE:
            error = _describe_failure(settings, night.day, exit_code, runtime)
            if exit_code in (WRONG_INPUT, GAVE_UP):  # the run would fail again, so the next night trains a new one
                _write_night(records, replace(night, outcome=FAILED, reason=str(error)))
            raise error
        _promote(settings, night, records)


def _promote(settings: Settings, night: Night, records: StoragePath) -> None:
    """Promote a night's finished run, and record the outcome. Errors of `promote` are recorded and raised again."""
    from trainer.promote.promotion import promote  # imported here, because it imports matplotlib

    try:
        version, reason = promote(f"{settings.runs}/{night.day}", storage_path(settings.to), settings.keep)
    except NotPromoted as not_promoted:
        _write_night(records, replace(night, outcome=NOT_PROMOTED, reason=not_promoted.problem))
        raise
    except (ConfigError, DataError) as error:
        _write_night(records, replace(night, outcome=FAILED, reason=str(error)))
        raise
    _write_night(records, replace(night, outcome=PROMOTED, reason=reason, version=version))
    _finish(f"{settings.runs}/{night.day} is version {version} of {settings.to}: {reason}")


def _finish(message: str) -> None:
    log.info(message)
    set_success_message(message)


def _measure(settings: Settings, day: str, now: datetime) -> Night:
    """Measure the served version's drift. Return the night's record, whose outcome is None if a run must be trained."""
    version = find_version(settings.to)
    if version is None:
        log.info(f"{settings.to} has no version yet: training the first one")
        return Night(day, reason="there was no version")
    period = LogPeriod(now - timedelta(hours=settings.hours), now, version.name)
    try:
        measures = measure(settings.to, settings.log, period, f"{settings.runs}/{RECORDS}/{day}.png")
    except NoPredictions as error:
        log.warning(f"{error}; without predictions there is no drift to measure")
        return Night(day, outcome=NO_PREDICTIONS, reason=error.problem)
    levels = {drift.name: drift.level for drift in measures}
    if get_most_severe_level(measures) != "shifted":
        return Night(day, None, levels, STABLE, f"version {version.name} has not drifted")
    warm_start = _find_promoted_run(version)
    log.info(f"version {version.name} has drifted: training from the weights of {warm_start or 'the backbone'}")
    return Night(day, warm_start, levels, reason=f"version {version.name} has drifted")


def _find_promoted_run(version: StoragePath) -> str | None:
    """Return the output_dir of the run that was promoted to a version; None if it is unknown or was deleted."""
    from trainer.promote.promotion import read_manifest

    run = read_manifest(version).get("run")
    if run and (storage_path(run) / "config.yaml").exists():
        return str(run)
    log.warning(f"{version}: its run {run or ''} does not exist; training from the initial weights of the backbone")
    return None


def _read_nights(records: StoragePath) -> list[Night]:
    files = [info.path for info in records.list(recursive=False) if info.path.name.endswith(".json")]
    return [parse_json(file.read(), parse_night, file, "delete it to begin that night again") for file in files]


def _write_night(records: StoragePath, night: Night) -> None:
    (records / f"{night.day}.json").write(encode_json(asdict(night)))


def train(settings: Settings, night: Night) -> int:
    """Start or resume a night's run in a child process, and return the exit code of the process.

    The exit code is negative if a signal ended the process. SIGTERM is forwarded to the process, so that it saves a
    checkpoint. SIGINT is ignored here, because a terminal also sends Ctrl-C to the child process.
    """
    command = [sys.executable, "-m", "trainer", *settings.overrides]
    command.append(f"output_dir={quote_if_needed(f'{settings.runs}/{night.day}')}")
    if night.warm_start:
        command.append(f"warm_start={quote_if_needed(night.warm_start)}")
    processes: list[subprocess.Popen[bytes]] = []  # empty until the process exists
    received_signals: list[int] = []

    def forward(signum: int, _frame: object) -> None:
        received_signals.append(signum)
        for process in processes:
            process.send_signal(signum)

    signal.signal(signal.SIGTERM, forward)
    sigint_handler = signal.signal(signal.SIGINT, lambda _signum, _frame: None)
    try:
        processes.append(subprocess.Popen(command))
        if received_signals:  # `forward` may have been called before `processes` had the process
            processes[0].send_signal(received_signals[0])
        return processes[0].wait()
    finally:
        signal.signal(signal.SIGINT, sigint_handler)
        exit_on_sigterm()


def _describe_failure(settings: Settings, day: str, code: int, runtime: Runtime) -> TrainerError:
    """Return the error for a failed run, with its termination message, or with its exit code if it wrote none."""
    message = ""
    if runtime.termination_log and code in (BUG, WRONG_INPUT, GAVE_UP):
        with suppress(OSError):
            message = Path(runtime.termination_log).read_text(errors="replace")
    problem = message or (f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}")
    error_class = {WRONG_INPUT: DataError, GAVE_UP: GaveUp}.get(code, TrainerError)
    return error_class(f"{settings.runs}/{day}: {problem}", fix="read its log")


@contextmanager
def _serve_monitoring(runtime: Runtime) -> Iterator[None]:
    """Serve `/healthz` and `/metrics` on `runtime.http_port` in this block. A training run serves its own."""
    if not runtime.http_port:
        yield
        return
    server = serve(runtime.http_port, health, run_label="")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
