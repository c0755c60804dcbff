"""Read the small JSON files that this package wrote, and set corrupt ones aside."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import DataError
from trainer.storage.path import StoragePath, storage_path

T = TypeVar("T")
D = TypeVar("D")
# Raised by parsing corrupt JSON, or JSON of another shape.
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
    """Return a finite number of at least 0 as a float; raise a ValueError for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{value!r} is not a finite number of at least 0")
    return float(value)


def parse_json(content: bytes | str, shape: Callable[[Any], T], name: object, fix: str) -> T:
    """Parse JSON and return `shape(value)`.

    `shape` validates the value, converts it, and raises one of `CONTENT_ERRORS` if it is invalid. Raises a DataError
    with the file `name` if the content is corrupt or invalid.
    """
    try:
        return shape(json.loads(content))
    except CONTENT_ERRORS as error:
        reason = (str(error).splitlines() or [""])[0] if isinstance(error, ValueError) else repr(error)
        raise DataError(f"{name} is corrupt ({reason or repr(error)})", fix=fix) from None


def read_json(path: StoragePath | Path, shape: Callable[[Any], T], fix: str) -> T | None:
    """Read a file and parse it with `parse_json`; None if it does not exist."""
    content = storage_path(path).fetch()
    return None if content is None else parse_json(content[0], shape, path, fix)


def read_json_or_default(path: Path, shape: Callable[[Any], T], default: D) -> T | D:
    """Read a file that a run can do without. Returns `default` if it is missing, corrupt or unreadable."""
    try:
        value = read_json(path, shape, "")
    except DataError:
        return default
    return default if value is None else value


def set_aside(path: Path) -> Path:
    """Rename a corrupt file to NAME.damaged, replacing an earlier one, and return the new path."""
    return path.replace(path.with_name(f"{path.name}.damaged"))
