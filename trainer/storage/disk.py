"""Full and failing disks: free space, and the translation of their errors to messages that name the folder."""

import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from trainer.errors import ConfigError, Interrupted, TrainerError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # in errors of other libraries recognized by their text
FAILED = (*FULL, errno.EIO)  # the same command can succeed later
_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
_TEXTS = tuple(os.strerror(number) for number in (*FAILED, errno.EROFS))  # in errors of libraries that write a run
MAKE_SPACE = "make space there, then start the same command again"
MAX_DISK_BUDGET = 50 * 1024**3  # by default
_NO_TEMPORARY_FOLDER = "No usable temporary directory"  # `tempfile`, if no disk has space


def format_bytes(count: float) -> str:
    """Format bytes as kB, MB or GB."""
    if count < 1e5:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def get_free_bytes(path: str | Path) -> int:
    """Return the free bytes of the file system of `path`, which need not exist yet.

    It is 0 if the file system does not respond.
    """
    try:
        return shutil.disk_usage(_nearest(path, os.path.exists)).free
    except OSError:
        return 0


def plan_disk_budget(requested: int | None, available: int, limit: int | None) -> tuple[int, str]:
    """Choose the bytes of each of the two caches (copies of the data, decoded images), with the reason.

    Args:
        requested: `runtime.disk_budget_gb`, in bytes; None for the default.
        available: bytes of the disk that are free or already hold caches.
        limit: bytes that Kubernetes lets the container use before it evicts the pod; None outside of a pod.

    By default a fifth of the space is left to weights, checkpoints and temporary files.
    """
    if requested is not None:
        return requested, "as configured"
    space, of = min((available, "the free disk"), (available if limit is None else limit, "the pod's limit"))
    budget = min(space * 2 // 5, MAX_DISK_BUDGET)
    return budget, "the default" if budget == MAX_DISK_BUDGET else f"two fifths of {of}, {space / 1e9:,.1f} GB"


@functools.cache  # caches grow while a process uses them
def choose_disk_budget(requested: int | None, cache_folder: Path) -> tuple[int, str]:
    """Choose the bytes of each cache in a folder of this machine as `plan_disk_budget` does."""
    text = os.environ.get("EPHEMERAL_STORAGE_BYTES", "").strip()
    if text and not re.fullmatch(r"[0-9]{1,18}", text):
        fix = "set it to limits.ephemeral-storage by the downward API, or unset it"
        raise ConfigError("is not a number of bytes", key="EPHEMERAL_STORAGE_BYTES", value=text, fix=fix)
    available = get_free_bytes(cache_folder) + _count_bytes(cache_folder) if requested is None else 0
    return plan_disk_budget(requested, available, int(text) if text else None)


def _count_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder; 0 if it does not exist. A file that disappears meanwhile is 0."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return size


def _nearest(path: str | Path, fulfills: Callable[[Path], bool]) -> Path:
    """Return the path, or the nearest of its parents, that fulfills a condition; the root fulfills all of them."""
    path = Path(os.path.expanduser(path)).absolute()
    return next((parent for parent in (path, *path.parents) if fulfills(parent)), Path(path.anchor))


def describe_failure(error: BaseException) -> str | None:
    """Describe a disk failure, such as "No space left on device"; None for any other error."""
    text = str(error)
    if isinstance(error, OSError) and error.errno and _NO_TEMPORARY_FOLDER not in text:
        return os.strerror(error.errno) if error.errno in FAILED else None
    if _NO_TEMPORARY_FOLDER in text:
        writable = [path for path in _paths(text) if os.access(path, os.W_OK)]
        return os.strerror(errno.ENOSPC) if writable else None
    return next((reason for reason in _TEXTS if reason in text), None)


def _paths(text: str) -> list[str]:
    """Return the absolute paths in a text; one with spaces ends where its folder exists."""
    paths = []
    for text_of_path in re.findall(r"(?<![\w./])/[^:;,'\"\n\[\]()]+", text):
        words = text_of_path.rstrip().split(" ")
        shorter = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
        paths.append(next((path for path in shorter if os.path.isdir(os.path.dirname(path))), words[0]))
    return paths


def translate_disk_error(
    error: BaseException, folders: Iterable[str | Path] = (), outcome: str = "", fix: str = MAKE_SPACE
) -> Interrupted | None:
    """Translate an error of a full or failing disk to `Interrupted`; None for any other error.

    Args:
        folders: candidates for the folder that could not be written. Those that the text of the error names come first,
            then its other paths, then all of them; the fullest is named.
        outcome: a clause for the message, such as "checkpoints are intact".
    """
    if (reason := describe_failure(error)) is None:
        return None
    given, path = [str(folder) for folder in folders], _file_of(error)
    named = [path] if path else [folder for folder in given if len(folder) > 1 and folder in str(error)]
    folder = _nearest(min(named or _paths(str(error)) or given or ["."], key=get_free_bytes), os.path.isdir)
    problem = f"{folder}: cannot be written to ({reason}, {get_free_bytes(folder) / 1e6:,.1f} MB free)"
    return Interrupted(problem + (f"; {outcome}" if outcome else ""), fix=fix)


def _file_of(error: BaseException) -> str | None:
    """Return the file that an OSError names; None if it names none, or only a descriptor."""
    filename = error.filename if isinstance(error, OSError) else None
    return os.fsdecode(filename) if filename and isinstance(filename, str | bytes | os.PathLike) else None


def access_error(error: BaseException) -> ConfigError | None:
    """Translate the error of a path that this process may not read or write; None for any other error."""
    if isinstance(error, OSError) and _NO_TEMPORARY_FOLDER in str(error):
        fix = "set TMPDIR to a folder that this process may write to"
        return ConfigError("no folder for temporary files can be written to", fix=fix)
    path = _file_of(error)
    if not (isinstance(error, OSError) and error.errno in _DENIED and path):
        return None
    existing = _nearest(path, os.path.lexists)
    what = "read or written" if os.path.lexists(path) else "written to"
    fix = "give another path, or change its permissions"
    return ConfigError(f"{existing}: cannot be {what} ({os.strerror(error.errno)})", fix=fix)


@contextlib.contextmanager
def file_errors() -> Iterator[None]:
    """Raise the errors of disks in this block as `disk_errors` does, and those of `access_error`; for a command."""
    try:
        with translate_disk_errors():
            yield
    except OSError as error:
        if translated := access_error(error):
            raise translated from error
        raise


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
