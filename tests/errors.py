"""Assertions on errors by their parts: key, value and fix."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from trainer.errors import TrainerError

ANY = object()
E = TypeVar("E", bound=TrainerError)


@contextmanager
def raises(
    kind: type[E], key: str | None = None, value: object = ANY, fix: str = "", problem: str = ""
) -> Iterator[pytest.ExceptionInfo[E]]:
    """The block raises exactly `kind`, with this key, value, and regular expressions that its fix and problem match."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert (type(error), error.key) == (kind, key), str(error)
    assert value is ANY or error.value == value, str(error)
    assert re.search(fix, error.fix or ""), str(error)
    assert re.search(problem, error.problem), str(error)
