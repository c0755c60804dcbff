"""A run's output_dir: lock it, decide whether the run is new, resumes or is finished, and record each start.

A start is one process of the run. The first start trains from the initial weights; later ones resume from a checkpoint.
"""

import datetime
import fcntl
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import yaml

import trainer
from trainer.cluster.control import ControlChannel
from trainer.config.auto import resolve_auto
from trainer.config.diff import ADDRESS_KEYS, INITIAL_WEIGHTS_KEYS, list_forbidden_changes, list_moved_addresses
from trainer.config.distillation import TEACHER_FOLDER
from trainer.config.schema import (
    RequestedConfig,
    RunConfig,
    derive_teacher_config,
    parse_config,
    validate_resolved_config,
)
from trainer.config.typed import format_argument
from trainer.errors import BUG, INTERRUPTED, ConfigError, DataError, Interrupted, StopRequested
from trainer.monitoring.log import log
from trainer.names import escape_unprintable, make_file_stem
from trainer.runs.checkpoints import has_checkpoints
from trainer.runs.clock import BREAKDOWN_FILE, parse_breakdown
from trainer.runs.initial_weights import check_same_weights, describe_initial_weights
from trainer.runs.publisher import DONE, LATEST, Publisher
from trainer.runs.restarts import ATTEMPTS_FILE, INCOMPLETE_STARTS_FILE, IncompleteStarts, parse_entries
from trainer.storage.base import is_temporary_name
from trainer.storage.disk import make_write_error
from trainer.storage.lease import acquire_lease, choose_max_wait, describe_holder, make_in_use_error
from trainer.storage.local import delete_temporary_files, sync, temporary_file, write_json
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import (
    read_json,
    read_json_or_default,
    rename_corrupt_file,
    require_json_object,
    require_json_objects,
)
from trainer.storage.staging import is_remote
from trainer.types import Dataset, Device, has_fingerprints, require_fingerprint

LOCK_INTERVAL_SECONDS = 0.5  # between attempts to lock a folder that another process uses
LOCK = ".lock"  # file in a local output_dir, on which the training process holds a flock
RUN_JSON = "run.json"  # records the dataset and the starts of a run
RESULTS = ("export", "report", DONE)  # files and folders that a run writes after its last step


