"""Disks that are full or fail: their free space, and the error for the user, which names the folder."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.errors import ConfigError, Interrupted, TrainerError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # also recognized by their text, in errors of other libraries
FAILED = (*FULL, errno.EIO)  # the same command can succeed later
MAKE_SPACE = "make space there, then start the same command again"
_NO_TEMPORARY_FOLDER = "No usable temporary directory"  # `tempfile`, if no disk has space


def get_free_bytes(path: str | Path) -> int:
    """Return the free space of the file system that has `path`, or would have it if it does not exist yet."""
    path = Path(path).expanduser().absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def describe_failure(error: BaseException) -> str | None:
    """Describe why a disk could not be written, such as "No space left on device"; None for any other error."""
    if isinstance(error, OSError) and error.errno in FAILED:
        return os.strerror(error.errno)
    text = str(error)
    if _NO_TEMPORARY_FOLDER in text:
        return os.strerror(errno.ENOSPC)
    return next((os.strerror(number) for number in FULL if os.strerror(number) in text), None)


def translate_disk_error(
    error: BaseException, folders: Iterable[str | Path] = (), outcome: str = "", fix: str = MAKE_SPACE
) -> Interrupted | None:
    """Translate the error of a full or failing disk; None for any other error.

    Args:
        folders: candidates for the folder that could not be written, if the error has no path: the fullest is named.
        outcome: a clause for the message, such as "checkpoints are intact".
    """
    if (reason := describe_failure(error)) is None:
        return None
    paths = [os.fsdecode(error.filename)] if isinstance(error, OSError) and error.filename else []
    paths = paths or re.findall(r"(?<![\w.])/[^\s:;,'\"]+", str(error))
    candidates = [Path(path) for path in paths] or [Path(folder) for folder in folders] or [Path()]
    path = min(candidates, key=get_free_bytes)
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    problem = f"{folder}: cannot be written to ({reason}, {get_free_bytes(folder) / 1e6:,.1f} MB free)"
    return Interrupted(problem + (f"; {outcome}" if outcome else ""), fix=fix)


@contextlib.contextmanager
def translate_disk_errors(
    folders: Iterable[str | Path] = (), outcome: str = "", fix: str = MAKE_SPACE
) -> Iterator[None]:
    """Raise the errors of a full or failing disk in this block as `Interrupted`; for the arguments see `translate_disk_error`."""
    try:
        yield
    except TrainerError:
        raise
    except Exception as error:
        if translated := translate_disk_error(error, folders, outcome, fix):
            raise translated from error
        raise


def make_write_error(
    error: OSError, folder: str | Path, key: str, fix: str, kind: type[TrainerError] = ConfigError
) -> TrainerError:
    """Return the error for a folder, the value of `key`, that cannot be written: `Interrupted` if its disk is full."""
    if full := translate_disk_error(error, [folder]):
        return full
    return kind(f"cannot be written to ({error.strerror or error})", key=key, value=folder, fix=fix)
