"""Publish a run's local folder to its folder in a bucket, in the background during training.

Both folders have the same layout, except that checkpoint names in the bucket end with a token of the process that
published the checkpoint: `step-00000420-1a2b3c4d`. A checkpoint is committed once `LATEST` lists it. `LATEST` and
`DONE`, which is written last, are written through the lease.
"""

import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from trainer.config.distillation import TEACHER_FOLDER
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.runs.checkpoints import PREFIX, is_checkpoint, is_local_checkpoint, read_pointer
from trainer.storage.base import StoragePath
from trainer.storage.lease import Lease
from trainer.storage.local import safe_join
from trainer.storage.staging import describe_skipped_objects, separate_invalid_objects

PUBLISH_SECONDS = 30.0  # interval at which changed files are published: metrics, TensorBoard, time breakdown
MAX_TRANSFERS = 8  # concurrent downloads
LATEST, BEST, DONE = "checkpoints/LATEST", "checkpoints/BEST", "DONE"  # files in a run's folder
FINAL_RESULTS = ("report/", "export/")  # folders that are published only at the end
# Folders that are not published, because XLA renames the files in them when they are complete.
UNPUBLISHED_FOLDERS = ("autotuning/tmp/",)


def fetch_run(remote: StoragePath, local_folder: Path) -> dict[str, str]:
    """Replace the contents of a local folder with the files of a run in a bucket.

    Report, export, DONE, uncommitted checkpoints and a teacher's run are not downloaded.

    Returns:
        The name of each committed checkpoint in the bucket, by its name on disk.

    Raises:
        DataError: `LATEST` or `BEST` in the bucket is corrupt.
        Interrupted: the bucket does not respond.
    """
    shutil.rmtree(local_folder, ignore_errors=True)
    local_folder.mkdir(parents=True)
    committed_names = read_pointer(remote / LATEST)
    downloads: list[tuple[StoragePath, Path]] = []
    infos_by_name, skipped_objects = separate_invalid_objects(remote, remote.list())
    if skipped_objects:
        log.warning(f"{remote}: {describe_skipped_objects(skipped_objects)}")
    for name, info in infos_by_name.items():
        if name.startswith((".", f"{TEACHER_FOLDER}/", *FINAL_RESULTS)) or name in (DONE, LATEST, BEST):
            continue
        target_name = name
        if name.startswith(f"checkpoints/{PREFIX}"):
            _, checkpoint, *file_path = name.split("/")
            if checkpoint not in committed_names or len(file_path) != 1:
                continue
            target_name = f"checkpoints/{_strip_token(checkpoint)}/{file_path[0]}"
        downloads.append((info.path, safe_join(local_folder, target_name)))
    with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
        list(pool.map(lambda pair: pair[0].download(pair[1]), downloads))
    for pointer, names in ((LATEST, committed_names), (BEST, read_pointer(remote / BEST))):
        if names:
            (local_folder / pointer).write_text(_strip_token(names[0]) + "\n")
    return {_strip_token(name): name for name in committed_names}


