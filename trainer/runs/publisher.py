"""Publication of a run's local folder to its folder in a bucket, in the background of training.

The layout is the same in both, but for the checkpoints: in the bucket each lies under a name that is used once
(`checkpoints/step-00000420-<token>/`), and `checkpoints/LATEST` names those that count, the newest first. Writing
LATEST through the lease is what commits a checkpoint; `DONE` is written last, in the same way.
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

PUBLISH_SECONDS = 30.0  # between two checks for files that have grown: metrics, TensorBoard, the clock
TRANSFERS = 8  # files on their way at once
LATEST, BEST, DONE = "checkpoints/LATEST", "checkpoints/BEST", "DONE"
LAST = ("report/", "export/")  # published at the end


class Publisher:
    """Copies `local` to `remote`; without a remote every operation is immediate and does nothing."""

    def __init__(self, local: Path, remote: StoragePath | None, lease: Lease | None) -> None:
        self.local, self.remote, self.lease = local, remote, lease
        self.token = uuid.uuid4().hex[:8]
        self._names: dict[str, str] = {}  # checkpoint here -> its name in the bucket
        self._sent: dict[str, tuple[int, int]] = {}  # file -> size and time when it was last copied
        self._error: BaseException | None = None
        self._pending: Future[None] | None = None
        self._closed = threading.Event()
        if remote:
            self._pool = ThreadPoolExecutor(1, "publisher")
            threading.Thread(target=self._publish_periodically, name="publish", daemon=True).start()

    def fetch(self) -> None:
        """Replace `local` by the run's files in the bucket, complete checkpoints only.

        Raises:
            DataError: the bucket cannot be read.
            Interrupted: it does not answer.
        """
        if not self.remote:
            return
        shutil.rmtree(self.local, ignore_errors=True)
        self.local.mkdir(parents=True)
        names = names_in(self.remote / LATEST)
        self._names = {_step_of(name): name for name in names}
        wanted: list[tuple[StoragePath, Path]] = []
        for entry in self.remote.list():
            name = str(entry.path).removeprefix(f"{self.remote}/")
            top, _, rest = name.partition("/")
            if name.startswith((".", *LAST)) or name in (DONE, LATEST, BEST):
                continue
            if top == "checkpoints" and rest.startswith(PREFIX):
                folder, _, file = rest.partition("/")
                if folder in names:
                    wanted.append((entry.path, self.local / "checkpoints" / _step_of(folder) / file))
            else:
                wanted.append((entry.path, self.local / name))
        for _, target in wanted:
            target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda pair: pair[0].download(pair[1]), wanted))
        for pointer, named in ((LATEST, names), (BEST, names_in(self.remote / BEST))):
            if named:
                (self.local / pointer).write_text(_step_of(named[0]) + "\n")

    def checkpoint(self) -> None:
        """Begin to publish the checkpoints that are here now; call `wait` before the next one is written."""
        if not self.remote:
            health.checkpoint_saved()
        self._submit(partial(self._publish_checkpoints, time.monotonic()))

    def wait(self) -> None:
        """Wait until the checkpoint in progress is published.

        Raises:
            Interrupted: the bucket does not answer, or the lease was lost.
        """
        if self._pending:
            self._pending.result()
        self.check()

    def check(self) -> None:
        """Raise an error of the background thread, or that the lease is lost."""
        if self._error:
            raise self._error
        if self.lease:
            self.lease.check()

    def results(self) -> None:
        """Publish everything, the report and the export too."""
        self.wait()
        if self.remote and self.lease:
            self._publish_files(everything=True)

    def finish(self, content: str) -> None:
        """Publish everything, then commit DONE with this content, here and there."""
        self.results()
        if self.remote and self.lease:
            self.lease.commit(DONE, content)
        (self.local / DONE).write_text(content)

    def close(self, publish: bool = True) -> None:
        """Publish the files as they are now, as far as that is possible, and release the lease."""
        if not self.remote or self._closed.is_set():
            return
        self._closed.set()
        self._pool.shutdown(wait=True)
        try:
            if publish and not self._error:
                self._publish_files()
        except Exception as error:  # the run ends for a reason of its own, which must not be hidden
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
        here = sorted((p.name for p in (self.local / "checkpoints").glob(f"{PREFIX}*")), reverse=True)
        for name in here:
            if name not in self._names:
                there, files = f"{name}-{self.token}", (self.local / "checkpoints" / name).iterdir()
                for file in sorted(files, key=lambda f: f.name == "manifest.json"):  # that last
                    (self.remote / f"checkpoints/{there}/{file.name}").upload(file)
                    health.progress()
                self._names[name] = there
        self._names = {name: there for name, there in self._names.items() if name in here}
        self._publish_files()  # first: a restart can cut metrics back to the checkpoint, not add to them
        self.lease.commit(LATEST, "".join(f"{self._names[name]}\n" for name in here))
        health.checkpoint_saved(time.monotonic() - written)
        best = self.local / BEST
        if best.exists() and (name := best.read_text().strip()) in self._names:
            (self.remote / BEST).write(self._names[name] + "\n")
        for old in (self.remote / "checkpoints").folders():
            if old.name.startswith(PREFIX) and old.name not in self._names.values():
                old.delete_tree()

    def _publish_files(self, everything: bool = False) -> None:
        """Copy the files that changed; they grow while they are read, so what is copied is what was read."""
        assert self.remote
        if self.lease:
            self.lease.check()
        for file in sorted(self.local.rglob("*")):
            name = file.relative_to(self.local).as_posix()
            hidden = any(part.startswith(".") for part in Path(name).parts)
            later = () if everything else LAST
            if hidden or name in (DONE, LATEST, BEST) or name.startswith((f"checkpoints/{PREFIX}", *later)):
                continue
            if not file.is_file():
                continue
            facts = file.stat()
            now = (facts.st_size, facts.st_mtime_ns)
            if self._sent.get(name) != now:
                (self.remote / name).write(file.read_bytes())
                health.progress()
                self._sent[name] = now


def _step_of(name: str) -> str:
    """ "step-00000420-1a2b3c4d" -> "step-00000420"."""
    return "-".join(name.split("-")[:2])
