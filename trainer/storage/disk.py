"""Free disk space, the size limits of caches on disk, and the translation of file errors to errors with a fix."""

import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from trainer.errors import ConfigError, Interrupted, TrainerError

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # error numbers: full disk, exceeded quota, too large file
RETRYABLE_ERRNOS = (*DISK_FULL_ERRNOS, errno.EIO)  # error numbers after which the same command can succeed later
_UNUSABLE_PATH_ERRNOS = (  # error numbers after which the user must change the path or its permissions
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip
# Texts that identify disk errors without an error number, such as TensorFlow's. A failing disk becomes read-only.
_DISK_ERROR_TEXTS = tuple(os.strerror(errno_value) for errno_value in (*RETRYABLE_ERRNOS, errno.EROFS))
FREE_SPACE_FIX = "make space there, then start the same command again"
DEFAULT_CACHE_LIMIT_BYTES = 50 * 1024**3  # upper limit of the default size of a cache; users can configure more
_NO_TEMP_DIR_TEXT = "No usable temporary directory"  # error message of `tempfile` if all folders are full or unwritable


def format_bytes(count: float) -> str:
    """Format a number of bytes in kB, MB or GB (10^3, 10^6 or 10^9 bytes), such as "12.3 MB"."""
    if count < 1e5:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def get_free_bytes(path: str | Path) -> int:
    """Return the free bytes on the file system that contains `path`, or 0 if the file system reports an error.

    `path` need not exist.
    """
    try:
        return shutil.disk_usage(_find_nearest_ancestor(path, os.path.exists)).free
    except OSError:
        return 0


def plan_disk_budget(requested: int | None, available: int, limit: int | None) -> tuple[int, str]:
    """Choose the size limit of each cache on disk: copies of remote data, decoded images, cached features.

    By default, a cache may use two fifths of the space, but at most `DEFAULT_CACHE_LIMIT_BYTES`. Two full caches then
    leave at least a fifth for weights, checkpoints and temporary files.

    Args:
        requested: `runtime.disk_budget_gb`, converted to bytes; None for the default.
        available: bytes on the disk that are free or used by caches.
        limit: bytes that the container may use before Kubernetes evicts the pod; None if there is no such limit.

    Returns:
        The limit of one cache in bytes, and the reason for it, such as "as configured".
    """
    if requested is not None:
        return requested, "as configured"
    space, source = min((available, "the free disk"), (available if limit is None else limit, "the pod's limit"))
    budget = min(space * 2 // 5, DEFAULT_CACHE_LIMIT_BYTES)
    return (
        budget,
        "the default" if budget == DEFAULT_CACHE_LIMIT_BYTES else f"two fifths of {source}, {space / 1e9:,.1f} GB",
    )


@functools.cache  # one limit per process, although the free space changes while the process fills its caches
def choose_disk_budget(requested: int | None, cache_folder: Path) -> tuple[int, str]:
    """Return the size limit of each cache in bytes, and the reason for it, such as "as configured".

    It is the result of `plan_disk_budget` for the space in `cache_folder` and the limit in $EPHEMERAL_STORAGE_BYTES.

    Raises:
        ConfigError: $EPHEMERAL_STORAGE_BYTES is not a number of bytes.
    """
    text = os.environ.get("EPHEMERAL_STORAGE_BYTES", "").strip()
    if text and not re.fullmatch(r"[0-9]{1,18}", text):
        fix = "set it to limits.ephemeral-storage by the downward API, or unset it"
        raise ConfigError("is not a number of bytes", key="EPHEMERAL_STORAGE_BYTES", value=text, fix=fix)
    available = get_free_bytes(cache_folder) + _compute_disk_usage(cache_folder) if requested is None else 0
    return plan_disk_budget(requested, available, int(text) if text else None)


def _compute_disk_usage(folder: Path) -> int:
    """Return how many bytes the files below a folder use on disk, or 0 if the folder does not exist."""
    num_bytes = 0
    for dirpath, _, filenames in os.walk(folder):
        for filename in filenames:
            with contextlib.suppress(OSError):  # another process has deleted the file
                num_bytes += os.lstat(os.path.join(dirpath, filename)).st_blocks * 512  # st_blocks counts 512 bytes
    return num_bytes


def _find_nearest_ancestor(path: str | Path, predicate: Callable[[Path], bool]) -> Path:
    """Return the first of `path` and its ancestors for which `predicate` is true, or the root if it is for none."""
    path = Path(os.path.expanduser(path)).absolute()
    return next((ancestor for ancestor in (path, *path.parents) if predicate(ancestor)), Path(path.anchor))


def describe_failure(error: BaseException) -> str | None:
    """Return the reason for a disk failure, such as "No space left on device", or None for any other error.

    An error without an error number is recognized by its text.
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno and _NO_TEMP_DIR_TEXT not in text:
        return os.strerror(error.errno) if error.errno in RETRYABLE_ERRNOS else None
    if _NO_TEMP_DIR_TEXT in text:
        # `tempfile` raises the same error for full and unwritable folders. A writable folder must be full.
        writable_folders = [path for path in _extract_paths(text) if os.access(path, os.W_OK)]
        return os.strerror(errno.ENOSPC) if writable_folders else None
    return next((reason for reason in _DISK_ERROR_TEXTS if reason in text), None)


def _extract_paths(text: str) -> list[str]:
    """Return the absolute paths in a text.

    A path may contain spaces. It is the longest sequence of words whose parent folder exists, or else a single word.
    """
    paths = []
    for candidate in re.findall(r"(?<![\w./])/[^:;,'\"\n\[\]()]+", text):
        words = candidate.rstrip().split(" ")
        prefixes = [" ".join(words[:num_words]) for num_words in range(len(words), 0, -1)]
        paths.append(next((path for path in prefixes if os.path.isdir(os.path.dirname(path))), words[0]))
    return paths


def translate_disk_error(
    error: BaseException, folders: Iterable[str | Path] = (), outcome: str = "", fix: str = FREE_SPACE_FIX
) -> Interrupted | None:
    """Translate an error of a full or failing disk to an Interrupted. Return None for any other error.

    Args:
        folders: folders that the message can name if the error has no file name. It names one that is in the error's
            text, otherwise another path in the text, one of `folders`, or the working directory. If there are several
            candidates, it names the one with the least free space.
        outcome: clause for the message, such as "checkpoints are intact".
        fix: what the user can do.
    """
    if (reason := describe_failure(error)) is None:
        return None
    folder_names = [str(folder) for folder in folders]
    filename = _get_filename(error)
    paths = [filename] if filename else [name for name in folder_names if len(name) > 1 and name in str(error)]
    folder = _find_nearest_ancestor(
        min(paths or _extract_paths(str(error)) or folder_names or ["."], key=get_free_bytes), os.path.isdir
    )
    problem = f"{folder}: cannot be written to ({reason}, {get_free_bytes(folder) / 1e6:,.1f} MB free)"
    return Interrupted(problem + (f"; {outcome}" if outcome else ""), fix=fix)


def _get_filename(error: BaseException) -> str | None:
    """Return the path in an OSError. Return None if it contains no path or a file descriptor, and for other errors."""
    filename = error.filename if isinstance(error, OSError) else None
    return os.fsdecode(filename) if filename and isinstance(filename, str | bytes | os.PathLike) else None


def translate_access_error(error: BaseException) -> ConfigError | None:
    """Translate an error about an unusable path, such as a denied permission or a name that is too long.

    Return None for any other error.
    """
    if isinstance(error, OSError) and _NO_TEMP_DIR_TEXT in str(error):
        fix = "set TMPDIR to a folder that this process may write to"
        return ConfigError("no folder for temporary files can be written to", fix=fix)
    path = _get_filename(error)
    if not (isinstance(error, OSError) and error.errno in _UNUSABLE_PATH_ERRNOS and path):
        return None
    existing_path = _find_nearest_ancestor(path, os.path.lexists)
    action = "read or written" if os.path.lexists(path) else "written to"
    fix = "give another path, or change its permissions"
    return ConfigError(f"{existing_path}: cannot be {action} ({os.strerror(error.errno)})", fix=fix)


@contextlib.contextmanager
def translate_file_errors() -> Iterator[None]:
    """Translate file errors in this block with `translate_disk_error` and `translate_access_error`."""
    try:
        with translate_disk_errors():
            yield
    except OSError as error:
        if translated := translate_access_error(error):
            raise translated from error
        raise


@contextlib.contextmanager
def translate_disk_errors(
    folders: Iterable[str | Path] = (), outcome: str = "", fix: str = FREE_SPACE_FIX
) -> Iterator[None]:
    """Translate errors in this block with `translate_disk_error`, which has the same arguments."""
    try:
        yield
    except TrainerError:  # already has a message for the user
        raise
    except Exception as error:
        if translated := translate_disk_error(error, folders, outcome, fix):
            raise translated from error
        raise


def make_write_error(
    error: OSError, folder: str | Path, key: str, fix: str, error_class: type[TrainerError] = ConfigError
) -> TrainerError:
    """Make the error for an unwritable `folder`, which is the value of the argument or configuration key `key`.

    The result is an Interrupted if the disk is full or fails; otherwise, it has the type `error_class` and this `fix`.
    """
    if interrupted := translate_disk_error(error, [folder]):
        return interrupted
    return error_class(f"cannot be written to ({error.strerror or error})", key=key, value=folder, fix=fix)