class Publisher:
    """Copies a local folder to the bucket folder of a lease. While it has the lease, no other process can commit there.

    `lease` is None if output_dir is local, and on workers other than the chief. Then nothing is copied, and only two
    methods have an effect: `publish_checkpoints` records the checkpoint in `health`, and `finish` writes DONE.
    """

    def __init__(self, local_folder: Path, lease: Lease | None) -> None:
        """Create a publisher for a run's local folder. It publishes nothing before `start`."""
        self.local_folder, self.lease = local_folder, lease
        self.token = uuid.uuid4().hex[:8]
        self._remote_names: dict[str, str] = {}  # local name of a checkpoint -> its name in the bucket
        self._published: dict[str, tuple[int, int]] = {}  # file -> size and modification time (ns) when it was copied
        self._error: BaseException | None = None  # raised in the background thread
        self._pending: Future[None] | None = None  # the last submitted publication
        self._closed, self._started = threading.Event(), False
        if lease:
            self._pool = ThreadPoolExecutor(1, "publisher")  # one thread: publications do not overlap

    def fetch(self) -> None:
        """Replace the local folder's contents with the run's files in the bucket. Raises the errors of `fetch_run`."""
        if self.lease:
            self._remote_names = fetch_run(self.lease.folder, self.local_folder)

    def start(self) -> None:
        """Delete DONE in the bucket, and start publishing changed files: now, and then every `PUBLISH_SECONDS`."""
        self._started = True
        if self.lease:
            self.lease.delete(DONE)  # first, because with the new config.yaml it would mark an extended run as finished
            self._submit(self._publish_files)
            threading.Thread(target=self._publish_periodically, name="publish", daemon=True).start()

    def publish_checkpoints(self) -> None:
        """Start publishing the local checkpoints in the background. Call `wait` before the next one is written."""
        if not self.lease:
            health.record_checkpoint()
        self._submit(partial(self._upload_and_commit, time.monotonic()))

    def wait(self) -> None:
        """Wait until the last submitted publication has ended. Raises the errors of `check`."""
        if self._pending:
            self._pending.result()
        self.check()

    def check(self) -> None:
        """Raise the background thread's error, if any. Raise Interrupted if the lease was lost."""
        if self._error:
            raise self._error
        if self.lease:
            self.lease.check()

    def publish_results(self) -> None:
        """Publish all changed files, including report and export. Raises the errors of `check`."""
        self.wait()
        if self.lease:
            self._publish_files(results=True)

    def finish(self, content: str) -> None:
        """Publish all changed files, and then write DONE with this content, in the bucket and locally."""
        self.publish_results()
        if self.lease:
            self.lease.commit(DONE, content)
        (self.local_folder / DONE).write_text(content)

    def close(self, publish: bool = True) -> None:
        """Release the lease, if any, after publishing changed files if the run has begun and nothing has failed.

        `publish=False` skips this publication. Further calls have no effect.
        """
        if not self.lease or self._closed.is_set():
            return
        self._closed.set()
        self._pool.shutdown(wait=True)
        try:
            if publish and self._started and not self._error:
                self._publish_files()
        except Exception as error:  # must not hide the error that ends the run
            self._error = error
        self.lease.release()

    def _submit(self, task: Callable[[], None]) -> None:
        """Run a task in the background thread, and store its error for `check`. Without a lease, do nothing."""

        def run_task() -> None:
            try:
                task()
            except BaseException as error:
                self._error = error

        if self.lease and not self._closed.is_set():
            self._pending = self._pool.submit(run_task)

    def _publish_periodically(self) -> None:
        while not self._closed.wait(PUBLISH_SECONDS):
            if self._pending is None or self._pending.done():
                self._submit(self._publish_files)

    def _upload_and_commit(self, written_at: float) -> None:
        """Upload new local checkpoints, commit them, and delete those in the bucket that no longer exist locally.

        `written_at` is the time.monotonic() at which the newest checkpoint was written.
        """
        assert self.lease
        remote = self.lease.folder
        local_names = (path.name for path in (self.local_folder / "checkpoints").iterdir())
        names = sorted(filter(is_local_checkpoint, local_names), reverse=True)
        for name in names:
            if name not in self._remote_names:
                remote_name = f"{name}-{self.token}"
                files = (self.local_folder / "checkpoints" / name).iterdir()
                for file in sorted(files, key=lambda f: f.name == "manifest.json"):  # manifest last
                    (remote / f"checkpoints/{remote_name}/{file.name}").upload(file)
                    health.record_progress()
                self._remote_names[name] = remote_name
        self._remote_names = {name: remote_name for name, remote_name in self._remote_names.items() if name in names}
        self._publish_files()  # before the commit: a resumed run can delete later metrics, but not add missing ones
        self.lease.commit(LATEST, "".join(f"{self._remote_names[name]}\n" for name in names))
        health.record_checkpoint(time.monotonic() - written_at)
        best = self.local_folder / BEST
        if best.exists() and (name := best.read_text().strip()) in self._remote_names:
            (remote / BEST).write(self._remote_names[name] + "\n")
        for folder in (remote / "checkpoints").folders():
            if is_checkpoint(folder.name) and folder.name not in self._remote_names.values():
                folder.delete_tree()

    def _publish_files(self, results: bool = False) -> None:
        """Copy changed files, with `results` also report and export, but no checkpoints, to the bucket."""
        assert self.lease
        self.lease.check()
        # config.yaml is copied first, so that the bucket folder is recognized as a run's after a kill.
        config_file = self.local_folder / "config.yaml"
        for file in sorted(self.local_folder.rglob("*"), key=lambda file: (file != config_file, file)):
            name = file.relative_to(self.local_folder).as_posix()
            is_hidden = any(component.startswith(".") for component in Path(name).parts)
            skipped_prefixes = (f"checkpoints/{PREFIX}", *UNPUBLISHED_FOLDERS, *(() if results else FINAL_RESULTS))
            is_tmp = name.endswith(".tmp")  # TensorFlow renames such a file once the program in it is complete
            if (
                is_hidden
                or is_tmp
                or name in (DONE, LATEST, BEST)
                or name.startswith(skipped_prefixes)
                or not file.is_file()
            ):
                continue
            file_stat = file.stat()
            size_and_time = (file_stat.st_size, file_stat.st_mtime_ns)
            if self._published.get(name) != size_and_time:
                # A single read, because the file can grow during the upload.
                (self.lease.folder / name).write(file.read_bytes())
                health.record_progress()
                self._published[name] = size_and_time


def _strip_token(name: str) -> str:
    """Return the local name of a bucket's checkpoint: "step-00000420" for "step-00000420-1a2b3c4d"."""
    return "-".join(name.split("-")[:2])
