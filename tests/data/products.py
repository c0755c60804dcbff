"""Products of parameters of which the quick tests run a covering part, and `make test-all` everything."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def make_combinations(is_quick: Callable[..., bool], *values: Iterable[Any]) -> list[Any]:
    """The product of `values`, for `pytest.mark.parametrize`; those for which `is_quick` is false are marked slow."""
    made = [pytest.param(*v, marks=() if is_quick(*v) else pytest.mark.slow) for v in product(*values)]
    assert any(not parameters.marks for parameters in made)
    return made
