"""Another deadline for a while; apart from `retrying`, whose clients of a bucket take long to import."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Another deadline than `retrying.DEADLINE` for the operations inside the block (in this thread)."""
    token = _deadline.set(seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def chosen() -> float | None:
    """Seconds; None outside of `within`."""
    return _deadline.get()
