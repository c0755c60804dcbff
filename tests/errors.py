"""Assertions on errors by their attributes: key, value, problem and fix."""

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
    error_class: type[E], key: str | None = None, value: object = ANY, fix: str = "", problem: str = ""
) -> Iterator[pytest.ExceptionInfo[E]]:
    """Assert that the block raises an error of exactly this class, with this key and value.

    `fix` and `problem` are regular expressions that are searched for in these attributes of the error.
    """
    with pytest.raises(error_class) as caught:
        yield caught
    error = caught.value
    assert (type(error), error.key) == (error_class, key), str(error)
    assert value is ANY or error.value == value, str(error)
    assert re.search(fix, error.fix or ""), str(error)
    assert re.search(problem, error.problem), str(error)
