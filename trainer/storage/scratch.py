"""A folder for the temporary files of this process and its libraries, and deletion of those of killed processes."""

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

_PREFIX = "kubetune-"  # of the names of temporary folders and files
_LOCK_GRACE_SECONDS = 60.0  # a younger folder of a running process may not be locked yet


@contextmanager
def scratch_folder() -> Iterator[None]:
    """Let `tempfile` create its files in a new folder during this block, and delete the folder at the end.

    First delete the folders that killed processes left: a process locks its folder until it ends, so these are not
    locked. If no folder can be created, `tempfile` is not changed, and its next call raises an error with the reason.
    """
    lock, folder, previous_tempdir = None, None, tempfile.tempdir
    with suppress(OSError):
        parent = Path(tempfile.gettempdir())
        _delete_abandoned(parent)
        folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)
        lock = _lock_folder(folder)
        tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = previous_tempdir
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock_folder(folder: str | Path) -> int | None:
    """Lock a folder until the returned file descriptor is closed or the process ends.

    Return None if the folder cannot be locked, because another process has locked it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


def _delete_abandoned(parent: Path) -> None:
    """Delete the folders in `parent` that belong to processes that have ended."""
    for folder in parent.glob(f"{_PREFIX}[0-9]*-*"):
        with suppress(OSError):  # of another user, or deleted meanwhile
            process_id = folder.name.removeprefix(_PREFIX).partition("-")[0]
            # A process that has just started may have created its folder but not locked it yet.
            if is_running(process_id) and time.time() - folder.stat().st_mtime < _LOCK_GRACE_SECONDS:
                continue
            if (lock := _lock_folder(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def is_running(process: str) -> bool:
    """Return whether another process of this machine or container has this ID.

    The result is False for the ID of this process, and for a text that is not a number.
    """
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
    """Create a temporary file, whose name contains `purpose`, and open it for reading.

    Others can write to it by its name. It is deleted when the returned object is garbage-collected.
    """
    file = tempfile.NamedTemporaryFile("r", prefix=f"{_PREFIX}{purpose}-", delete=False)  # noqa: SIM115
    weakref.finalize(file, Path(file.name).unlink, missing_ok=True)  # missing if `scratch_folder` has deleted it
    return file
