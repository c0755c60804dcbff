"""Read and validate small JSON files that this package has written, and set corrupt files aside."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import DataError
from trainer.storage.path import StoragePath, storage_path

T = TypeVar("T")
D = TypeVar("D")
# Errors from parsing corrupt JSON, and from reading the fields of JSON with an unexpected structure.
CONTENT_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)


def require_json_object(value: Any) -> dict[str, Any]:
    """Return a JSON object unchanged; raise a ValueError for any other value."""
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object, but {type(value).__name__}")
    return value


def require_json_objects(value: Any) -> list[dict[str, Any]]:
    """Return a list of JSON objects unchanged; raise a ValueError for any other value."""
    if not isinstance(value, list):
        raise ValueError(f"not a JSON list, but {type(value).__name__}")
    return [require_json_object(item) for item in value]


def require_nonnegative(value: Any) -> float:
    """Return a finite number that is at least 0 as a float; raise a ValueError for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{value!r} is not a finite number of at least 0")
    return float(value)


def parse_json(content: bytes | str, convert: Callable[[Any], T], name: object, fix: str) -> T:
    """Parse JSON, and validate and convert the value with `convert`.

    Args:
        content: content of the file, as text or UTF-8 bytes.
        convert: returns the converted value, or raises one of `CONTENT_ERRORS` if the value is invalid.
        name: name of the file, for the error message.
        fix: what the user can do about a corrupt file, for the error message.

    Raises:
        DataError: the content is not JSON, or `convert` rejects the value.
    """
    try:
        return convert(json.loads(content))
    except CONTENT_ERRORS as error:
        reason = (str(error).splitlines() or [""])[0] if isinstance(error, ValueError) else repr(error)
        raise DataError(f"{name} is corrupt ({reason or repr(error)})", fix=fix) from None


def read_json(path: StoragePath | Path, convert: Callable[[Any], T], fix: str) -> T | None:
    """Read a JSON file and convert its value with `convert` (see `parse_json`). Return None if it does not exist.

    Raises:
        DataError: the file is corrupt or cannot be read.
        Interrupted: the bucket does not respond.
    """
    content = storage_path(path).fetch()
    return None if content is None else parse_json(content[0], convert, path, fix)


def read_json_or_default(path: Path, convert: Callable[[Any], T], default: D) -> T | D:
    """Call `read_json` for an optional local file. Return `default` if it is missing, corrupt or unreadable."""
    try:
        value = read_json(path, convert, fix="")
    except DataError:
        return default
    return default if value is None else value


def rename_corrupt_file(path: Path) -> Path:
    """Rename a corrupt file to `NAME.damaged`, and return the new path. Replace an earlier file of this name."""
    return path.replace(path.with_name(f"{path.name}.damaged"))
