"""The process-wide client of Google Cloud Storage: credentials, retries, deadlines, and explained errors."""

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

DEADLINE = 120.0  # seconds per operation (of a large one, per part), all retries included
CONNECT = 10.0  # connect timeout in seconds
SILENCE = 30.0  # read timeout in seconds
FIRST_PAUSE = 0.5  # seconds; exponential backoff with full jitter up to LONGEST_PAUSE
LONGEST_PAUSE = 16.0
DAMAGED_REQUESTS = 5  # responses 400 that count as a request damaged in transit
POD_SECONDS = 20.0  # in which the credentials of a new pod may become available
THREADS = 16  # size of the connection pool
NO_BUCKET = "there is no such bucket, or this account may not see it"
CHECK_BUCKET = "check the address"

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_HOW = (
    "run `gcloud auth application-default login`, give the pod a service account (workload identity), or set "
    "GOOGLE_APPLICATION_CREDENTIALS (STORAGE_EMULATOR_HOST for an emulator)"
)
_TRANSIENT_CODES = {408, 429, 500, 502, 503, 504}
_TRANSIENT = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError)
_WRONG_ADDRESS = (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema)
# Not from the run's seed, with which all workers would retry at the same moment.
_noise = random.SystemRandom()
_clients: dict[tuple[int, str | None], Any] = {}
_lock = threading.Lock()

Limits = tuple[float, float]  # connect and read timeout in seconds
Result = TypeVar("Result")


class Damaged(Exception):
    """The checksum or length of transferred data differs."""


def persist(address: str, permission: str, call: Callable[[Limits], Result]) -> Result:
    """Call with retries on transient errors.

    Args:
        permission: required by the operation, for the message.

    Raises:
        Interrupted: the deadline has passed.
        DataError: Google's client reports a permanent error; any other error of `call` is re-raised.
    """
    deadline = base.deadline.get() or DEADLINE
    start = time.monotonic()
    pause, damaged = FIRST_PAUSE, 0
    while True:
        left = max(deadline - (time.monotonic() - start), 0.05)
        try:
            return call((min(CONNECT, left), min(SILENCE, left)))
        except Exception as error:
            reason = _transient_reason(error)
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
                problem = f"{address}: the storage did not respond for {deadline:g} s ({reason})"
                raise Interrupted(problem, fix="start the same command again: everything saved is intact") from error
            after = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "0")
            wait = max(_noise.uniform(0, pause), float(after) if after.isdigit() else 0.0)
        time.sleep(min(wait, left))
        pause = min(2 * pause, LONGEST_PAUSE)


def _transient_reason(error: Exception) -> str | None:
    """The reason why a retry may succeed; None for a permanent error."""
    if isinstance(error, Damaged | DataCorruption):
        return f"damaged response: {error}"
    if isinstance(error, GoogleAPICallError):
        limited = error.code == 403 and "ratelimitexceeded" in str(error.errors).lower()
        if error.code in _TRANSIENT_CODES or limited:
            return f"{int(error.code or 0)} {http.client.responses.get(int(error.code or 0), '')}".strip()
        return None
    if isinstance(error, RefreshError):
        return "no access token" if error.retryable else None
    if isinstance(error, TransportError):
        return "the token server cannot be reached"
    if isinstance(error, _WRONG_ADDRESS):
        return None
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return "timeout"
    if isinstance(error, requests.exceptions.ChunkedEncodingError | urllib3.exceptions.ProtocolError):
        return "connection broken"
    if isinstance(error, requests.ConnectionError | ConnectionError):
        return "connection refused" if "refused" in str(error) else "no connection"
    return type(error).__name__ if isinstance(error, _TRANSIENT) else None


def client() -> Any:
    """The `storage.Client` of this process, created at the first call; anonymous if there are no credentials.

    A forked process and an emulator get another client.
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
                problem, key = str(error).splitlines()[0], "GOOGLE_APPLICATION_CREDENTIALS"
                raise DataError(problem, key=key, value=os.environ[key], fix="set it to a credentials file") from error
    created = storage.Client(project=project, credentials=credentials)
    mount_transport(created, HTTPAdapter(pool_connections=4, pool_maxsize=THREADS))
    disable_bucket_metadata(created)
    return created


def _find_credentials() -> tuple[Credentials, str | None]:
    """Credentials and project. In a pod retry: GKE's metadata server may not respond in its first seconds."""
    patient = "KUBERNETES_SERVICE_HOST" in os.environ and "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ
    deadline = time.monotonic() + (POD_SECONDS if patient else 0.0)
    while True:
        try:
            # With a scope, identity federation would request the project's name, which a closed network does not allow.
            return google.auth.default()
        except DefaultCredentialsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def identity() -> str:
    """A description of the account that requests are made with."""
    credentials = credentials_of(client())
    email = getattr(credentials, "service_account_email", None)
    if isinstance(credentials, AnonymousCredentials):
        return "nobody (anonymous)"
    if isinstance(credentials, external_account.Credentials):
        impersonated = f" as service account {email}" if email else ""
        return f"workload identity pool {credentials.info['audience']}{impersonated}"
    if email == "default":  # its name comes with the first token
        return "the default service account of this pod or machine"
    if email:
        return f"service account {email}"
    user = f"user {getattr(credentials, 'account', None) or ''}".strip()
    return f"application default credentials ({user})"


def _explained(error: Exception, address: str, permission: str) -> DataError | None:
    """A `DataError` that explains an error of Google's client; None for any other error."""
    if isinstance(error, NotFound):
        return DataError(f"{address}: {NO_BUCKET}", fix=CHECK_BUCKET)
    denied = isinstance(error, GoogleAPICallError) and error.code in (401, 403)
    if denied or isinstance(error, GoogleAuthError):  # the latter: after a 401 the client requests a new token
        anonymous = isinstance(credentials_of(client()), AnonymousCredentials)
        if anonymous and "STORAGE_EMULATOR_HOST" not in os.environ:
            return DataError(f"{address}: is not public, and there are no credentials", fix=_HOW)
    if isinstance(error, ClientError):  # includes 401 and 403
        response = f"({int(error.code or 0)}: {error.message})"
        if not denied:
            return DataError(f"{address}: the storage refused the request {response}", fix=CHECK_BUCKET)
        missing = (re.findall(r"storage\.\w+\.\w+", str(error.message)) or [permission])[0]
        problem = f"{address}: {identity()} lacks the permission {missing} {response}"
        return DataError(problem, fix="grant it (roles: docs/storage.md)")
    if isinstance(error, GoogleAuthError):
        return DataError(f"{address}: {identity()} got no access token ({error})", fix=_HOW)
    return None
