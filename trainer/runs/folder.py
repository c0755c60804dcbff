"""The output_dir of a run: lock it, decide whether the run begins, resumes or is finished, and record its starts."""

import datetime
import fcntl
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import yaml

import trainer
from trainer.cluster.control import ControlChannel
from trainer.config.auto import resolve_auto
from trainer.config.diff import differences
from trainer.config.schema import RequestedConfig, RunConfig, load_resolved, read_config
from trainer.errors import ConfigError, DataError, Interrupted
from trainer.monitoring.log import log
from trainer.runs.publisher import Publisher
from trainer.storage.lease import holder_of
from trainer.storage.lease import take as take_lease
from trainer.storage.local import write_json, write_whole
from trainer.storage.path import storage_path
from trainer.storage.staging import is_remote
from trainer.types import Dataset

LOCK = ".lock"  # file in a local folder, on which the process that trains into it holds a flock


@dataclass
class RunFolder:
    """The output_dir of this run, which the chief has locked; other workers do not access it."""

    path: Path  # the local folder; for a bucket, a cache folder that is published to `address`
    address: str  # output_dir as the user gave it, or a new folder under outputs/
    resuming: bool  # the folder has an earlier start of this run; always False on workers other than the chief
    lock: TextIO | None  # the open lock file; None on workers other than the chief
    publisher: Publisher
    config: RequestedConfig  # when resuming, with the values that the run chose for `auto`

    def write_config(self, config: RequestedConfig) -> None:
        """Write config.yaml, which marks the folder as that of this run."""
        write_whole(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    def record_start(self, run_fields: dict[str, Any], fingerprint: str, start_fields: dict[str, Any]) -> None:
        """Add this start to run.json: `start_fields` with versions, host and command; at the first start `run_fields`.

        Raises DataError if the fingerprint of the data differs from that of the first start.
        """
        run_json = read_run_json(self.path)
        check_fingerprint(self.address, run_json, fingerprint)
        start = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "command": ["python", "-m", "trainer", *sys.argv[1:]],
            "python": platform.python_version(),
            "versions": versions(),
            "git": _git_commit(),
        }
        starts = [*run_json.get("attempts", []), start | start_fields]
        update_run_json(self.path, run_fields | run_json | {"data_fingerprint": fingerprint, "attempts": starts})


def read_run_json(folder: Path) -> dict[str, Any]:
    """Read run.json in the folder of a run; empty if it does not exist."""
    file = folder / "run.json"
    return json.loads(file.read_text()) if file.exists() else {}


def last_command(folder: Path) -> str:
    """Return the shell command of the last start of a run."""
    return shlex.join(read_run_json(folder)["attempts"][-1]["command"])


def update_run_json(folder: Path, fields: dict[str, Any]) -> None:
    """Add or replace fields of run.json."""
    write_json(folder / "run.json", read_run_json(folder) | fields)


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine the bits of a run."""
    return {"kubetune": trainer.__version__} | {name: version(name) for name in ("tensorflow", "keras", "numpy")}


def source_digest() -> str:
    """Hash the package's Python files to 16 hex digits; they can differ between container images of one version."""
    digest, package = hashlib.sha256(), Path(trainer.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _git_commit() -> str | None:
    """Return KUBETUNE_REVISION or the git commit of the package; None if neither is available."""
    if revision := os.environ.get("KUBETUNE_REVISION"):  # a container image has no .git
        return revision
    package = Path(trainer.__file__).parent
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return git.stdout.strip() or None


def _fresh_folder(name: str | None) -> Path:
    """Create a new folder under outputs/, named after the time and the experiment."""
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}" + (f"-{name}" if name else "")
    for number in range(1, 1000):
        folder = Path("outputs") / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot create {folder}: {error.strerror}", fix="give output_dir=FOLDER") from None
    raise ConfigError("outputs/ already has 999 runs that started in this second", fix="give output_dir=FOLDER")


