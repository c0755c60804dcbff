"""Trying again what a network breaks: time limits, jittered exponential back-off, a deadline."""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Callable
from typing import TypeVar

import requests
import urllib3
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import RefreshError, TransportError
from google.cloud.storage.exceptions import DataCorruption

from trainer.errors import Interrupted
from trainer.storage.deadline import chosen

DEADLINE = 120.0  # seconds from the first try of an operation (of each part, of a large one) to giving up
CONNECT = 10.0  # seconds to wait for a connection
SILENCE = 30.0  # seconds without a byte after which a request is taken for lost
FIRST_PAUSE = 0.5  # seconds; the pause is drawn from 0 to this, to twice this, ...
LONGEST_PAUSE = 16.0
DAMAGED_REQUESTS = 5  # times that a 400 is taken for a request damaged on its way

_TRANSIENT_CODES = {408, 429, 500, 502, 503, 504}
_TRANSIENT = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError)
_WRONG_ADDRESS = (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema)
# From the system's noise, not the run's seed: workers that wait for one bucket must not come back together.
_noise = random.SystemRandom()

Limits = tuple[float, float]  # seconds to connect, seconds of silence
Result = TypeVar("Result")


class Damaged(Exception):
    """What arrived is not what was sent: its checksum or length differs."""


def persist(address: str, call: Callable[[Limits], Result]) -> Result:
    """What `call` returns, called again while it fails for a passing reason.

    Raises `Interrupted` when the deadline has passed, and any other error of `call` as it is.
    """
    deadline = chosen() or DEADLINE
    start = time.monotonic()
    pause, damaged = FIRST_PAUSE, 0
    while True:
        left = max(deadline - (time.monotonic() - start), 0.05)
        try:
            return call((min(CONNECT, left), min(SILENCE, left)))
        except Exception as error:
            reason = passing(error)
            if isinstance(error, GoogleAPICallError) and error.code == 400:
                damaged += 1
                reason = None if damaged > DAMAGED_REQUESTS else "400 damaged request"
            if reason is None:
                raise
            left = deadline - (time.monotonic() - start)
            if left <= 0:
                raise Interrupted(
                    f"{address}: the storage did not answer for {deadline:g} s ({reason}); "
                    "what was saved before is intact, start the same command again"
                ) from error
            wait = max(_noise.uniform(0, pause), _retry_after(error))
        time.sleep(min(wait, left))
        pause = min(2 * pause, LONGEST_PAUSE)


def passing(error: Exception) -> str | None:
    """Why the same request may succeed later; None where it cannot."""
    if isinstance(error, Damaged | DataCorruption):
        return f"damaged answer: {error}" if isinstance(error, Damaged) else "damaged answer"
    if isinstance(error, GoogleAPICallError):
        limited = error.code == 403 and "ratelimitexceeded" in str(error.errors).lower()
        if error.code in _TRANSIENT_CODES or limited:
            return f"{int(error.code or 0)} {http.client.responses.get(int(error.code or 0), '')}".strip()
        return None
    if isinstance(error, RefreshError):
        return "no access token" if error.retryable else None
    if isinstance(error, TransportError):
        return "the server of access tokens cannot be reached"
    if isinstance(error, _WRONG_ADDRESS):
        return None
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError | urllib3.exceptions.ProtocolError):
        return "connection broken"
    if isinstance(error, requests.ConnectionError | ConnectionError):
        return "connection refused" if "refused" in str(error) else "no connection"
    return type(error).__name__ if isinstance(error, _TRANSIENT) else None


def _retry_after(error: Exception) -> float:
    """Seconds that the server asked to wait, 0 where it did not."""
    response = getattr(error, "response", None)
    asked = getattr(response, "headers", {}).get("Retry-After", "0")
    return float(asked) if asked.isdigit() else 0.0
