"""The process-wide client for Google Cloud Storage: credentials, retries, deadlines, and errors with a fix."""

import http.client
import os
import re
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

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

from trainer.errors import DataError
from trainer.monitoring.log import log
from trainer.private_api import disable_bucket_metadata, get_credentials, mount_transport
from trainer.storage import retries
from trainer.storage.retries import (
    CHECK_BUCKET_FIX,
    NO_BUCKET_PROBLEM,
    TRANSIENT_STATUSES,
    CorruptTransfer,
    Result,
    Timeouts,
    Transient,
)

POD_CREDENTIALS_SECONDS = 20.0  # maximum time that a new pod waits for its credentials
CONNECTION_POOL_SIZE = 16  # maximum number of idle connections per server

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_CREDENTIALS_FIX = (
    "run `gcloud auth application-default login`, give the pod a service account (workload identity), or set "
    "GOOGLE_APPLICATION_CREDENTIALS (STORAGE_EMULATOR_HOST for an emulator)"
)
_NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError)
_URL_ERRORS = (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema)
_lock = threading.Lock()  # guards the creation of the client, and `_requester_pays_buckets`
_requester_pays_buckets: set[str] = set()  # names of the buckets that have rejected a request without a payer


def call_with_retries(address: str, permission: str, request: Callable[[Timeouts], Result]) -> Result:
    """Call `request`, and retry after transient errors of Google's client until the deadline.

    Args:
        address: address of the object, for error messages.
        permission: required permission; error messages name it unless the response names one.
        request: makes one attempt with these connect and read timeouts in seconds. It must get its bucket from
            `get_bucket` in each call, because a retry can add a payer.

    Raises:
        DataError: the request failed with a permanent error, such as a missing permission.
        Interrupted: no attempt succeeded before the deadline.
    """
    num_bad_requests, payer_added = 0, False

    def classify(error: Exception) -> Transient | DataError | None:
        """Classify an error of `request` for `retries.call_with_retries`."""
        nonlocal num_bad_requests, payer_added
        if _lacks_payer(error) and not payer_added and (payer_added := _add_payer(address)):
            return Transient("requester pays", immediately=True)
        reason = _describe_transient_error(error)
        if isinstance(error, GoogleAPICallError) and error.code == 400 and not _lacks_payer(error):
            num_bad_requests += 1
            reason = None if num_bad_requests > retries.MAX_BAD_REQUESTS else "400 corrupt request"
        if reason is None:
            return _translate_permanent_error(error, address, permission)
        retry_after = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "0")
        return Transient(reason, float(retry_after) if retry_after.isdigit() else 0.0)

    return retries.call_with_retries(address, request, classify)


def _describe_transient_error(error: Exception) -> str | None:
    """Describe an error after which a retry can succeed, such as "timeout". Return None for any other error."""
    if isinstance(error, CorruptTransfer | DataCorruption):
        return f"corrupt response: {error}"
    if isinstance(error, GoogleAPICallError):
        rate_limited = error.code == 403 and "ratelimitexceeded" in str(error.errors).lower()
        if error.code in TRANSIENT_STATUSES or rate_limited:
            return f"{int(error.code or 0)} {http.client.responses.get(int(error.code or 0), '')}".strip()
        return None
    if isinstance(error, RefreshError):
        return "no access token" if error.retryable else None
    if isinstance(error, TransportError):
        return "the token server cannot be reached"
    if isinstance(error, _URL_ERRORS):
        return None
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return "timeout"
    if isinstance(error, requests.exceptions.ChunkedEncodingError | urllib3.exceptions.ProtocolError):
        return "connection broken"
    if isinstance(error, requests.ConnectionError | ConnectionError):
        return "connection refused" if "refused" in str(error) else "no connection"
    return type(error).__name__ if isinstance(error, _NETWORK_ERRORS) else None


def get_bucket(name: str) -> Any:
    """Return a `storage.Bucket`. $GOOGLE_CLOUD_PROJECT pays for its requests if it is a known requester-pays bucket."""
    return get_client().bucket(name, user_project=_get_payer() if name in _requester_pays_buckets else None)


def _add_payer(address: str) -> bool:
    """Register an address's bucket as requester-pays, and return whether $GOOGLE_CLOUD_PROJECT names a payer.

    Requests to other buckets do not name a payer, because Google would charge the payer for them too.
    """
    name = address.removeprefix("gs://").partition("/")[0]
    project = _get_payer()
    with _lock:
        is_new = name not in _requester_pays_buckets
        _requester_pays_buckets.add(name)
    if project and is_new:
        log.info(f"gs://{name} is a requester-pays bucket: project {project} (GOOGLE_CLOUD_PROJECT) is charged")
    return bool(project)