@dataclass
class RunFolder:
    """This run's output_dir, which the chief has locked. Other workers do not access it.

    Before `record_start`, a start changes only two files in output_dir: the lock (in a bucket, the lease), and
    `.starts`, the list of starts that have not reached `record_start` (`IncompleteStarts`).
    """

    path: Path  # local folder of the run; if output_dir is in a bucket, a cache folder that is published to `address`
    address: str  # output_dir as configured, or a new folder under outputs/; OUTPUT_DIR/teacher for a teacher's run
    resuming: bool  # whether an earlier start has saved a checkpoint; always False on workers other than the chief
    lock: TextIO | None  # the open lock file; None on workers other than the chief
    publisher: Publisher
    config: RequestedConfig  # configuration of this start; if `resuming`, the run's values replace `auto`
    previous_config: RunConfig | None = None  # configuration of the last start; None if there was none or it is corrupt
    created: bool = False  # whether this process created the folder
    start_recorded: bool = False  # whether `record_start` was called; always False on workers other than the chief
    run_json: dict[str, Any] = field(default_factory=dict)  # content before `record_start`; {} if missing or corrupt
    incomplete_starts: IncompleteStarts | None = None  # the content of `.starts`; None on workers other than the chief
    student_output_dir: str | None = (
        None  # output_dir of the student that trains next; None if this is not a teacher's run
    )
    _written: dict[str, Any] = field(default_factory=dict)  # run.json as last written, if the file is corrupt

    @property
    def is_new(self) -> bool:
        """Whether there is no checkpoint, and the last start, if any, had other settings or a corrupt config.yaml."""
        return not self.resuming and (
            self.previous_config is None or bool(_list_changes(self.previous_config, self.config))
        )

    def check_data(self, dataset: Dataset) -> None:
        """Raise a DataError if the run resumes, but its first start had other data or other initial weights."""
        if self.resuming:
            check_same_data(self.address, self.run_json, dataset)
            check_same_weights(self.address, self.run_json.get("initial_weights", {}), self.config)

    def record_start(
        self, config: RunConfig, dataset: Dataset, fields_by_phase: dict[str, dict[str, Any]], fields: dict[str, Any]
    ) -> None:
        """Write config.yaml, which marks the folder as this run's, and run.json; start publishing the folder.

        Also deletes DONE, because this start may extend a finished run, deletes temporary files of killed processes,
        and renames corrupt JSON files.

        Args:
            config: the configuration to write to config.yaml.
            dataset: the dataset whose fingerprints run.json records.
            fields_by_phase: `features` and `xla` of run.json: by phase, its input, and whether its step is compiled.
            fields: other fields of run.json: `classes` and `advice` describe the run, all others describe this start.

        Raises:
            OSError: the disk is full or fails.
            Interrupted: the bucket does not respond, or the lease was lost.
        """
        self.start_recorded = True
        delete_temporary_files(self.path)
        for line in (
            list_moved_addresses(self.previous_config, config) if self.previous_config and self.resuming else ()
        ):
            log.info(f"{line}: moved, the fingerprint is the same")
        moves = (
            list_moved_addresses(self.previous_config, config, INITIAL_WEIGHTS_KEYS)
            if self.previous_config and self.resuming
            else []
        )
        for line in moves:
            log.info(f"{line}: not read, the weights are those of the checkpoint")
        with temporary_file(self.path / "config.yaml") as new_file:
            new_file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            sync(new_file)
            (self.path / DONE).unlink(missing_ok=True)  # after the write, so that DONE remains if the disk is full
            os.replace(new_file, self.path / "config.yaml")
        sync(self.path)
        for name, parse in {
            RUN_JSON: parse_run_json,
            ATTEMPTS_FILE: parse_entries,
            BREAKDOWN_FILE: parse_breakdown,
        }.items():
            try:
                read_json(self.path / name, parse, fix="")
            except DataError as error:
                new_name = rename_corrupt_file(self.path / name).name
                log.info(f"{error.problem}: renamed to {new_name}, and begun anew{_CORRUPTION_EFFECTS[name]}")
        old_json = {} if self.is_new else self.run_json
        if warning := describe_versions(old_json):
            log.warning(warning)
        start_entry = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "command": ["python", "-m", "trainer", *sys.argv[1:]],
            "python": platform.python_version(),
            "versions": collect_versions(),
            "git": _describe_git_commit(),
        }
        run_fields = {key: fields[key] for key in ("classes", "advice") if key in fields}
        start_entry |= {key: value for key, value in fields.items() if key not in run_fields}
        attempts = {"attempts": [*old_json.get("attempts", []), start_entry]}
        all_fields = run_fields | (old_json if self.resuming else {"initial_weights": describe_initial_weights(config)})
        recorded_hashes = all_fields.get("data_fingerprint", {})  # older versions wrote one hash, of kind "ends"
        fingerprints = {**(recorded_hashes if isinstance(recorded_hashes, dict) else {}), **dataset.fingerprints}
        self._written = all_fields | {"data_fingerprint": fingerprints} | fields_by_phase | attempts
        write_json(self.path / RUN_JSON, self._written)
        self.publisher.start()
        if self.incomplete_starts:
            self.incomplete_starts.clear()

    def read_last_command(self) -> str:
        """Return the command of the last start in run.json, which is this start after `record_start`, for a shell."""
        return shlex.join((read_run_json(self.path) or self._written)["attempts"][-1]["command"])

    def update_run_json(self, fields: dict[str, Any]) -> None:
        """Add or replace top-level fields of run.json."""
        self._written = (read_run_json(self.path) or self._written) | fields
        write_json(self.path / RUN_JSON, self._written)

    def record_end(self, error: BaseException | None) -> None:
        """Record the error that ends this start before `record_start`. `RestartHistory` records later errors."""
        if self.incomplete_starts and not self.start_recorded:
            self.incomplete_starts.end(error)

    def record_exit(self, code: int, reason: str, stopped: bool) -> None:
        """Record that this process exits immediately with this code, and delete the folder if it is unused.

        Called if another thread or worker ends this process, so that `abandon` is not reached. `stopped` is true if the
        cause is a stop request.
        """
        error_class = Interrupted if code in (INTERRUPTED, BUG) else ConfigError
        self.record_end((StopRequested if stopped else error_class)(reason))
        self._delete_if_unused()

    def _delete_if_unused(self) -> None:
        """Delete the folder if this process created it and has not recorded its start in it."""
        if self.lock and self.created and not self.start_recorded:
            with suppress(OSError):  # other files are in it
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()
                if self.student_output_dir:
                    self.path.parent.rmdir()  # the student's output_dir; fails if other files are in it

    def abandon(self, error: BaseException | None = None) -> None:
        """Release the folder, and delete it if unused. Record an error that ends the start before `record_start`."""
        self.record_end(error)
        self.publisher.close(publish=False)
        self._delete_if_unused()
        if self.lock:
            self.lock.close()


