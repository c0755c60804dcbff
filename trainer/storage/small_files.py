"""Read the small JSON files that this package wrote, and set damaged ones aside."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import DataError
from trainer.storage.path import StoragePath, storage_path

T = TypeVar("T")
D = TypeVar("D")
# What parsing damaged content, or content of another shape, raises.
CONTENT_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)


def require_json_object(value: Any) -> dict[str, Any]:
    """Return a JSON value that is an object; raise a ValueError for any other."""
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object, but {type(value).__name__}")
    return value


def require_json_objects(value: Any) -> list[dict[str, Any]]:
    """Return a JSON value that is a list of objects; raise a ValueError for any other."""
    if not isinstance(value, list):
        raise ValueError(f"not a JSON list, but {type(value).__name__}")
    return [require_json_object(item) for item in value]


def require_nonnegative(value: Any) -> float:
    """Return a number that is finite and not negative; raise a ValueError for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{value!r} is not a finite number of at least 0")
    return float(value)


def parse_json(content: bytes | str, shape: Callable[[Any], T], name: object, fix: str) -> T:
    """Parse JSON; `shape` checks the value and returns what a caller needs, and raises one of `CONTENT_ERRORS` if wrong.

    Raises DataError, which names the file, if the content is damaged or has another shape.
    """
    try:
        return shape(json.loads(content))
    except CONTENT_ERRORS as error:
        reason = (str(error).splitlines() or [""])[0] if isinstance(error, ValueError) else repr(error)
        raise DataError(f"{name} is damaged ({reason or repr(error)})", fix=fix) from None


def read_json(path: StoragePath | Path, shape: Callable[[Any], T], fix: str) -> T | None:
    """Read a file and parse it with `parse_json`; None if it does not exist."""
    content = storage_path(path).fetch()
    return None if content is None else parse_json(content[0], shape, path, fix)


def read_json_or_default(path: Path, shape: Callable[[Any], T], default: D) -> T | D:
    """Read a file that a run can do without: `default` if it is missing, damaged, or cannot be read."""
    try:
        value = read_json(path, shape, "")
    except DataError:
        return default
    return default if value is None else value


def set_aside(path: Path) -> Path:
    """Rename a damaged file to NAME.damaged, and return the new path; an earlier one is replaced."""
    return path.replace(path.with_name(f"{path.name}.damaged"))