def _get_payer() -> str | None:
    return os.environ.get("GOOGLE_CLOUD_PROJECT") or None


def _lacks_payer(error: Exception) -> bool:
    return isinstance(error, ClientError) and error.code == 400 and "requester pays" in str(error.message).lower()


def get_client() -> Any:
    """Return this process's `storage.Client`. The first call creates it; it is anonymous if there are no credentials.

    A client cannot be used after a fork or for another $STORAGE_EMULATOR_HOST, so each process and host has its own.

    Raises:
        DataError: $GOOGLE_APPLICATION_CREDENTIALS is not the path of a credentials file.
    """
    with _lock:
        return _create_client(os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST"))


@cache
def _create_client(_process: int, emulator: str | None) -> Any:
    """Create the client for a process and an emulator; see `get_client`."""
    credentials: Credentials = AnonymousCredentials()
    project = None
    if not emulator:
        try:
            credentials, project = _find_credentials()
            credentials = with_scopes_if_required(credentials, [_SCOPE])
        except DefaultCredentialsError as error:
            if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
                problem, key = str(error).splitlines()[0], "GOOGLE_APPLICATION_CREDENTIALS"
                raise DataError(problem, key=key, value=os.environ[key], fix="set it to a credentials file") from error
    client = storage.Client(project=project, credentials=credentials)
    mount_transport(client, HTTPAdapter(pool_connections=4, pool_maxsize=CONNECTION_POOL_SIZE))
    disable_bucket_metadata(client)
    return client


def _find_credentials() -> tuple[Credentials, str | None]:
    """Return the default credentials and project. In a new pod, wait until GKE's metadata server is ready."""
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ and "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ
    deadline = time.monotonic() + (POD_CREDENTIALS_SECONDS if in_pod else 0.0)
    while True:
        try:
            # No scopes: with them, identity federation requests the project id, which fails in a closed network.
            return google.auth.default()
        except DefaultCredentialsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def describe_identity() -> str:
    """Describe the account that sends the requests, such as "service account x@y.iam.gserviceaccount.com"."""
    credentials = get_credentials(get_client())
    email = getattr(credentials, "service_account_email", None)
    if isinstance(credentials, AnonymousCredentials):
        return "nobody (anonymous)"
    if isinstance(credentials, external_account.Credentials):
        impersonated = f" as service account {email}" if email else ""
        return f"workload identity pool {credentials.info['audience']}{impersonated}"
    if email == "default":  # the metadata server has not yet returned the real address
        return "the default service account of this pod or machine"
    if email:
        return f"service account {email}"
    user = f"user {getattr(credentials, 'account', None) or ''}".strip()
    return f"application default credentials ({user})"


def _translate_permanent_error(error: Exception, address: str, permission: str) -> DataError | None:
    """Translate a permanent error of Google's client to a DataError with a fix. Return None for any other error."""
    if isinstance(error, NotFound):
        return DataError(f"{address}: {NO_BUCKET_PROBLEM}", fix=CHECK_BUCKET_FIX)
    is_denied = isinstance(error, GoogleAPICallError) and error.code in (401, 403)
    if is_denied or isinstance(error, GoogleAuthError):  # GoogleAuthError: the client gets no new token after a 401
        is_anonymous = isinstance(get_credentials(get_client()), AnonymousCredentials)
        if is_anonymous and "STORAGE_EMULATOR_HOST" not in os.environ:
            return DataError(f"{address}: is not public, and there are no credentials", fix=_CREDENTIALS_FIX)
    if _lacks_payer(error):
        problem, fix = f"{address}: is in a requester-pays bucket", "set it to the project that pays for the requests"
        return DataError(problem, key="GOOGLE_CLOUD_PROJECT", fix=fix)
    if isinstance(error, ClientError):  # includes 401 and 403
        response = f"({int(error.code or 0)}: {error.message})"
        if not is_denied:
            return DataError(f"{address}: the storage refused the request {response}", fix=CHECK_BUCKET_FIX)
        missing_permission = (re.findall(r"(?:storage|serviceusage)\.\w+\.\w+", str(error.message)) or [permission])[0]
        problem = f"{address}: {describe_identity()} lacks the permission {missing_permission} {response}"
        return DataError(problem, fix="grant it (roles: docs/storage.md)")
    if isinstance(error, GoogleAuthError):
        return DataError(f"{address}: {describe_identity()} got no access token ({error})", fix=_CREDENTIALS_FIX)
    return None