def _lock_folder(folder: Path, workers: int) -> TextIO:
    """Create a local folder, and lock it until the process ends or the returned file is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")  # noqa: SIM115 - locked until the process ends
    except OSError as error:
        problem, fix = f"cannot be written to ({error.strerror})", "give a folder with write permission"
        raise ConfigError(problem, key="output_dir", value=folder, fix=fix) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        problem = f"is in use by another run ({lock.read().strip() or 'unknown process'})"
        kind = Interrupted if workers > 1 else ConfigError  # an earlier pod of the Job may be about to end
        raise kind(problem, key="output_dir", value=folder, fix="give another folder or wait until it ends") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def holder_of_folder(config: RequestedConfig) -> str | None:
    """Describe the process that has locked output_dir or holds its lease; None if there is none. Write nothing."""
    folder = storage_path(config.output_dir or "")
    if not folder.is_local:
        return holder_of(folder, os.environ.get("JOB_UID") or None)
    file = Path(str(folder)) / LOCK
    try:
        with open(file) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
    except BlockingIOError:
        return file.read_text().strip() or "another process"
    except OSError:
        return None
    return None


def open_run_folder(config: RequestedConfig, workers: int = 1) -> RunFolder:
    """Lock `config.output_dir` or a new folder under outputs/, and determine whether this run resumes in it.

    If output_dir is in a bucket, take its lease and download the run. Only the chief calls this.

    Raises:
        ConfigError: another process uses the folder, it has another run or other files, or `resume` forbids it.
        Interrupted: with several workers, another process has locked the local folder, perhaps an earlier pod of this
            Job; or the bucket does not respond.
    """
    address = config.output_dir or str(_fresh_folder(config.experiment_name))
    path = _local_folder(config, address)
    lock, lease = _lock_folder(path, workers), None
    if is_remote(address):  # a pod of the same Kubernetes Job (JOB_UID) takes over the lease without waiting
        holder = f"process {os.getpid()} on {os.environ.get('HOSTNAME') or platform.node()}"
        lease = take_lease(storage_path(address), holder, os.environ.get("JOB_UID") or None)
    publisher = Publisher(path, lease)
    try:
        publisher.fetch()
        file, names = path / "config.yaml", [p.name for p in path.iterdir()]
        resumed = check_folder(config, address, names, file.read_text() if file.exists() else None)
        folder = RunFolder(path, address, resumed is not None, lock, publisher, resumed or config)
        if resumed is not None:
            (path / "DONE").unlink(missing_ok=True)  # a finished run is extended
        if resumed is not None or isinstance(config, RunConfig):  # else `resolve_auto_once` writes it
            folder.write_config(folder.config)
        return folder
    except BaseException:
        publisher.close(publish=False)
        raise


def check_folder(config: RequestedConfig, address: str, names: Iterable[str], text: str | None) -> RunConfig | None:
    """Return the configuration with which a run resumes in its output_dir; None if a new run begins there.

    `names` are the files and folders in it, and `text` is its config.yaml, None if there is none. Raises ConfigError
    if the folder has another run or other files, or `resume` forbids it.
    """
    if text is None:
        others = sorted(set(names) - {LOCK, "config.yaml"})
        if config.resume == "must":
            problem, fix = f"output_dir={address} holds no run", "give the output_dir of a run, or resume=auto"
            raise ConfigError(problem, key="resume", value="must", fix=fix)
        if others:
            problem, fix = f"is not empty and holds no run ({others[0]})", "give an empty folder"
            raise ConfigError(problem, key="output_dir", value=address, fix=fix)
        return None
    if config.resume == "never":
        problem, fix = f"output_dir={address} holds a run", "give another output_dir, or resume=auto"
        raise ConfigError(problem, key="resume", value="never", fix=fix)
    return check_same_run(config, load_resolved(read_config(text)), address)


def inspect_folder(config: RequestedConfig) -> tuple[RunConfig | None, dict[str, Any]]:
    """Read the configuration with which a run would resume (None: a new run) and run.json (empty: none); write nothing.

    Raises the error of `check_folder`.
    """
    folder = storage_path(config.output_dir or "")
    names = {child.name for child in [*(info.path for info in folder.list(recursive=False)), *folder.folders()]}
    if not folder.is_local:  # without the files that `fetch_run` does not download
        names = {n for n in names if not n.startswith(".") and n not in ("DONE", "report", "export")}
    text, run_json = (folder / "config.yaml").fetch(), (folder / "run.json").fetch()
    resumed = check_folder(config, str(config.output_dir), names, text[0].decode() if text else None)
    return resumed, json.loads(run_json[0]) if run_json else {}


def check_fingerprint(address: str, run_json: dict[str, Any], fingerprint: str) -> None:
    """Raise a DataError if the run with this run.json began with data of another fingerprint."""
    first = run_json.get("data_fingerprint", fingerprint)
    if first != fingerprint:
        problem = f"was trained on other data (fingerprint {first}, now {fingerprint})"
        fix = "give another folder, or the data of its first start"
        raise DataError(problem, key="output_dir", value=address, fix=fix)


def check_same_run(config: RequestedConfig, before: RunConfig, address: str) -> RunConfig:
    """Return `config` with the values that the run in the folder chose for `auto`.

    Raises ConfigError if its configuration `before` differs in a value that a resumed run cannot change.
    """
    config, _ = resolve_auto(config, begun=before)
    if changed := differences(before, config):
        problem = "\n".join(["holds a run with another configuration:", *(f"  {line}" for line in changed)])
        raise ConfigError(problem, key="output_dir", value=address, fix="give another folder, or the same values")
    return config


def is_finished(config: RequestedConfig) -> bool:
    """Return whether `config.output_dir` contains this run, finished and with the same length. Write nothing."""
    if not config.output_dir or config.resume == "never":
        return False
    folder = storage_path(config.output_dir)
    if not (folder / "DONE").exists():
        return False
    before = load_resolved(read_config((folder / "config.yaml").read_text()))
    config, _ = resolve_auto(config, begun=before)
    same_length = before.phases == config.phases and before.debug.max_steps == config.debug.max_steps
    return same_length and not differences(before, config)


class Finished(Exception):
    """The run is finished already, so the process ends with exit code 0."""


def require_unfinished(config: RequestedConfig) -> None:
    """Raise `Finished` if the run is finished."""
    if is_finished(config):
        folder = config.output_dir
        raise Finished(f"{folder} is finished already (it holds DONE); its report is {folder}/report/index.html")


def require_output_dir(config: RequestedConfig, workers: int) -> None:
    """Raise a ConfigError if several workers have no output_dir."""
    if workers > 1 and not config.output_dir:
        raise ConfigError("is required with several workers", key="output_dir", fix="give a folder that outlives them")


def follow_run_folder(config: RequestedConfig) -> RunFolder:
    """Describe the folder on a worker other than the chief, without accessing it."""
    address = config.output_dir or ""
    path = _local_folder(config, address)
    return RunFolder(path, address, resuming=False, lock=None, publisher=Publisher(path, None), config=config)


def _local_folder(config: RequestedConfig, address: str) -> Path:
    """Return the local folder of a run: output_dir, or a cache folder if that is in a bucket."""
    if not is_remote(address):
        return Path(address).expanduser()
    return config.runtime.cache_folder / "runs" / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]


def resolve_auto_once(
    config: RequestedConfig, folder: RunFolder, control: ControlChannel, dataset: Dataset
) -> tuple[RunConfig, list[str]]:
    """Resolve `auto` values on the chief as an earlier start of this run did, or else for the dataset.

    All workers call this and get the same configuration, with a reason for each value that was chosen. The chief writes
    config.yaml of a new run.
    """

    def choose() -> tuple[dict[str, Any], list[str]]:
        resumed = folder.config if folder.resuming and isinstance(folder.config, RunConfig) else None
        images, classes = dataset.splits["train"].count, len(dataset.class_names)
        chosen, reasons = resolve_auto(config, images, classes, resumed)
        if resumed is None:
            folder.write_config(chosen)
        return chosen.model_dump(mode="json"), reasons

    if isinstance(config, RunConfig):
        return config, []
    choice, reasons = control.broadcast("advice", choose)
    for reason in reasons:
        log.info(reason)
    return resolve_auto(config, begun=RunConfig.model_validate(choice))[0], reasons
