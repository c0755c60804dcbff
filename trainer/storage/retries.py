"""Retries of requests to a bucket: deadlines, timeouts, backoff, and the errors that are common to all storages."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from trainer.errors import Interrupted, TrainerError
from trainer.storage import base

DEADLINE_SECONDS = 120.0  # default maximum duration of a request, including retries
CONNECT_SECONDS = 10.0  # connect timeout of each attempt
READ_SECONDS = 30.0  # read timeout of each attempt
INITIAL_BACKOFF_SECONDS = 0.5  # doubled at each retry; the pause is uniformly random between 0 and the backoff
MAX_BACKOFF_SECONDS = 16.0
MAX_BAD_REQUESTS = 5  # retries after responses with status 400, because a request can be corrupted in transit
TRANSIENT_STATUSES = {408, 429, 500, 502, 503, 504}  # HTTP statuses after which a retry can succeed
NO_BUCKET_PROBLEM = "there is no such bucket, or this account has no access to it"  # problem in error messages
CHECK_BUCKET_FIX = "check the address"  # fix in error messages

# Not seeded, because all workers in a run have the same seed and would retry at the same time.
_jitter = random.SystemRandom()

Timeouts = tuple[float, float]  # connect and read timeout in seconds
Result = TypeVar("Result")


class CorruptTransfer(Exception):
    """Transferred data has a wrong checksum or length, so that it has to be transferred again."""


@dataclass(frozen=True)
class Transient:
    """An error after which a retry can succeed."""

    reason: str  # short description, such as "timeout", for the error message if the deadline passes
    retry_after: float = 0.0  # minimum pause before the next request in seconds, as the server requires
    immediately: bool = False  # whether to retry without a pause, because the request has been corrected


def get_deadline() -> float:
    """Return the maximum duration of a request in seconds, including retries, which `base.request_deadline` can set."""
    return base.deadline_seconds.get() or DEADLINE_SECONDS


def call_with_retries(
    address: str,
    request: Callable[[Timeouts], Result],
    classify: Callable[[Exception], Transient | TrainerError | None],
) -> Result:
    """Call `request`, and retry after transient errors until the deadline.

    Args:
        address: address of the object, for the error message at the deadline.
        request: makes one attempt with these connect and read timeouts in seconds.
        classify: translates an error of `request` to a Transient if a retry can succeed, or to the error to raise. If
            it returns None, the original error is raised.

    Raises:
        Interrupted: no attempt succeeded before the deadline.
        TrainerError: `classify` returned this error because a retry cannot succeed.
    """
    max_seconds = get_deadline()
    start = time.monotonic()
    backoff = INITIAL_BACKOFF_SECONDS
    while True:
        remaining = max(max_seconds - (time.monotonic() - start), 0.05)
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
            remaining = max_seconds - (time.monotonic() - start)
            if remaining <= 0:
                raise make_timeout_error(address, max_seconds, verdict.reason) from error
            pause = max(_jitter.uniform(0, backoff), verdict.retry_after)
        time.sleep(min(pause, remaining))
        backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)


def make_timeout_error(address: str, seconds: float, reason: str) -> Interrupted:
    """Make the error for a request that did not succeed within `seconds`. `reason` describes the last failure."""
    problem = f"{address}: no request succeeded within {seconds:g} s ({reason})"
    return Interrupted(problem, fix="start the same command again: everything saved is intact")
