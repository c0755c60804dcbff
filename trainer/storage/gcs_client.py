"""The one client of the process for Google Cloud Storage: identity, retries, deadlines, and the meaning of refusals."""

import http.client
import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import google.auth
import requests
import urllib3
from google.api_core.exceptions import ClientError, GoogleAPICallError, NotFound
from google.auth import external_account
from google.auth.credentials import AnonymousCredentials, Credentials, with_scopes_if_required
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError, TransportError
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from requests.adapters import HTTPAdapter

from trainer.errors import DataError, Interrupted
from trainer.private_api import credentials_of, disable_bucket_metadata, mount_transport
from trainer.storage import base

DEADLINE = 120.0  # seconds from the first try of an operation (of each part, of a large one) to giving up
CONNECT = 10.0  # seconds to wait for a connection
SILENCE = 30.0  # seconds without a byte after which a request is taken for lost
FIRST_PAUSE = 0.5  # seconds; the pause is drawn from 0 to this, to twice this, ...
LONGEST_PAUSE = 16.0
DAMAGED_REQUESTS = 5  # times that a 400 is taken for a request damaged on its way
POD_SECONDS = 20.0  # of a pod's life in which missing credentials may still come
THREADS = 16  # connections kept open; more threads than this open and close theirs
NO_BUCKET = "there is no such bucket, or it is not yours to see"

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_HOW = (
    "run `gcloud auth application-default login`, give the pod a service account (workload identity), or set "
    "GOOGLE_APPLICATION_CREDENTIALS (STORAGE_EMULATOR_HOST for an emulator)"
)
_TRANSIENT_CODES = {408, 429, 500, 502, 503, 504}
_TRANSIENT = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError)
_WRONG_ADDRESS = (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema)
# From the system's noise, not the run's seed: workers that wait for one bucket must not come back together.
_noise = random.SystemRandom()
_clients: dict[tuple[int, str | None], Any] = {}
_lock = threading.Lock()

Limits = tuple[float, float]  # seconds to connect, seconds of silence
Result = TypeVar("Result")


class Damaged(Exception):
    """What arrived is not what was sent: its checksum or length differs."""


def persist(address: str, permission: str, call: Callable[[Limits], Result]) -> Result:
    """Call, again while it fails for a passing reason.

    Args:
        permission: that the operation needs, for the message.

    Raises:
        Interrupted: the deadline has passed.
        DataError: Google's client reports a lasting error; any other error of `call` is raised as it is.
    """
    deadline = base.deadline.get() or DEADLINE
    start = time.monotonic()
    pause, damaged = FIRST_PAUSE, 0
    while True:
        left = max(deadline - (time.monotonic() - start), 0.05)
        try:
            return call((min(CONNECT, left), min(SILENCE, left)))
        except Exception as error:
            reason = _passing(error)
            if isinstance(error, GoogleAPICallError) and error.code == 400:
                damaged += 1
                reason = None if damaged > DAMAGED_REQUESTS else "400 damaged request"
            if reason is None:
                explained = _explained(error, address, permission)
                if explained is None:
                    raise
                raise explained from error
            left = deadline - (time.monotonic() - start)
            if left <= 0:
                raise Interrupted(
                    f"{address}: the storage did not answer for {deadline:g} s ({reason}); "
                    "what was saved before is intact, start the same command again"
                ) from error
            asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "0")
            wait = max(_noise.uniform(0, pause), float(asked) if asked.isdigit() else 0.0)
        time.sleep(min(wait, left))
        pause = min(2 * pause, LONGEST_PAUSE)


def _passing(error: Exception) -> str | None:
    """The reason why the same request may succeed later; None where it cannot."""
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


def client() -> Any:
    """The `storage.Client` of this process, made at the first call; anonymous where no credentials are found.

    Connections do not survive a fork and an emulator is another server: each has a client of its own.
    """
    key = (os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST"))
    with _lock:
        if key not in _clients:
            _clients[key] = _connect(emulated=bool(key[1]))
        return _clients[key]


def _connect(emulated: bool) -> Any:
    credentials: Credentials = AnonymousCredentials()
    project = None
    if not emulated:
        try:
            credentials, project = _find_credentials()
            credentials = with_scopes_if_required(credentials, [_SCOPE])
        except DefaultCredentialsError as error:
            if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
                raise DataError(f"GOOGLE_APPLICATION_CREDENTIALS: {str(error).splitlines()[0]}") from error
    made = storage.Client(project=project, credentials=credentials)
    mount_transport(made, HTTPAdapter(pool_connections=4, pool_maxsize=THREADS))
    disable_bucket_metadata(made)
    return made


def _find_credentials() -> tuple[Credentials, str | None]:
    """Credentials and project. A pod asks again for a while: GKE's metadata server may not answer in its first seconds.

    Raises:
        DefaultCredentialsError: there are none.
    """
    patient = "KUBERNETES_SERVICE_HOST" in os.environ and "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ
    deadline = time.monotonic() + (POD_SECONDS if patient else 0.0)
    while True:
        try:
            # With the scope given here, identity federation would ask Google for the project's name, which objects
            # do not need and a closed network does not allow.
            return google.auth.default()
        except DefaultCredentialsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def identity() -> str:
    """The account that the storage sees, in words."""
    credentials = credentials_of(client())
    email = getattr(credentials, "service_account_email", None)
    if isinstance(credentials, AnonymousCredentials):
        return "nobody (anonymous)"
    if isinstance(credentials, external_account.Credentials):
        impersonated = f" as service account {email}" if email else ""
        return f"workload identity pool {credentials.info['audience']}{impersonated}"
    if email == "default":  # its name is asked for with the first token
        return "the default service account of this pod or machine"
    if email:
        return f"service account {email}"
    user = f"user {getattr(credentials, 'account', None) or ''}".strip()
    return f"application default credentials ({user})"


def _explained(error: Exception, address: str, permission: str) -> DataError | None:
    """The `DataError` that explains an error of Google's client; None where it is none of theirs."""
    if isinstance(error, NotFound):
        return DataError(f"{address}: {NO_BUCKET}")
    denied = isinstance(error, GoogleAPICallError) and error.code in (401, 403)
    if denied or isinstance(error, GoogleAuthError):  # the second: after a 401 the client asks for a new token
        anonymous = isinstance(credentials_of(client()), AnonymousCredentials)
        if anonymous and "STORAGE_EMULATOR_HOST" not in os.environ:
            return DataError(f"{address}: is not public, and no credentials were found; {_HOW}")
    if isinstance(error, ClientError):  # 401 and 403 as well
        answer = f"({int(error.code or 0)}: {error.message})"
        if denied:
            named = re.findall(r"storage\.\w+\.\w+", str(error.message))
            return DataError(f"{address}: {identity()} lacks the permission {(named or [permission])[0]} {answer}")
        return DataError(f"{address}: the storage refused the request {answer}")
    if isinstance(error, GoogleAuthError):
        return DataError(f"{address}: {identity()} got no access token ({error}); {_HOW}")
    return None
