"""The output folder of a run: new, resumed, or finished."""

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

LOCK = ".lock"  # in a local folder; the process that trains into it holds its flock


@dataclass
class RunFolder:
    """An output folder that this process has locked."""

    path: Path  # where the run writes; for a bucket, a cache folder that is published to `address`
    address: str  # as the user gave it
    resuming: bool  # it contains this run
    lock: TextIO | None  # None on workers other than the chief
    publisher: Publisher
    config: RequestedConfig  # of the run; when resuming, with the values that it chose for `auto`

    def record(self, config: RequestedConfig) -> None:
        """Write config.yaml: from now on the folder belongs to this run."""
        write_whole(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    def note_start(self, facts: dict[str, Any], fingerprint: str, workers: dict[str, Any]) -> None:
        """Add this start to run.json; the facts of the first start are not replaced.

        Raises DataError if the data differs from the data of the first start.
        """
        run = read_facts(self.path)
        check_fingerprint(self.address, run, fingerprint)
        start = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "command": ["python", "-m", "trainer", *sys.argv[1:]],
            "python": platform.python_version(),
            "versions": versions(),
            "git": _git_commit(),
        }
        starts = [*run.get("attempts", []), start | workers]
        update_facts(self.path, facts | run | {"data_fingerprint": fingerprint, "attempts": starts})


def read_facts(folder: Path) -> dict[str, Any]:
    """Contents of run.json in a run's folder; empty if it does not exist."""
    file = folder / "run.json"
    return json.loads(file.read_text()) if file.exists() else {}


def last_command(folder: Path) -> str:
    """The shell command of the last start of a run."""
    return shlex.join(read_facts(folder)["attempts"][-1]["command"])


def update_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Update run.json with `facts`."""
    write_json(folder / "run.json", read_facts(folder) | facts)


def versions() -> dict[str, str]:
    """Versions of the packages that determine the bits of a run."""
    return {"kubetune": trainer.__version__} | {name: version(name) for name in ("tensorflow", "keras", "numpy")}


def source_digest() -> str:
    """16 hex digits over the package's Python files, which differ between container images of one version."""
    digest, package = hashlib.sha256(), Path(trainer.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _git_commit() -> str | None:
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
    stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}" + (f"-{name}" if name else "")
    for i in range(1, 1000):
        folder = Path("outputs") / (stamp if i == 1 else f"{stamp}-{i}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot create {folder}: {error.strerror}", fix="give output_dir=FOLDER") from None
    raise ConfigError("outputs/ has a thousand runs of this second", fix="give output_dir=FOLDER")


def _hold(folder: Path, workers: int) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")  # noqa: SIM115  held until the process ends
    except OSError as error:
        problem, fix = f"cannot be written to ({error.strerror})", "give a folder with write permission"
        raise ConfigError(problem, key="output_dir", value=folder, fix=fix) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        problem = f"another process ({lock.read().strip() or 'unknown'}) is training into it"
        kind = Interrupted if workers > 1 else ConfigError
        raise kind(problem, key="output_dir", value=folder, fix="give another folder or wait until it ends") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def holder_of_folder(config: RequestedConfig) -> str | None:
    """The process that trains into output_dir, by its lock or lease (DataError: unreadable), or None. Read-only."""
    folder = storage_path(config.output_dir or "")
    if not folder.is_local:
        return holder_of(folder, os.environ.get("JOB_UID") or None)
    file = Path(str(folder)) / LOCK
    try:
        with open(file) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once
    except BlockingIOError:
        return file.read_text().strip() or "another process"
    except OSError:
        return None
    return None


def open_run_folder(config: RequestedConfig, workers: int = 1) -> RunFolder:
    """Lock the folder `config.output_dir`, or a new one under outputs/.

    Raises:
        ConfigError: another run or process uses it, it has other files, or `resume` forbids it.
        Interrupted: with several workers, another process uses it, probably an earlier pod of the same Job.
    """
    address = config.output_dir or str(_fresh_folder(config.experiment_name))
    remote, path = storage_path(address) if is_remote(address) else None, _local_folder(config, address)
    lock, lease = _hold(path, workers), None
    if remote:  # a pod of the same Kubernetes Job (JOB_UID) gets the lease at once
        pod = os.environ.get("HOSTNAME") or platform.node()
        lease = take_lease(remote, f"process {os.getpid()} on {pod}", os.environ.get("JOB_UID") or None)
    publisher = Publisher(path, remote, lease)
    try:
        publisher.fetch()
        record, names = path / "config.yaml", [p.name for p in path.iterdir()]
        begun = check_folder(config, address, names, record.read_text() if record.exists() else None)
        folder = RunFolder(path, address, begun is not None, lock, publisher, begun or config)
        if begun is not None:
            (path / "DONE").unlink(missing_ok=True)  # a finished run is extended
        if begun is not None or isinstance(config, RunConfig):  # else `resolve_auto_once` records it
            folder.record(folder.config)
        return folder
    except BaseException:
        publisher.close(publish=False)
        raise


