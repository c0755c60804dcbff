"""The output folder of a run: new, to be resumed, or finished."""

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

LOCK = ".lock"  # in a folder of this machine, held with flock by the process that trains into it


@dataclass
class RunFolder:
    """An output folder held by this process."""

    path: Path  # the run writes here; of an output_dir in a bucket a folder in the cache, published to `address`
    address: str  # as the user gave it
    resuming: bool  # a run was here before
    lock: TextIO | None  # None on a worker that is not the chief
    publisher: Publisher
    config: RequestedConfig  # of the run; where it began before, with the values it chose then for `auto`

    def record(self, config: RequestedConfig) -> None:
        """Write config.yaml: from now on the folder holds this run."""
        write_whole(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    def note_start(self, facts: dict[str, Any], fingerprint: str, workers: dict[str, Any]) -> None:
        """Write run.json: the facts of the first start stay, every attempt is added.

        Raises:
            DataError: the data is not what the run began with.
        """
        run = read_facts(self.path)
        check_fingerprint(self.address, run, fingerprint)
        attempts = [*run.get("attempts", []), _attempt() | workers]
        note_facts(self.path, facts | run | {"data_fingerprint": fingerprint, "attempts": attempts})


def read_facts(folder: Path) -> dict[str, Any]:
    """Contents of run.json in a run's folder; empty where there is none yet."""
    file = folder / "run.json"
    return json.loads(file.read_text()) if file.exists() else {}


def started_with(folder: Path) -> str:
    """The shell command of the last start of a run."""
    return shlex.join(read_facts(folder)["attempts"][-1]["command"])


def note_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Update run.json with `facts`."""
    write_json(folder / "run.json", read_facts(folder) | facts)


def _attempt() -> dict[str, Any]:
    """This process: when, where and with which versions."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "command": ["python", "-m", "trainer", *sys.argv[1:]],
        "python": platform.python_version(),
        "versions": versions(),
        "git": _git_commit(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide the bits of a run."""
    return {"kubetune": trainer.__version__} | {name: version(name) for name in ("tensorflow", "keras", "numpy")}


def source_digest() -> str:
    """16 hex digits over the package's own Python files: two container images of one version may still differ."""
    digest, package = hashlib.sha256(), Path(trainer.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _git_commit() -> str | None:
    if built_from := os.environ.get("KUBETUNE_REVISION"):  # an image holds no .git
        return built_from
    here = Path(trainer.__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
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
            raise ConfigError(f"cannot create {folder}: {error.strerror}; give output_dir=FOLDER") from None
    raise ConfigError("outputs/ holds a thousand runs of this second; give output_dir=FOLDER")


def _hold(folder: Path, workers: int) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")  # noqa: SIM115  held until the process ends
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: cannot be written to ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        kind = Interrupted if workers > 1 else ConfigError
        raise kind(
            f"output_dir={folder}: another process ({lock.read().strip() or 'unknown'}) is training into it; "
            "give another output_dir or wait until it ends"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def holder_of_folder(config: RequestedConfig) -> str | None:
    """The process that trains into output_dir, by its lock or lease; None where there is none. Changes nothing.

    Raises:
        DataError: the lease cannot be read.
    """
    there = storage_path(config.output_dir or "")
    if not there.is_local:
        return holder_of(there, os.environ.get("JOB_UID") or None)
    file = Path(str(there)) / LOCK
    try:
        with open(file) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
    except BlockingIOError:
        return file.read_text().strip() or "another process"
    except OSError:
        return None
    return None


def open_run_folder(config: RequestedConfig, workers: int = 1) -> RunFolder:
    """Take the folder that `config.output_dir` names, or a new one under outputs/.

    Raises:
        ConfigError: it belongs to another run, to another process, to no run at all, or `resume` forbids it.
        Interrupted: one of several workers finds another process there: most likely its own predecessor on a node
            that hangs, which is not for long.
    """
    address = config.output_dir or str(_fresh_folder(config.experiment_name))
    remote, path = storage_path(address) if is_remote(address) else None, _local_folder(config, address)
    lock, lease = _hold(path, workers), None
    if remote:  # the same Kubernetes Job (JOB_UID) takes the lease over at once from a pod that is gone
        pod = os.environ.get("HOSTNAME") or platform.node()
        lease = take_lease(remote, f"process {os.getpid()} on {pod}", os.environ.get("JOB_UID") or None)
    publisher = Publisher(path, remote, lease)
    try:
        publisher.fetch()
        record, names = path / "config.yaml", [p.name for p in path.iterdir()]
        begun = check_folder(config, address, names, record.read_text() if record.exists() else None)
        folder = RunFolder(path, address, begun is not None, lock, publisher, begun or config)
        if begun is not None:
            (path / "DONE").unlink(missing_ok=True)  # a finished run that is made longer
        if begun is not None or isinstance(config, RunConfig):  # else there is no run before what is `auto` is chosen
            folder.record(folder.config)
        return folder
    except BaseException:
        publisher.close(publish=False)
        raise


def check_folder(config: RequestedConfig, address: str, names: Iterable[str], record: str | None) -> RunConfig | None:
    """The configuration with which a run resumes in the folder of its output_dir; None where it begins there.

    Args:
        names: of the files in the folder.
        record: its config.yaml; None: there is none.

    Raises:
        ConfigError: the folder belongs to another run, to none, or `resume` forbids it.
    """
    if record is None:
        others = sorted(set(names) - {LOCK, "config.yaml"})
        if config.resume == "must":
            raise ConfigError(f"resume=must, but output_dir={address} holds no run")
        if others:
            raise ConfigError(f"output_dir={address} is not empty and holds no run ({others[0]}); give an empty folder")
        return None
    if config.resume == "never":
        raise ConfigError(f"resume=never, but output_dir={address} holds a run; give another output_dir or resume=auto")
    return of_one_run(config, load_resolved(read_config(record)), address)


def inspect_folder(config: RequestedConfig) -> tuple[RunConfig | None, dict[str, Any]]:
    """`check_folder` for the output_dir of a configuration, which is only read, and its run.json (empty: none).

    Raises:
        ConfigError: as `check_folder`.
    """
    there = storage_path(config.output_dir or "")
    names = {child.name for child in [*(entry.path for entry in there.list(recursive=False)), *there.folders()]}
    if not there.is_local:  # markers, and what is made at the end, are not fetched
        names = {n for n in names if not n.startswith(".") and n not in ("DONE", "report", "export")}
    record, facts = (there / "config.yaml").fetch(), (there / "run.json").fetch()
    begun = check_folder(config, str(config.output_dir), names, record[0].decode() if record else None)
    return begun, json.loads(facts[0]) if facts else {}


def check_fingerprint(address: str, facts: dict[str, Any], fingerprint: str) -> None:
    """Raise a DataError unless the data is what the run with this run.json began with."""
    before = facts.get("data_fingerprint", fingerprint)
    if before != fingerprint:
        raise DataError(
            f"{address} was trained on other data (fingerprint {before}, now {fingerprint}); "
            "give another output_dir, or the data it began with"
        )


def of_one_run(config: RequestedConfig, before: RunConfig, address: str) -> RunConfig:
    """`config`, with the values that the run that began as `before` chose for `auto`.

    Raises:
        ConfigError: it is another run.
    """
    config, _ = resolve_auto(config, begun=before)
    changed = differences(before, config)
    if changed:
        raise ConfigError(
            f"output_dir={address} holds a run with another configuration; give another one, or the same values:\n"
            + "\n".join(f"  {line}" for line in changed)
        )
    return config


def is_finished(config: RequestedConfig) -> bool:
    """True if `config.output_dir` holds this run, finished. Only reads."""
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
    """The run is finished already."""


def require_unfinished(config: RequestedConfig) -> None:
    """Raise `Finished` where the run is finished."""
    if is_finished(config):
        folder = config.output_dir
        raise Finished(f"{folder} is finished already (it holds DONE); its report is {folder}/report/index.html")


def require_output_dir(config: RequestedConfig, workers: int) -> None:
    """Raise a ConfigError where several workers have no folder that names their run."""
    if workers > 1 and not config.output_dir:
        raise ConfigError("several workers need output_dir=..., a folder that names the run and outlives its workers")


def follow_run_folder(config: RequestedConfig) -> RunFolder:
    """The same folder on a worker that is not the chief: it neither reads nor writes there, and may not even see it."""
    address = config.output_dir or ""
    path = _local_folder(config, address)
    return RunFolder(path, address, False, None, Publisher(path, None, None), config)


def _local_folder(config: RequestedConfig, address: str) -> Path:
    """The folder a run writes into: output_dir itself, or one in the cache where that is in a bucket."""
    if not is_remote(address):
        return Path(address).expanduser()
    return config.runtime.cache_folder / "runs" / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]


def resolve_auto_once(
    config: RequestedConfig, folder: RunFolder, control: ControlChannel, dataset: Dataset
) -> tuple[RunConfig, list[str]]:
    """Resolve `auto` values on the chief, as when this run began or by the advice table, and give the reasons."""

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
