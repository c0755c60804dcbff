"""The one client of the process, who it speaks for, and what a refusal means."""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Any

import google.auth
from google.api_core.exceptions import ClientError, GoogleAPICallError, NotFound
from google.auth import external_account
from google.auth.credentials import AnonymousCredentials, Credentials, with_scopes_if_required
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.cloud import storage
from requests.adapters import HTTPAdapter

from trainer.errors import DataError

POD_SECONDS = 20.0  # of a pod's life in which missing credentials may still come
THREADS = 16  # connections kept open; more threads than this open and close theirs
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_HOW = (
    "run `gcloud auth application-default login`, give the pod a service account (workload identity), or set "
    "GOOGLE_APPLICATION_CREDENTIALS (STORAGE_EMULATOR_HOST for an emulator)"
)

_clients: dict[tuple[int, str | None], Any] = {}
_lock = threading.Lock()


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
            credentials, project = _found()
            credentials = with_scopes_if_required(credentials, [_SCOPE])
        except DefaultCredentialsError as error:
            if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
                raise DataError(f"GOOGLE_APPLICATION_CREDENTIALS: {str(error).splitlines()[0]}") from error
    made = storage.Client(project=project, credentials=credentials)
    adapter = HTTPAdapter(pool_connections=4, pool_maxsize=THREADS)
    made._http.mount("https://", adapter)  # as Google's own samples do: there is no public way
    made._http.mount("http://", adapter)
    made._bucket_metadata_cache = None  # or it asks for storage.buckets.get behind our back, for traces nobody reads
    return made


def _found() -> tuple[Credentials, str | None]:
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
    """Whom the storage sees."""
    credentials = client()._credentials
    email = getattr(credentials, "service_account_email", None)
    if isinstance(credentials, AnonymousCredentials):
        return "nobody (anonymous)"
    if isinstance(credentials, external_account.Credentials):
        return f"workload identity pool {credentials.info['audience']}" + (
            f" as service account {email}" if email else ""
        )
    if email == "default":  # its name is asked for with the first token
        return "the default service account of this pod or machine"
    if email:
        return f"service account {email}"
    account = getattr(credentials, "account", None)
    return "application default credentials (" + (f"user {account}" if account else "user") + ")"


def refused(error: Exception, address: str, permission: str, absent: str) -> DataError | None:
    """The `DataError` that explains an error of Google's client; None where it is none of theirs.

    `permission` is what the operation needs; `absent` what a 404 means.
    """
    if isinstance(error, NotFound):
        return DataError(f"{address}: {absent}")
    denied = isinstance(error, GoogleAPICallError) and error.code in (401, 403)
    if denied or isinstance(error, GoogleAuthError):  # the second: after a 401 the client asks for a new token
        anonymous = isinstance(client()._credentials, AnonymousCredentials)
        if anonymous and "STORAGE_EMULATOR_HOST" not in os.environ:
            return DataError(f"{address}: is not public, and no credentials were found; {_HOW}")
    if isinstance(error, GoogleAPICallError) and denied:
        named = re.findall(r"storage\.\w+\.\w+", str(error.message))
        return DataError(
            f"{address}: {identity()} lacks the permission {named[0] if named else permission} "
            f"({int(error.code or 0)}: {error.message})"
        )
    if isinstance(error, ClientError):
        return DataError(f"{address}: the storage refused the request ({int(error.code or 0)}: {error.message})")
    if isinstance(error, GoogleAuthError):
        return DataError(f"{address}: {identity()} got no access token ({error}); {_HOW}")
    return None
