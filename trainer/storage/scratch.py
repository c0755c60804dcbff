"""The folder for temporary files of this process, those of libraries included, and those that killed processes left."""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PREFIX = "kubetune-"
_SETTLED_SECONDS = 60.0  # a folder of this age is locked, unless its process has ended


@contextmanager
def scratch_folder() -> Iterator[None]:
    """Let `tempfile` use a new folder in this block, named after this process, and delete it at the end.

    A folder is locked by its process until that ends, so that those that killed processes left are deleted first. If
    the folder cannot be created, `tempfile` is left as it is, and reports the reason when it is used.
    """
    lock, folder, before = None, None, tempfile.tempdir
    with suppress(OSError):
        parent = Path(tempfile.gettempdir())
        _delete_abandoned(parent)
        folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)
        lock = _lock(folder)
        tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = before
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: str | Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or the process ends; None if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


def _delete_abandoned(parent: Path) -> None:
    """Delete the folders of processes that have ended."""
    for folder in parent.glob(f"{_PREFIX}[0-9]*-*"):
        with suppress(OSError):  # of another user, or deleted meanwhile
            process = folder.name.removeprefix(_PREFIX).partition("-")[0]
            # A process that begins has no lock for a moment.
            if is_running(process) and time.time() - folder.stat().st_mtime < _SETTLED_SECONDS:
                continue
            if (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def is_running(process: str) -> bool:
    """Return whether another process of this machine or container has this number."""
    with suppress(ValueError, OverflowError, ProcessLookupError):
        if int(process) == os.getpid():
            return False
        try:
            os.kill(int(process), 0)
        except PermissionError:
            return True
        return True
    return False


def open_scratch_file(purpose: str) -> IO[str]:
    """Open a new temporary file for reading; it is deleted when it is closed."""
    file = tempfile.NamedTemporaryFile("r", prefix=f"{_PREFIX}{purpose}-", delete=False)  # noqa: SIM115
    weakref.finalize(file, Path(file.name).unlink, missing_ok=True)  # the folder of the process may be deleted before
    return file
