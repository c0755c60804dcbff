"""Publish a run's local folder to its folder in a bucket, in the background of training.

Both have the same layout, except that a checkpoint in the bucket has a name that is used once
(`checkpoints/step-00000420-<token>/`), and `checkpoints/LATEST` lists the committed ones, newest first. Writing LATEST
through the lease commits a checkpoint; `DONE` is written last, in the same way.
"""

import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from trainer.monitoring.health import health
from trainer.runs.checkpoints import PREFIX, names_in
from trainer.storage.base import StoragePath
from trainer.storage.lease import Lease

PUBLISH_SECONDS = 30.0  # interval of publishing files that have changed: metrics, TensorBoard, time breakdown
TRANSFERS = 8  # concurrent files
LATEST, BEST, DONE = "checkpoints/LATEST", "checkpoints/BEST", "DONE"
LAST = ("report/", "export/")  # published at the end


class Publisher:
    """Copies `local` to `remote`; without a remote every operation returns at once."""

    def __init__(self, local: Path, remote: StoragePath | None, lease: Lease | None) -> None:
        self.local, self.remote, self.lease = local, remote, lease
        self.token = uuid.uuid4().hex[:8]
        self._names: dict[str, str] = {}  # local name of a checkpoint -> its name in the bucket
        self._sent: dict[str, tuple[int, int]] = {}  # file -> size and modification time of the last copy
        self._error: BaseException | None = None
        self._pending: Future[None] | None = None
        self._closed = threading.Event()
        if remote:
            self._pool = ThreadPoolExecutor(1, "publisher")
            threading.Thread(target=self._publish_periodically, name="publish", daemon=True).start()

    def fetch(self) -> None:
        """Replace `local` by the run's files in the bucket, of checkpoints only the committed ones.

        Raises:
            DataError: the bucket cannot be read.
            Interrupted: it does not respond.
        """
        if not self.remote:
            return
        shutil.rmtree(self.local, ignore_errors=True)
        self.local.mkdir(parents=True)
        names = names_in(self.remote / LATEST)
        self._names = {_step_of(name): name for name in names}
        downloads: list[tuple[StoragePath, Path]] = []
        for info in self.remote.list():
            name = str(info.path).removeprefix(f"{self.remote}/")
            if name.startswith((".", *LAST)) or name in (DONE, LATEST, BEST):
                continue
            if name.startswith(f"checkpoints/{PREFIX}"):
                _, checkpoint, file = name.split("/", 2)
                if checkpoint not in names:
                    continue
                name = f"checkpoints/{_step_of(checkpoint)}/{file}"
            downloads.append((info.path, self.local / name))
        for _, target in downloads:
            target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda pair: pair[0].download(pair[1]), downloads))
        for pointer, named in ((LATEST, names), (BEST, names_in(self.remote / BEST))):
            if named:
                (self.local / pointer).write_text(_step_of(named[0]) + "\n")

    def checkpoint(self) -> None:
        """Begin to publish the local checkpoints; call `wait` before the next one is written."""
        if not self.remote:
            health.checkpoint_saved()
        self._submit(partial(self._publish_checkpoints, time.monotonic()))

    def wait(self) -> None:
        """Wait until the checkpoint in progress is published. Raises Interrupted as `check`, or without a response."""
        if self._pending:
            self._pending.result()
        self.check()

    def check(self) -> None:
        """Raise the error of the background thread, or of a lost lease."""
        if self._error:
            raise self._error
        if self.lease:
            self.lease.check()

    def results(self) -> None:
        """Publish everything, including report and export."""
        self.wait()
        if self.remote and self.lease:
            self._publish_files(everything=True)

    def finish(self, content: str) -> None:
        """Publish everything, then commit DONE with this content, in the bucket and locally."""
        self.results()
        if self.remote and self.lease:
            self.lease.commit(DONE, content)
        (self.local / DONE).write_text(content)

    def close(self, publish: bool = True) -> None:
        """Publish the current files, unless that fails, and release the lease."""
        if not self.remote or self._closed.is_set():
            return
        self._closed.set()
        self._pool.shutdown(wait=True)
        try:
            if publish and not self._error:
                self._publish_files()
        except Exception as error:  # must not hide the reason why the run ends
            self._error = error
        if self.lease:
            self.lease.release()

    # ------------------------------------------------------------------------------------------------------------

    def _submit(self, work: Callable[[], None]) -> None:
        def recorded() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        if self.remote and not self._closed.is_set():
            self._pending = self._pool.submit(recorded)

    def _publish_periodically(self) -> None:
        while not self._closed.wait(PUBLISH_SECONDS):
            if self._pending is None or self._pending.done():
                self._submit(self._publish_files)

    def _publish_checkpoints(self, written: float) -> None:
        assert self.remote
        assert self.lease
        names = sorted((p.name for p in (self.local / "checkpoints").glob(f"{PREFIX}*")), reverse=True)
        for name in names:
            if name not in self._names:
                published, files = f"{name}-{self.token}", (self.local / "checkpoints" / name).iterdir()
                for file in sorted(files, key=lambda f: f.name == "manifest.json"):  # manifest last
                    (self.remote / f"checkpoints/{published}/{file.name}").upload(file)
                    health.progress()
                self._names[name] = published
        self._names = {name: published for name, published in self._names.items() if name in names}
        self._publish_files()  # before the commit: a restart can cut metrics back, but not add to them
        self.lease.commit(LATEST, "".join(f"{self._names[name]}\n" for name in names))
        health.checkpoint_saved(time.monotonic() - written)
        best = self.local / BEST
        if best.exists() and (name := best.read_text().strip()) in self._names:
            (self.remote / BEST).write(self._names[name] + "\n")
        for old in (self.remote / "checkpoints").folders():
            if old.name.startswith(PREFIX) and old.name not in self._names.values():
                old.delete_tree()

    def _publish_files(self, everything: bool = False) -> None:
        """Copy the files that changed. They may grow meanwhile, so each is read once and that content is written."""
        assert self.remote
        if self.lease:
            self.lease.check()
        for file in sorted(self.local.rglob("*")):
            name = file.relative_to(self.local).as_posix()
            hidden = any(part.startswith(".") for part in Path(name).parts)
            excluded = (f"checkpoints/{PREFIX}", *(() if everything else LAST))
            if hidden or name in (DONE, LATEST, BEST) or name.startswith(excluded) or not file.is_file():
                continue
            status = file.stat()
            current = (status.st_size, status.st_mtime_ns)
            if self._sent.get(name) != current:
                (self.remote / name).write(file.read_bytes())
                health.progress()
                self._sent[name] = current


def _step_of(name: str) -> str:
    """The local name of a checkpoint, as "step-00000420" of "step-00000420-1a2b3c4d"."""
    return "-".join(name.split("-")[:2])