_CORRUPTION_EFFECTS = {  # name of a corrupt file -> the end of its log message: the consequence of its loss
    RUN_JSON: "; the data cannot be compared with that of earlier starts",
    ATTEMPTS_FILE: "; earlier restarts are not counted",
    BREAKDOWN_FILE: "; the time breakdown lacks earlier starts",
}


def parse_run_json(value: Any) -> dict[str, Any]:
    """Return the content of run.json; raise one of `trainer.storage.small_files.CONTENT_ERRORS` if it is invalid."""
    fields = require_json_object(value)
    require_json_object(fields.get("features", {}))
    require_json_object(fields.get("xla", {}))
    for entry in require_json_object(fields.get("initial_weights", {})).values():
        require_json_object(entry)["address"], entry["crc32c"]
    for start in require_json_objects(fields.get("attempts", [])):
        require_json_object(start.get("versions", {}))
        shlex.join(start.get("command", []))
    if "data_fingerprint" in fields:
        require_fingerprint(fields["data_fingerprint"])
    return fields


def read_run_json(folder: Path) -> dict[str, Any]:
    """Read the run.json in a run's folder; return {} if the file does not exist or is corrupt."""
    return read_json_or_default(folder / RUN_JSON, parse_run_json, default={})


def describe_versions(run_json: dict[str, Any]) -> str | None:
    """Describe the package versions that changed since a run's last start; return None if none changed."""
    last, now = (run_json.get("attempts") or [{}])[-1].get("versions", {}), collect_versions()
    changes = [f"{name} {last[name]} -> {now[name]}" for name in now if last.get(name, now[name]) != now[name]]
    if not changes:
        return None
    return f"resuming with other versions than the last start: {', '.join(changes)}; the results can differ in bits"


def collect_versions() -> dict[str, str]:
    """Return the versions of the packages that determine a run's exact results, by package name."""
    return {"kubetune": trainer.__version__} | {name: version(name) for name in ("tensorflow", "keras", "numpy")}


