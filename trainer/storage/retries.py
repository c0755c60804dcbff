"""Retries of requests to a bucket: deadlines, timeouts, backoff, and the errors that all storages have in common."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from trainer.errors import Interrupted, TrainerError
from trainer.storage import base

DEADLINE_SECONDS = 120.0  # maximum duration of a request by default, retries included
CONNECT_SECONDS = 10.0  # timeout of connecting, per attempt
READ_SECONDS = 30.0  # timeout of reading, per attempt
INITIAL_BACKOFF_SECONDS = 0.5  # doubled at each retry; the pause is uniformly random between 0 and the backoff
MAX_BACKOFF_SECONDS = 16.0
MAX_BAD_REQUESTS = 5  # retries after responses with status 400, because a request can be corrupted in transit
TRANSIENT_CODES = {408, 429, 500, 502, 503, 504}  # HTTP statuses after which a retry can succeed
NO_BUCKET = "there is no such bucket, or this account has no access to it"
CHECK_BUCKET = "check the address"

# Not seeded, because all workers of a run have the same seed and would retry at the same time.
_jitter = random.SystemRandom()

Timeouts = tuple[float, float]  # connect and read timeout in seconds
Result = TypeVar("Result")


class CorruptTransfer(Exception):
    """Transferred data has the wrong checksum or length. It is transferred again."""


@dataclass(frozen=True)
class Transient:
    """An error after which a retry can succeed."""

    reason: str  # for the message at the deadline
    retry_after: float = 0.0  # seconds that the server requires until the next request
    immediately: bool = False  # the request has been corrected, so that no pause is needed


def get_deadline() -> float:
    """Return the seconds that a request may take, retries included: those of `request_deadline` or the default."""
    return base.deadline_seconds.get() or DEADLINE_SECONDS


def call_with_retries(
    address: str,
    request: Callable[[Timeouts], Result],
    classify: Callable[[Exception], Transient | TrainerError | None],
) -> Result:
    """Call `request`, and retry after transient errors until the deadline.

    Args:
        address: of the object, for the message of a timeout.
        request: makes one attempt with the given connect and read timeouts.
        classify: translates an error of `request` to `Transient` if a retry can succeed, or to the error to raise. It
            returns None for an error of unknown origin, which is raised as it is.

    Raises:
        Interrupted: no attempt succeeded before the deadline.
        DataError: `classify` returned it for a permanent error.
    """
    deadline, start, backoff = get_deadline(), time.monotonic(), INITIAL_BACKOFF_SECONDS
    while True:
        remaining = max(deadline - (time.monotonic() - start), 0.05)
        try:
            return request((min(CONNECT_SECONDS, remaining), min(READ_SECONDS, remaining)))
        except Exception as error:
            verdict = classify(error)
            if verdict is None:
                raise
            if isinstance(verdict, TrainerError):
                raise verdict from error
            if verdict.immediately:
                continue
            remaining = deadline - (time.monotonic() - start)
            if remaining <= 0:
                raise make_timeout_error(address, deadline, verdict.reason) from error
            pause = max(_jitter.uniform(0, backoff), verdict.retry_after)
        time.sleep(min(pause, remaining))
        backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)


def make_timeout_error(address: str, seconds: float, reason: str) -> Interrupted:
    """Make the error for a storage that did not respond within `seconds`. The same command can succeed later."""
    problem = f"{address}: no request succeeded within {seconds:g} s ({reason})"
    return Interrupted(problem, fix="start the same command again: everything saved is intact")
