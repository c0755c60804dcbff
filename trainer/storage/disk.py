"""Full and failing disks: free space, and the translation of their errors to messages that name the folder."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.errors import ConfigError, Interrupted, TrainerError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # in errors of other libraries recognized by their text
FAILED = (*FULL, errno.EIO)  # the same command can succeed later
MAKE_SPACE = "make space there, then start the same command again"
_NO_TEMPORARY_FOLDER = "No usable temporary directory"  # `tempfile`, if no disk has space


def get_free_bytes(path: str | Path) -> int:
    """Return the free bytes of the file system of `path`, which need not exist yet."""
    path = Path(path).expanduser().absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def describe_failure(error: BaseException) -> str | None:
    """Describe a disk failure, such as "No space left on device"; None for any other error."""
    if isinstance(error, OSError) and error.errno in FAILED:
        return os.strerror(error.errno)
    text = str(error)
    if _NO_TEMPORARY_FOLDER in text:
        return os.strerror(errno.ENOSPC)
    return next((os.strerror(code) for code in FULL if os.strerror(code) in text), None)


def translate_disk_error(
    error: BaseException, folders: Iterable[str | Path] = (), outcome: str = "", fix: str = MAKE_SPACE
) -> Interrupted | None:
    """Translate an error of a full or failing disk to `Interrupted`; None for any other error.

    Args:
        folders: if the error has no path, the one of these folders whose disk has the least free space is named.
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
    """Translate the errors in this block with `translate_disk_error`, which documents the arguments."""
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
    """Make the error for an unwritable folder, the value of `key`: `Interrupted` if the disk is full or fails."""
    if interrupted := translate_disk_error(error, [folder]):
        return interrupted
    return kind(f"cannot be written to ({error.strerror or error})", key=key, value=folder, fix=fix)
