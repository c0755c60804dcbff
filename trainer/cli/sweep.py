"""Run sweeps: several runs, called jobs, from one command line, each in a separate process.

Hydra chooses the values, as a grid of all combinations or by an Optuna search, and calls `Sweep.run` for each job.
In a Kubernetes Indexed Job, each pod trains one job of a grid instead (`select_job`).
"""

from __future__ import annotations

import io
import re
import shlex
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from trainer.cli.compose import compose, load_and_require_read, requests_sweep, resolve
from trainer.cli.overrides import evaluate_override, format_override, parse_override, translate_overrides
from trainer.cli.process import configure_log
from trainer.cluster.processes import build_module_command
from trainer.config.diff import flatten, may_change_on_resume
from trainer.config.schema import apply_overfit
from trainer.config.typed import INTERPOLATION, format_argument, quote, quote_if_needed
from trainer.errors import DONE, INTERRUPTED, WRONG_INPUT, ConfigError, Interrupted, TrainerError, format_count
from trainer.monitoring import termination
from trainer.monitoring.log import log
from trainer.private_api import is_grid, make_session_end_summary
from trainer.runs.folder import inspect_folder, is_finished
from trainer.storage.base import StoragePath
from trainer.storage.local import LocalPath, delete_temporary_files
from trainer.storage.path import storage_path
from trainer.storage.small_files import read_json
from trainer.storage.staging import is_remote

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

METRICS = {"val_accuracy": "validation accuracy", "test_accuracy": "test accuracy"}  # metric -> name in TensorBoard
OBJECTIVE = "val_accuracy"  # metric that a search maximizes
SEEDS = ("seed", "data.split_seed")  # scores of jobs that differ only in these keys are averaged
EVENT_FILE = "events.out.tfevents.hparams"  # TensorBoard searches for "tfevents" in file names
Value = bool | int | float | str  # type of a hyperparameter's value


def serialize_columns(names: list[str]) -> bytes:
    """Serialize a sweep's event file. TensorBoard shows the hyperparameters `names` and `METRICS` as columns."""
    from tensorboard.plugins.hparams import summary_v2

    hparams = [summary_v2.HParam(name) for name in names]
    metrics = [summary_v2.Metric(tag, display_name=name) for tag, name in METRICS.items()]
    return _serialize_events([summary_v2.hparams_config_pb(hparams, metrics)])


def serialize_job(name: str, hparams: dict[str, Value], scores: dict[str, float], succeeded: bool) -> bytes:
    """Serialize a job's event file, which becomes a row of TensorBoard's table.

    Args:
        name: the job's name.
        hparams: hyperparameter (a key or config group) -> value.
        scores: metric in `METRICS` -> score; empty for a failed job.
        succeeded: whether the job ended with exit code 0.
    """
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
    now = time.time()
    end_summary = make_session_end_summary(plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=now))
    start_summary = summary_v2.hparams_pb(hparams, trial_id=name, start_time_secs=now)
    return _serialize_events([start_summary, *(scalar_pb(tag, score) for tag, score in scores.items()), end_summary])