def check_folder(config: RequestedConfig, address: str, names: Iterable[str], record: str | None) -> RunConfig | None:
    """The configuration with which a run resumes in its output_dir; None if it begins there.

    Args:
        names: of the files in the folder.
        record: its config.yaml, if it exists.

    Raises:
        ConfigError: the folder has another run or other files, or `resume` forbids it.
    """
    if record is None:
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
    return check_same_run(config, load_resolved(read_config(record)), address)


def inspect_folder(config: RequestedConfig) -> tuple[RunConfig | None, dict[str, Any]]:
    """The result of `check_folder` for an output_dir, and its run.json, empty if it does not exist. Read-only."""
    folder = storage_path(config.output_dir or "")
    names = {child.name for child in [*(info.path for info in folder.list(recursive=False)), *folder.folders()]}
    if not folder.is_local:  # `Publisher.fetch` leaves these out
        names = {n for n in names if not n.startswith(".") and n not in ("DONE", "report", "export")}
    record, facts = (folder / "config.yaml").fetch(), (folder / "run.json").fetch()
    begun = check_folder(config, str(config.output_dir), names, record[0].decode() if record else None)
    return begun, json.loads(facts[0]) if facts else {}


def check_fingerprint(address: str, facts: dict[str, Any], fingerprint: str) -> None:
    """Raise a DataError unless the run with this run.json began with the same data."""
    before = facts.get("data_fingerprint", fingerprint)
    if before != fingerprint:
        problem = f"was trained on other data (fingerprint {before}, now {fingerprint})"
        fix = "give another folder, or the data of its first start"
        raise DataError(problem, key="output_dir", value=address, fix=fix)


def check_same_run(config: RequestedConfig, before: RunConfig, address: str) -> RunConfig:
    """Return `config` with the values that `before` chose for `auto`. Raises ConfigError if it is another run."""
    config, _ = resolve_auto(config, begun=before)
    if changed := differences(before, config):
        problem = "\n".join(["holds a run with another configuration:", *(f"  {line}" for line in changed)])
        raise ConfigError(problem, key="output_dir", value=address, fix="give another folder, or the same values")
    return config


def is_finished(config: RequestedConfig) -> bool:
    """Return whether `config.output_dir` contains this run, finished. Read-only."""
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
    """The run is already finished."""


def require_unfinished(config: RequestedConfig) -> None:
    """Raise `Finished` if the run is finished."""
    if is_finished(config):
        folder = config.output_dir
        raise Finished(f"{folder} is finished already (it holds DONE); its report is {folder}/report/index.html")


def require_output_dir(config: RequestedConfig, workers: int) -> None:
    """Raise a ConfigError for several workers without an output_dir."""
    if workers > 1 and not config.output_dir:
        raise ConfigError("several workers need one", key="output_dir", fix="give a folder that outlives the workers")


def follow_run_folder(config: RequestedConfig) -> RunFolder:
    """The folder on a worker other than the chief, which does not access it."""
    address = config.output_dir or ""
    path = _local_folder(config, address)
    return RunFolder(path, address, False, None, Publisher(path, None, None), config)


def _local_folder(config: RequestedConfig, address: str) -> Path:
    """The folder that a run writes into: output_dir, or a cache folder for one in a bucket."""
    if not is_remote(address):
        return Path(address).expanduser()
    return config.runtime.cache_folder / "runs" / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]


def resolve_auto_once(
    config: RequestedConfig, folder: RunFolder, control: ControlChannel, dataset: Dataset
) -> tuple[RunConfig, list[str]]:
    """Resolve `auto` values as this run did before, or by the advice table; also return a reason for each."""

    def choose() -> tuple[dict[str, Any], list[str]]:
        begun = folder.config if folder.resuming and isinstance(folder.config, RunConfig) else None
        images, classes = dataset.splits["train"].count, len(dataset.class_names)
        chosen, reasons = resolve_auto(config, images, classes, begun)
        if begun is None:
            folder.record(chosen)
        return chosen.model_dump(mode="json"), reasons

    if isinstance(config, RunConfig):
        return config, []
    choice, reasons = control.broadcast("advice", choose)
    for reason in reasons:
        log.info(reason)
    return resolve_auto(config, begun=RunConfig.model_validate(choice))[0], reasons
