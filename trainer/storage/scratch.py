"""A folder for the temporary files of this process and its libraries, and deletion of killed processes' folders."""

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

_PREFIX = "kubetune-"  # prefix of the names of temporary folders and files
_LOCK_GRACE_SECONDS = 60.0  # a running process may not yet have locked a folder that is younger than this


@contextmanager
def scratch_folder() -> Iterator[None]:
    """Let `tempfile` create its files in a new folder during this block, and delete the folder at the end.

    First delete the folders of killed processes. They are unlocked, because a process locks its folder until it ends.
    If no folder can be created, `tempfile` is not changed, and its next call raises an error with the reason.
    """
    lock = None
    folder = None
    previous_tempdir = tempfile.tempdir
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

    Return None if the folder cannot be locked, for example because another process has locked it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


def _delete_abandoned(parent: Path) -> None:
    """Delete the scratch folders in `parent` that belong to processes that have ended."""
    for folder in parent.glob(f"{_PREFIX}[0-9]*-*"):
        with suppress(OSError):  # the folder belongs to another user, or another process has deleted it
            process_id = folder.name.removeprefix(_PREFIX).partition("-")[0]
            # A process that has just started may have created its folder but not yet locked it.
            if is_running(process_id) and time.time() - folder.stat().st_mtime < _LOCK_GRACE_SECONDS:
                continue
            if (lock := _lock_folder(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def is_running(process: str) -> bool:
    """Return whether `process` is the ID of another process that runs on this machine or in this container.

    The result is False for this process's own ID, and for a string that is not a number.
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
    """Create a temporary file whose name contains `purpose`, and open it for reading text.

    Other code can open the file by its name to write to it. It is deleted when the result is garbage-collected.
    """
    file = tempfile.NamedTemporaryFile("r", prefix=f"{_PREFIX}{purpose}-", delete=False)  # noqa: SIM115
    weakref.finalize(file, Path(file.name).unlink, missing_ok=True)  # missing if `scratch_folder` has deleted it
    return file