def hash_source() -> str:
    """Return a hash of the package's Python files, as 16 hex digits: images of one version can differ in their code."""
    digest, package = hashlib.sha256(), Path(trainer.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _describe_git_commit() -> str | None:
    """Return $KUBETUNE_REVISION, or else `git describe` of the package; None if neither is available."""
    if revision := os.environ.get("KUBETUNE_REVISION"):  # a container image has no .git
        return revision
    package = Path(trainer.__file__).parent
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip() or None


def create_output_folder(name: str | None) -> Path:
    """Create a new folder whose name has the time and the experiment's `name`: outputs/20260131-120000-NAME.

    Raises:
        ConfigError: the folder cannot be created.
        Interrupted: the disk is full or fails.
    """
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}" + (f"-{make_file_stem(name)}" if name else "")
    for i in range(1, 1000):
        folder = Path("outputs") / (stem if i == 1 else f"{stem}-{i}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise make_write_error(error, folder, "output_dir", "give output_dir=FOLDER") from None
    raise ConfigError("outputs/ already has 999 runs that started in this second", fix="give output_dir=FOLDER")


def _lock_folder(folder: Path, max_wait: float) -> TextIO:
    """Create a local folder, and lock it until the returned file is closed or the process ends.

    Raises:
        ConfigError: the folder cannot be written to.
        Interrupted: another process still has the lock after `max_wait` seconds, or the disk is full or fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+", errors="replace")  # noqa: SIM115 - locked until the process ends
    except OSError as error:
        raise make_write_error(error, folder, "output_dir", "give a folder with write permission") from None
    deadline, is_wait_logged = time.monotonic() + max_wait, False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            lock.seek(0)
            in_use_error = make_in_use_error(f"another run ({lock.read().strip() or 'unknown process'})", folder)
            if time.monotonic() >= deadline:
                lock.close()
                raise in_use_error from None
        if not is_wait_logged:
            log.info(f"output_dir={folder} {in_use_error.problem}; waiting up to {max_wait:.0f} s until it ends")
        is_wait_logged = True
        time.sleep(LOCK_INTERVAL_SECONDS)
    try:
        lock.truncate(0)
        # `os.write` is unbuffered, so that `close` need not write to a disk that is full by then.
        os.write(lock.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
    except OSError as error:
        lock.close()
        raise make_write_error(error, folder, "output_dir", "give a folder on another disk") from None
    return lock


def find_folder_holder(config: RequestedConfig) -> str | None:
    """Describe the process that holds the lock or lease of `config.output_dir`. Writes nothing.

    Returns None if the folder is free, if its lock file cannot be opened, or if the holder is a pod of the same
    Kubernetes Job, whose lease this process can take over.
    """
    folder = storage_path(config.output_dir or "")
    if not folder.is_local:
        return describe_holder(folder, os.environ.get("JOB_UID") or None)
    file = Path(str(folder)) / LOCK
    try:
        with open(file) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
    except BlockingIOError:
        return file.read_text(errors="replace").strip() or "another process"
    except OSError:
        return None
    return None


def open_run_folder(config: RequestedConfig) -> RunFolder:
    """Lock `config.output_dir`, or a new folder under outputs/, and determine whether the run resumes.

    If output_dir is in a bucket, also acquire its lease and download the run. Only the chief calls this.

    Raises:
        ConfigError: the folder cannot be written to, or cannot be used by this run (`check_folder`).
        DataError: `LATEST` or `BEST` in the bucket is corrupt.
        GaveUp: too many starts ended before the run was ready to train.
        Interrupted: another process still uses the folder after a wait (`choose_max_wait`), the disk is full, or the
            bucket does not respond.
    """
    address = config.output_dir or str(create_output_folder(config.experiment_name))
    path = _get_local_folder(config, address)
    created = not config.output_dir or not path.exists()
    job_uid = os.environ.get("JOB_UID") or None
    max_wait = choose_max_wait(job_uid)
    lock, lease = _lock_folder(path, max_wait), None
    if is_remote(address):  # a pod of the same Kubernetes Job (JOB_UID) takes over the lease without waiting
        holder = f"process {os.getpid()} on {os.environ.get('HOSTNAME') or platform.node()}"
        lease = acquire_lease(storage_path(address), holder, job_uid, max_wait=max_wait, log_message=log.info)
    publisher = Publisher(path, lease)
    folder = RunFolder(path, address, False, lock, publisher, config, created=created)
    try:
        folder.incomplete_starts = IncompleteStarts(storage_path(address))
        folder.incomplete_starts.add_start(config.runtime.max_restarts_without_progress)
        publisher.fetch()
        folder.previous_config, resumed = check_folder(config, address, _read_contents(storage_path(address)))
        folder.resuming, folder.config = resumed is not None, resumed or config
        folder.run_json = read_run_json(path)
        return folder
    except BaseException as error:
        folder.abandon(error)
        raise


@dataclass(frozen=True)
class FolderContents:
    """The contents of a folder that determine whether a run can use it."""

    names: Set[str]  # of its files and folders, except the lock, `.starts`, config.yaml and temporary files
    config: bytes | None  # content of config.yaml; None if it does not exist
    has_checkpoint: bool  # also true if all checkpoints are corrupt

    @property
    def results(self) -> list[str]:
        """The names of the folder's results, which a run writes after its last step."""
        return [name for name in RESULTS if name in self.names]


def _read_contents(folder: StoragePath) -> FolderContents:
    """Read the contents of a folder, on disk or in a bucket, for `check_folder`."""
    names = {child.name for child in [*(info.path for info in folder.list(recursive=False)), *folder.folders()]}
    if folder.is_local:
        has_checkpoint = has_checkpoints(child.name for child in (folder / "checkpoints").folders())
    else:
        names = {name for name in names if not name.startswith(".")}  # without the lease
        has_checkpoint = (folder / LATEST).exists()
    config = (folder / "config.yaml").fetch()
    names = {name for name in names if not is_temporary_name(name)} - {LOCK, INCOMPLETE_STARTS_FILE, "config.yaml"}
    return FolderContents(names, config[0] if config else None, has_checkpoint)


def check_folder(
    config: RequestedConfig, address: str, contents: FolderContents
) -> tuple[RunConfig | None, RunConfig | None]:
    """Check that a run can use its output_dir, and return the configurations of the last start there and of this start.

    Args:
        config: the requested configuration of this start.
        address: output_dir, for error messages.
        contents: the current contents of output_dir.

    Returns:
        - The configuration of the last start. None if there was none, or if config.yaml is corrupt and there is no
          checkpoint.
        - The configuration with which this start resumes from a checkpoint. None if there is no checkpoint; then the
          run trains from the beginning, and its settings can differ from those of the last start.

    Raises:
        ConfigError: the folder contains another run, other files, checkpoints with a corrupt config.yaml, or results
            without the checkpoints that a run needs to continue; or `resume` does not permit its use.
    """
    if contents.config is None:
        if config.resume == "must":
            problem, fix = f"output_dir={address} holds no run", "give the output_dir of a run, or resume=auto"
            raise ConfigError(problem, key="resume", value="must", fix=fix)
        teacher_names = {TEACHER_FOLDER} if derive_teacher_config(config) else set()  # the teacher's run trains first
        if names := contents.names - teacher_names:
            problem, fix = (
                f"is not empty and holds no run ({escape_unprintable(min(names))})",
                "give an empty folder",
            )
            raise ConfigError(problem, key="output_dir", value=address, fix=fix)
        return None, None
    if config.resume == "never":
        problem, fix = f"output_dir={address} holds a run", "give another output_dir, or resume=auto"
        raise ConfigError(problem, key="resume", value="never", fix=fix)
    if contents.results and not contents.has_checkpoint:
        problem = f"holds the results of a run ({', '.join(contents.results)}), but not its checkpoints"
        fix = "give another folder; without checkpoints a run cannot continue, and its results would be overwritten"
        raise ConfigError(problem, key="output_dir", value=address, fix=fix)
    try:
        stored_config = parse_stored_config(contents.config, address)
    except ConfigError:
        if contents.has_checkpoint:
            raise
        return None, None
    return stored_config, check_same_run(config, stored_config, address) if contents.has_checkpoint else None


def parse_stored_config(content: bytes, address: str) -> RunConfig:
    """Parse the config.yaml in output_dir `address`. Raises ConfigError if the content is corrupt or invalid."""
    try:
        return validate_resolved_config(parse_config(content))
    except ConfigError as error:
        problem = f"its config.yaml cannot be used: {error.problem}"
        warm_start = format_argument("warm_start", address)
        fix = f"restore the file, or give another folder with {warm_start}, which needs only the checkpoints"
        raise ConfigError(problem, key="output_dir", value=address, fix=fix) from None


def inspect_folder(config: RequestedConfig) -> tuple[RunConfig | None, dict[str, Any]]:
    """Return the configuration with which this start would resume a run, and that run's run.json. Writes nothing.

    Returns None and {} if the run would not resume. The second value is also {} if run.json is missing or corrupt.

    Raises:
        ConfigError: the run cannot use its output_dir (`check_folder`).
    """
    folder = storage_path(config.output_dir or "")
    _, resumed = check_folder(config, str(config.output_dir), _read_contents(folder))
    with suppress(DataError):
        return resumed, read_json(folder / RUN_JSON, parse_run_json, fix="") or {} if resumed else {}
    return resumed, {}


def check_same_data(address: str, run_json: dict[str, Any], dataset: Dataset) -> None:
    """Raise a DataError if the run in output_dir `address` was trained on a dataset with another fingerprint."""
    recorded = run_json.get("data_fingerprint")
    if recorded is not None and not has_fingerprints(dataset, recorded):
        recorded, now = (" ".join(h.values()) if isinstance(h, dict) else h for h in (recorded, dataset.fingerprints))
        problem = f"was trained on other data (fingerprint {recorded}, now {now})"
        fix = "give another folder, or the data of its first start"
        raise DataError(problem, key="output_dir", value=address, fix=fix)


def check_same_run(config: RequestedConfig, before: RunConfig, address: str) -> RunConfig:
    """Return `config` with each `auto` replaced by the value in `before`, the stored configuration of a run.

    Raises:
        ConfigError: the configurations differ in a value that a resumed run cannot change. `address` is the run's
            output_dir, for the message.
    """
    config, _ = resolve_auto(config, stored_config=before)
    if changed := list_forbidden_changes(before, config):
        problem = "\n".join(["holds a run with another configuration:", *(f"  {change}" for change in changed)])
        raise ConfigError(problem, key="output_dir", value=address, fix="give another folder, or the same values")
    return config


def _list_changes(before: RunConfig, config: RequestedConfig) -> list[str]:
    """List the changes that a resumed run cannot have, and the changed addresses, as "key: before -> now"."""
    config, _ = resolve_auto(config, stored_config=before)
    moved_addresses = list_moved_addresses(before, config, (*ADDRESS_KEYS, *INITIAL_WEIGHTS_KEYS))
    return [*list_forbidden_changes(before, config), *moved_addresses]


def is_finished(config: RequestedConfig) -> bool:
    """Return whether `config.output_dir` contains this run, finished with the same number of steps. Writes nothing.

    Raises:
        ConfigError: the run is finished, but its config.yaml is corrupt or invalid.
    """
    if not config.output_dir or config.resume == "never":
        return False
    folder = storage_path(config.output_dir)
    if not (folder / "DONE").exists():
        return False
    stored_config = parse_stored_config((folder / "config.yaml").read(), config.output_dir)
    config, _ = resolve_auto(config, stored_config=stored_config)
    is_same_length = stored_config.phases == config.phases and stored_config.debug.max_steps == config.debug.max_steps
    return is_same_length and not _list_changes(stored_config, config)


class Finished(Exception):
    """Not an error: the run is already finished, so the process ends with exit code 0."""


def require_unfinished(config: RequestedConfig) -> None:
    """Raise `Finished` if the run of this configuration is finished."""
    if is_finished(config):
        folder = config.output_dir
        raise Finished(f"{folder} is finished already (it holds DONE); its report is {folder}/report/index.html")


def require_output_dir(config: RequestedConfig, num_workers: int) -> None:
    """Raise a ConfigError if a run with several `num_workers` has no output_dir."""
    if num_workers > 1 and not config.output_dir:
        raise ConfigError("is required with several workers", key="output_dir", fix="give a folder that outlives them")


def make_worker_run_folder(config: RequestedConfig) -> RunFolder:
    """Create the `RunFolder` for a worker other than the chief. It accesses neither the disk nor the bucket."""
    address = config.output_dir or ""
    path = _get_local_folder(config, address)
    return RunFolder(path, address, resuming=False, lock=None, publisher=Publisher(path, None), config=config)


def _get_local_folder(config: RequestedConfig, address: str) -> Path:
    """Return a run's local folder: output_dir itself, or a cache folder if output_dir is in a bucket."""
    if not is_remote(address):
        return Path(address).expanduser()
    return config.runtime.cache_folder / "runs" / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]


def resolve_auto_once(
    config: RequestedConfig,
    folder: RunFolder,
    control: ControlChannel,
    dataset: Dataset,
    device: Device,
    num_replicas: int,
) -> tuple[RunConfig, list[str]]:
    """Resolve the `auto` values on the chief, and broadcast them. All workers must call this.

    A resumed run uses the values of its earlier starts. A new run chooses them for the dataset, the device, and
    `num_replicas`, the number of replicas on all workers.

    Returns:
        The configuration, equal on all workers, and a line with the reason for each chosen value.
    """

    def choose() -> tuple[dict[str, Any], list[str]]:
        earlier_config = folder.config if folder.resuming and isinstance(folder.config, RunConfig) else None
        num_images, num_classes = dataset.splits["train"].count, len(dataset.class_names)
        chosen, reasons = resolve_auto(config, num_images, num_classes, device, earlier_config, num_replicas)
        return chosen.model_dump(mode="json"), reasons

    if isinstance(config, RunConfig):
        return config, []
    choice, reasons = control.broadcast("advice", choose)
    for reason in reasons:
        log.info(reason)
    return resolve_auto(config, stored_config=RunConfig.model_validate(choice))[0], reasons