def _serialize_events(summaries: list[Summary]) -> bytes:
    """Serialize an event file without TensorFlow, whose import takes seconds."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    now = time.time()
    writer = RecordWriter(file)
    for event in [Event(file_version="brain.Event:2"), *(Event(summary=summary) for summary in summaries)]:
        event.wall_time = now
        writer.write(event.SerializeToString())
    return file.getvalue()


def extract_scores(report: Any) -> dict[str, float]:
    """Extract a job's scores from its parsed report.json, as a dict {metric in `METRICS`: score}.

    "val_accuracy" is the last phase's validation accuracy. "test_accuracy" is omitted if the data has no test split.
    """
    scores = {OBJECTIVE: float(list(report["phases"].values())[-1]["val_accuracy"])}
    if report["test"]["split"] == "test":
        scores["test_accuracy"] = float(report["test"]["accuracy"])
    return scores


class SweepEnded(BaseException):
    """Raised to end the sweep with `error`. A BaseException, because Hydra treats an `Exception` as a failed job."""

    def __init__(self, error: Exception) -> None:
        self.error = error


@dataclass
class Job:
    """One run of a sweep."""

    name: str
    folder: str  # the run's output_dir
    arguments: list[str]  # command-line arguments, except sweep=... and output_dir=...
    overrides: dict[str, str]  # key -> value in `arguments`: {"seed": "1", ...}
    exit_code: int = DONE  # exit code of the job's process
    scores: dict[str, float] = field(default_factory=dict)  # metric in METRICS -> score; empty for a failed job

    @property
    def command(self) -> list[str]:
        """The arguments of `python -m trainer` that train this job alone."""
        return [*self.arguments, f"output_dir={quote_if_needed(self.folder)}"]


def make_job(tree: dict[str, Any], overrides: list[str], folder: str | None, name: str) -> Job:
    """Make a job from its resolved configuration `tree` and its overrides in Hydra's grammar.

    The job's folder is the output_dir in `tree`; if it is null, the subfolder `name` of the sweep's folder `folder`.

    Raises:
        ConfigError: `name`, the value of hydra.sweep.subdir, leads out of the sweep's folder.
    """
    if ".." in name.split("/") or name.startswith("/"):
        problem, fix = "leads out of the folder of the sweep", "give a name without .., such as ${hydra.job.num}"
        raise ConfigError(problem, key="hydra.sweep.subdir", value=name, fix=fix)
    arguments = [format_override(o) for o in overrides if not re.match(r"\+*(sweep|output_dir)=", o)]
    output_dir = str(tree["output_dir"] or f"{folder}/{name}")
    return Job(name, output_dir, arguments, dict(a.split("=", 1) for a in arguments if "=" in a))


@dataclass
class Sweep:
    """A sweep and its jobs so far."""

    folder: str | None  # parent of the job folders; None until the first job, if it is Hydra's hydra.sweep.dir
    jobs: list[Job] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)  # hyperparameters of all jobs so far, as an ordered set
    stop_signal: str | None = None  # name of the signal that requested the stop, such as "SIGTERM"
    is_search: bool = False  # whether the sweep is an Optuna search instead of a grid of all combinations
    swept: set[str] = field(default_factory=set)  # keys whose values differ between jobs
    child: subprocess.Popen[bytes] | None = None  # process of the current job

    def run(self, tree: DictConfig, overrides: list[str], hydra_config: Any) -> float | None:
        """Run one job, unless it is finished, in a separate process, since TensorFlow cannot be set up twice in one.

        Args:
            tree: the job's composed configuration.
            overrides: the job's overrides in Hydra's grammar.
            hydra_config: Hydra's own configuration (`HydraConf`).

        Returns:
            The last phase's validation accuracy, which a search maximizes; None if the job failed.

        Raises:
            SweepEnded: after a stop request or an interrupted job, or if an exception occurred in this process.
        """
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(signum, self._forward_stop)
        self.folder = self.folder or str(hydra_config.sweep.dir)
        self.is_search = not is_grid(hydra_config)
        self.swept |= {str(key).lstrip("+") for key in hydra_config.sweeper.get("params") or ()}
        try:
            job = self._run_job(resolve(tree), overrides, str(hydra_config.sweep.subdir))
        except Exception as error:
            raise SweepEnded(error) from None
        return job.scores.get(OBJECTIVE)

    def _run_job(self, tree: dict[str, Any], overrides: list[str], name: str) -> Job:
        """Train or resume a job unless it is finished, read its scores, and write its event files."""
        self._raise_if_stopped()
        job = make_job(tree, overrides, self.folder, name)
        config = apply_overfit(load_and_require_read(tree | {"output_dir": job.folder}, job.arguments))
        configure_log(config.runtime)
        was_finished = is_finished(config)
        if not was_finished:
            inspect_folder(config)  # raises errors of the folder here, before the job starts
        outcome = " is finished already" if was_finished else ""
        log.info(f"sweep: job {name}: {self._describe_overrides(job)} -> {job.folder}{outcome}")
        job.exit_code = DONE if was_finished else self._run_process(job.command)
        if job.exit_code == INTERRUPTED or job.exit_code < 0:
            self._raise_if_stopped()
            cause = f"by signal {-job.exit_code}" if job.exit_code < 0 else f"with exit code {INTERRUPTED}"
            raise Interrupted(f"job {name} of the sweep ended {cause}", fix=self._resume_hint())
        self.jobs.append(job)
        if job.exit_code == DONE:
            fix = f"delete {job.folder}/DONE, and start the same command again to write the report again"
            job.scores = read_json(storage_path(job.folder) / "report" / "report.json", extract_scores, fix) or {}
        self._write_events(job, tree)
        return job

    def _run_process(self, arguments: list[str]) -> int:
        """Run `python -m trainer` with these arguments in a child process, and return its exit code."""
        # In a separate process group, so that Ctrl-C reaches the process only once, through `_forward_stop`.
        command, environment = build_module_command("trainer", *arguments)
        self.child = subprocess.Popen(command, env=environment, process_group=0)
        if self.stop_signal:
            self.child.terminate()
        exit_code = self.child.wait()
        self.child = None
        return exit_code

    def _forward_stop(self, signum: int, _frame: object) -> None:
        self.stop_signal = signal.Signals(signum).name
        if self.child:
            self.child.send_signal(signal.SIGTERM)

    def _raise_if_stopped(self) -> None:
        if self.stop_signal:
            raise Interrupted(f"{self.stop_signal}: the sweep has stopped, nothing is lost", fix=self._resume_hint())

    def _resume_hint(self) -> str:
        return f"start the same command again with {format_argument('output_dir', self.folder)} to resume"

    def _write_events(self, job: Job, tree: dict[str, Any]) -> None:
        """Write the event file of a job and, if it has new hyperparameters, the event file of the sweep."""
        swept_overrides = {key: text for key, text in job.overrides.items() if key in self.swept}
        hyperparameters = {key: text for key, text in swept_overrides.items() if not may_change_on_resume(key)}
        values = {key: _get_hyperparameter(tree, key, text) for key, text in hyperparameters.items()}
        num_previous_columns, self.columns = len(self.columns), self.columns | dict.fromkeys(values)
        folder = storage_path(job.folder)
        if not (folder / "config.yaml").exists():  # the job failed early; its next start requires an empty folder
            return
        _write_event_file(folder, serialize_job(job.name, values, job.scores, job.exit_code == DONE))
        if len(self.columns) > num_previous_columns:
            _write_event_file(storage_path(self.folder or ""), serialize_columns(list(self.columns)))

    def _describe_overrides(self, job: Job) -> str:
        """Describe the overrides that differ from those of an earlier job; all overrides for the first job."""
        other_overrides = [other.overrides for other in self.jobs if other is not job]
        differences = [
            f"{key}={value}"
            for key, value in job.overrides.items()
            if any(overrides.get(key) != value for overrides in other_overrides) or not other_overrides
        ]
        return " ".join(differences) or ("as the others" if other_overrides else "no overrides")

    def _describe_seeds(self) -> list[str]:
        """Describe the mean and standard deviation over seeds, in one line per setting of the other hyperparameters."""
        jobs_by_setting: dict[tuple[str, ...], list[Job]] = {}
        for job in self.jobs if self.swept.intersection(SEEDS) else ():
            setting = tuple(f"{k}={v}" for k, v in job.overrides.items() if k in self.swept and k not in SEEDS)
            jobs_by_setting.setdefault(setting, []).append(job)
        lines = []
        for setting, jobs in jobs_by_setting.items():
            scored_jobs = [job for job in jobs if job.scores]
            if len(scored_jobs) < 2:
                continue
            summaries = []
            for metric in METRICS:
                scores = [job.scores[metric] for job in scored_jobs if metric in job.scores]
                if len(scores) == len(scored_jobs):
                    summaries.append(f"{metric} {statistics.mean(scores):.4f} \u00b1 {statistics.stdev(scores):.4f}")
            lines.append(f"{len(scored_jobs)} seeds  {', '.join(summaries)}  {' '.join(setting)}".rstrip())
        return [*lines, "(mean \u00b1 standard deviation of the runs)"] if lines else []

    def log_results(self) -> None:
        """Log the sweep's results: each job's score, the mean and standard deviation over seeds, and the best job.

        Raises TrainerError, with the first failed job's exit code, if any job of a grid or all jobs of a search failed.
        """
        scored_jobs, failed_jobs = [j for j in self.jobs if j.scores], [j for j in self.jobs if not j.scores]
        lines = [""]
        for job in self.jobs:
            outcome = f"failed (exit code {job.exit_code})" if job.exit_code else "has no report/report.json"
            score = f"{OBJECTIVE} {job.scores[OBJECTIVE]:.4f}" if job.scores else outcome
            lines.append(f"job {job.name:>3}  {score}  {self._describe_overrides(job)}")
        lines += self._describe_seeds()
        if scored_jobs:
            best = max(scored_jobs, key=lambda job: job.scores[OBJECTIVE])
            lines += [
                f"best: job {best.name}, {OBJECTIVE} {best.scores[OBJECTIVE]:.4f}, {best.folder}",
                f"  again    {shlex.join(['python', '-m', 'trainer', *best.command])}",
                f"next:  tensorboard --logdir {shlex.quote(str(self.folder))}    (HPARAMS shows the jobs side by side)",
            ]
            termination.set_success_message(lines[-3])  # the best job
        log.info("\n".join(lines))
        if failed_jobs and (not self.is_search or not scored_jobs):
            problem = (
                f"{len(failed_jobs)} of {len(self.jobs)} jobs failed ({', '.join(job.name for job in failed_jobs)})"
            )
            error = TrainerError(problem, fix="read their errors above")
            error.exit_code = failed_jobs[0].exit_code or WRONG_INPUT
            raise error


def select_job(arguments: list[str], environment: Mapping[str, str]) -> tuple[list[str], Mapping[str, str]]:
    """Select the job of a grid that this pod trains, by its number in the environment variable SWEEP_JOB.

    Each pod of an Indexed Job sets SWEEP_JOB to its completion index. Without SWEEP_JOB, both arguments are returned
    unchanged.

    Returns:
        The arguments that train this job alone, and the environment without JOB_COMPLETION_INDEX, which would otherwise
        be read as a worker index.

    Raises:
        ConfigError: SWEEP_JOB is not a number, or the arguments are not a grid that has a job of this number.
    """
    job_number = environment.get("SWEEP_JOB", "").strip()
    if not job_number:
        return arguments, environment
    if not re.fullmatch(r"[0-9]{1,6}", job_number):
        fix = "set it to the pod label batch.kubernetes.io/job-completion-index, or unset it"
        raise ConfigError("is not the number of a job", key="SWEEP_JOB", value=job_number, fix=fix)
    if not requests_sweep(arguments):
        raise ConfigError("the arguments are not a sweep", key="SWEEP_JOB", value=job_number, fix="add -m, or unset it")
    jobs = _list_jobs(arguments)
    if int(job_number) >= len(jobs):
        problem, fix = (
            f"the sweep has {format_count(len(jobs), 'job')}, from 0",
            f"set the completions of the Job to {len(jobs)}",
        )
        raise ConfigError(problem, key="SWEEP_JOB", value=job_number, fix=fix)
    job, tree = jobs[int(job_number)]
    configure_log(apply_overfit(load_and_require_read(tree | {"output_dir": job.folder}, job.arguments)).runtime)
    log.info(f"sweep: job {job.name} of {len(jobs)} -> {job.folder}")
    return job.command, {name: value for name, value in environment.items() if name != "JOB_COMPLETION_INDEX"}


def _list_jobs(arguments: list[str]) -> list[tuple[Job, dict[str, Any]]]:
    """List the jobs of a grid with their resolved configurations.

    Raises ConfigError if the sweep is a search, or output_dir is not set.
    """
    arguments, folder = _use_sweep_folder(translate_overrides(arguments, is_sweep=True))
    jobs: list[tuple[Job, dict[str, Any]]] = []

    def collect(tree: DictConfig, overrides: list[str], hydra_config: Any) -> None:
        """Add the job that Hydra has composed to `jobs`."""
        try:
            if not is_grid(hydra_config):
                problem, fix = "a search chooses each trial by earlier ones", "use a grid, or run the search in one pod"
                raise ConfigError(problem, key="SWEEP_JOB", fix=fix)
            resolved = resolve(tree)
            if not (folder or resolved["output_dir"]):
                fix = "add output_dir=gs://BUCKET/..., the folder of the sweep"
                raise ConfigError(
                    "must be given, since each pod trains one job of the sweep", key="output_dir", fix=fix
                )
            jobs.append((make_job(resolved, overrides, folder, str(hydra_config.sweep.subdir)), resolved))
        except ConfigError as error:
            raise SweepEnded(error) from None

    try:
        with tempfile.TemporaryDirectory() as scratch:  # for the files that Hydra writes, which are not used
            compose([*arguments, f"hydra.sweep.dir={quote(scratch)}"], run_job=collect)
    except SweepEnded as ended:
        raise ended.error from None
    return jobs


def compose_or_sweep(arguments: list[str]) -> dict[str, Any] | None:
    """Compose the configuration, or run the sweep that the arguments request.

    Returns:
        The resolved configuration, as plain dicts, lists and scalars; None after `--help`, `--version`, `--cfg` or a
        sweep.

    Raises:
        TrainerError: the configuration cannot be composed, or the sweep was stopped or failed.
    """
    if not requests_sweep(arguments):
        return compose(arguments)
    arguments = translate_overrides(arguments, is_sweep=True)
    if _search_space_is_empty(arguments):
        fix = "add KEY=interval(low, high) or KEY=choice(a, b), quoted for the shell, or a preset: sweep=learning_rates"
        raise ConfigError("the search has no values to search", key="hydra/sweeper", value="optuna", fix=fix)
    arguments, folder = _use_sweep_folder(arguments)
    if _list_sweepers(arguments) and not _only_prints(arguments):  # importing Optuna takes seconds
        with suppress(ImportError):  # Optuna belongs to the extra `sweep`
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)  # its INFO lines repeat the log of the jobs
    sweep = Sweep(folder, swept=_swept_keys(arguments))
    try:
        compose(arguments, run_job=sweep.run)
    except SweepEnded as ended:
        raise ended.error from None
    except ValueError:  # raised by Optuna if all jobs have failed
        if not sweep.jobs or any(job.scores for job in sweep.jobs):
            raise
    if sweep.jobs:
        sweep.log_results()
    return None


def _search_space_is_empty(arguments: list[str]) -> bool:
    """Return whether the arguments request an Optuna search without values to search, which would repeat one job."""
    sweepers = _list_sweepers(arguments)
    if not sweepers or _only_prints(arguments):
        return False
    if set(sweepers) - {"hydra/sweeper=optuna", "sweep=optuna"} or any("hydra.sweeper.params" in a for a in arguments):
        return False
    return not _swept_keys(arguments)


def _list_sweepers(arguments: list[str]) -> list[str]:
    """List the arguments that choose a sweeper other than the one for grids, or a preset of such a sweeper."""
    return [a for a in arguments if re.match(r"hydra/sweeper=|\+*sweep=", a)]


def _only_prints(arguments: list[str]) -> bool:
    """Return whether the arguments print the configuration or the help instead of running anything."""
    return bool({"--cfg", "-c", "--help"} & set(arguments))


def _swept_keys(arguments: list[str]) -> set[str]:
    """Return the keys and config groups for which an argument gives several values."""
    overrides = [parse_override(a) for a in arguments if "=" in a and not a.startswith("-")]
    return {override.key_or_group for override in overrides if override.is_sweep_override()}


def _use_sweep_folder(arguments: list[str]) -> tuple[list[str], str | None]:
    """Use output_dir as the sweep's folder if it has one value, which is the same for all jobs.

    Returns the arguments without output_dir (with hydra.sweep.dir if the folder is local), and the folder. The folder
    is None if output_dir is missing, null or different for each job; in the last case, output_dir is not removed.
    """
    folder_arguments = [a for a in arguments if re.match(r"\+*output_dir=", a)]
    if (
        not folder_arguments
        or parse_override(folder_arguments[-1]).is_sweep_override()
        or INTERPOLATION.search(folder_arguments[-1])
    ):
        return arguments, None
    other_arguments, folder = (
        [a for a in arguments if a not in folder_arguments],
        evaluate_override(folder_arguments[-1]),
    )
    if not folder:
        return other_arguments, None
    if is_remote(folder):
        return other_arguments, folder
    folder = str(Path(folder).expanduser())
    return [*other_arguments, f"hydra.sweep.dir={quote(folder)}"], folder


def _write_event_file(folder: StoragePath, content: bytes) -> None:
    """Write the event file of a job or sweep to its folder.

    Temporary files of a killed process are deleted first, because a run's start does not delete them.
    """
    if isinstance(folder, LocalPath):
        delete_temporary_files(folder.path, recursive=False)
    (folder / EVENT_FILE).write(content)


def _get_hyperparameter(tree: Any, key: str, text: str) -> Value:
    """Return a key's value in the configuration `tree`, or its override `text` if it is a group, a list or null."""
    value = flatten(tree).get(key)
    return value if isinstance(value, bool | int | float | str) else text
