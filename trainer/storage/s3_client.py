"""The process-wide clients for S3 (obstore): credentials, timeouts, and errors with a fix.

obstore reads its settings and credentials from the environment: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...; a
web identity (IRSA); EKS Pod Identity; the role of a node. Its own retries are used for the parts of an upload only.
"""

import http.client
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

from obstore.exceptions import BaseError
from obstore.store import S3Store

from trainer.errors import DataError, TrainerError
from trainer.names import escape_unprintable
from trainer.storage import retries
from trainer.storage.retries import (
    CHECK_BUCKET,
    NO_BUCKET,
    TRANSIENT_CODES,
    CorruptTransfer,
    Result,
    Timeouts,
    Transient,
)

# A client has one timeout, and connections of its own, so the timeouts of requests are rounded up to these.
_TIMEOUTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_MAX_PART_RETRIES = 1000  # the deadline ends them
_CREDENTIALS_FIX = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, give the pod's service account a role (IRSA, EKS Pod Identity), "
    "or set AWS_SKIP_SIGNATURE=true for a public bucket"
)
_CONFLICT = 409  # of two conditional writes at the same time; S3 requires a retry
# Of a response 400 or 403: what is wrong with the credentials, not with their permissions
_BAD_CREDENTIALS = {
    "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}  # fmt: skip
_WRONG_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_REFUSED = {"InvalidBucketName", "InvalidRequest", "InvalidArgument", "KeyTooLongError", "EntityTooLarge"}
# The servers of credentials: of a node, of a container or pod, and the token service
_CREDENTIALS_URL = re.compile(r"https?://([^/\s]+/latest/(api/token|meta-data)|169\.254\.170\.|\[fd00:ec2::23\]|sts\.)")


@dataclass(frozen=True)
class Failure:
    """What obstore's text of an error states; it has no other details."""

    text: str  # its first lines, without Rust's
    status: int | None  # of the response; None if there is none
    code: str  # S3's, such as NoSuchBucket; "" if the response has no body
    message: str


def parse_failure(error: BaseException) -> Failure:
    """Parse the text of an error that obstore raised."""
    text = str(error).partition("\n\nDebug source:")[0]
    status = re.search(r"non-2xx status code: (\d{3})", text)
    code, message = (re.search(f"<{tag}>(.*?)</{tag}>", text, re.S) for tag in ("Code", "Message"))
    return Failure(text, int(status[1]) if status else None, code[1] if code else "", message[1] if message else "")


def get_store(bucket: str, timeouts: Timeouts, retry_seconds: float = 0.0) -> S3Store:
    """Return the client of this process for a bucket, which the first call creates.

    A client cannot be used after a fork or for other settings, so each process and environment has its own. With
    `retry_seconds` it retries transient errors itself for so long.
    """
    connect, read = (next((t for t in _TIMEOUTS if t >= seconds), seconds) for seconds in timeouts)
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _create_store(os.getpid(), settings, bucket, (connect, read), retry_seconds)


@cache
def _create_store(
    _process: int, settings: tuple[tuple[str, str], ...], bucket: str, timeouts: Timeouts, retry_seconds: float
) -> S3Store:
    key = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if dict(settings).get(name)), None)
    endpoint = dict(settings)[key] if key else ""
    if key and not re.match(r"https?://[^/]", endpoint):
        raise DataError("is not the address of a server", key=key, value=endpoint, fix="write it as https://HOST:PORT")
    connect, read = (timedelta(seconds=seconds) for seconds in timeouts)
    pause = timedelta(seconds=retries.INITIAL_BACKOFF_SECONDS)
    return S3Store(
        bucket,
        # Deleting one object by a request for many needs Content-MD5 on some servers.
        config={"disable_bulk_delete": True},
        client_options={"allow_http": endpoint.startswith("http://"), "timeout": read, "connect_timeout": connect},
        retry_config={
            "max_retries": _MAX_PART_RETRIES if retry_seconds else 0,
            "retry_timeout": timedelta(seconds=retry_seconds),
            "backoff": {
                "init_backoff": pause, "max_backoff": timedelta(seconds=retries.MAX_BACKOFF_SECONDS), "base": 2.0,
            },
        },
    )  # fmt: skip


def call_with_retries(address: str, permission: str, request: Callable[[Timeouts], Result]) -> Result:
    """Call `request` as `retries.call_with_retries` does, with the errors of obstore.

    `permission` is the one that it needs, for error messages if the response does not name one.
    """
    bad_requests = 0

    def classify(error: Exception) -> Transient | TrainerError | None:
        nonlocal bad_requests
        verdict = classify_error(error, address, permission)
        if isinstance(verdict, Transient) and verdict.reason.startswith("400 "):
            bad_requests += 1
            if bad_requests > retries.MAX_BAD_REQUESTS:
                return _make_refusal(address, parse_failure(error))
        return verdict

    return retries.call_with_retries(address, request, classify)


def classify_error(error: BaseException, address: str, permission: str) -> Transient | TrainerError | None:
    """Translate an error of obstore; None for any other one."""
    if isinstance(error, CorruptTransfer):
        return Transient(f"corrupt response: {error}")
    failure = parse_failure(error)
    if isinstance(error, ValueError) and "parse path" in failure.text:
        problem = f"{escape_unprintable(address)}: S3's client cannot address such a name ({_escape(failure)})"
        return DataError(problem, fix="rename it")
    if not (isinstance(error, BaseError) or (isinstance(error, FileNotFoundError) and failure.status)):
        return None
    if _CREDENTIALS_URL.search(failure.text):
        return _classify_credentials_error(failure, address)
    if failure.status is None:
        return _classify_without_response(error, failure, address)
    if failure.status in TRANSIENT_CODES or failure.status == _CONFLICT or failure.code == "RequestTimeout":
        return Transient(f"{failure.status} {http.client.responses.get(failure.status, '')}".strip())
    if failure.code in _WRONG_REGION or failure.status == 301:
        problem, value = f"{address}: is in another region", os.environ.get("AWS_REGION")
        return DataError(problem, key="AWS_REGION", value=value, fix="set it to the region of the bucket")
    if failure.code in _BAD_CREDENTIALS:
        problem = f"{address}: the storage refused {describe_identity()} ({failure.status} {failure.code})"
        return DataError(problem, fix=_CREDENTIALS_FIX)
    if failure.status in (401, 403):
        return _make_denial(address, permission, failure)
    if failure.status == 404:
        return DataError(f"{address}: {NO_BUCKET}", fix=CHECK_BUCKET)
    if failure.status == 400 and failure.code not in _REFUSED:
        return Transient("400 corrupt request")
    return _make_refusal(address, failure)


def _classify_without_response(error: BaseException, failure: Failure, address: str) -> Transient | TrainerError:
    if "LOCATION" in failure.text:  # S3 redirects to the region of a bucket without an address
        problem, value = f"{address}: is in another region", os.environ.get("AWS_REGION")
        return DataError(problem, key="AWS_REGION", value=value, fix="set it to the region of the bucket")
    if "parsing Path" in failure.text or "empty path segment" in failure.text:
        problem = f"{address}: has an object whose name S3's client cannot read ({_escape(failure)})"
        return DataError(problem, fix="rename or remove that object")
    if "token" in failure.text.lower() and "HTTP error" not in failure.text:  # the file of a web identity
        return DataError(f"{address}: there are no credentials ({_escape(failure)})", fix=_CREDENTIALS_FIX)
    details = str(error)
    for word, reason in (("imed", "timeout"), ("refused", "connection refused"), ("Connect", "no connection")):
        if word in details.replace("retry_timeout", ""):
            return Transient(reason)
    return Transient("connection broken")


def _classify_credentials_error(failure: Failure, address: str) -> Transient | TrainerError:
    """Translate an error of a server of credentials.

    A pod with a role waits for it. Elsewhere no server means that there are no credentials: a laptop has no role.
    """
    has_role = any(name in os.environ for name in ("AWS_ROLE_ARN", *_CONTAINER)) or (
        "KUBERNETES_SERVICE_HOST" in os.environ
    )
    refused = failure.status is not None and failure.status not in TRANSIENT_CODES
    if has_role and not refused:
        return Transient("no access token")
    reason = f" ({failure.status} {failure.code})".replace(" )", ")") if failure.status and has_role else ""
    return DataError(f"{address}: {describe_identity()} got no credentials{reason}", fix=_CREDENTIALS_FIX)


_CONTAINER = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")


def describe_identity() -> str:
    """Describe the account that sends the requests, in the order in which obstore searches for credentials."""
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "on", "yes"):
        return "nobody (anonymous)"
    if key := os.environ.get("AWS_ACCESS_KEY_ID"):
        return f"access key {key}"
    if (role := os.environ.get("AWS_ROLE_ARN")) and os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return f"role {role}"
    if any(os.environ.get(name) for name in _CONTAINER):
        return "the role of this pod"
    return "the role of this node"


def _make_denial(address: str, permission: str, failure: Failure) -> DataError:
    missing = (re.findall(r"s3:\w+", failure.message) or [permission])[0]
    response = f"({failure.status}: {failure.message})" if failure.message else f"({failure.status})"
    problem = f"{address}: {describe_identity()} lacks the permission {missing} {response}"
    return DataError(problem, fix="grant it (docs/storage.md)")


def _make_refusal(address: str, failure: Failure) -> DataError:
    response = f"({failure.status}: {failure.message or failure.code or 'no reason'})"
    return DataError(f"{address}: the storage refused the request {response}", fix=CHECK_BUCKET)


def _escape(failure: Failure) -> str:
    return escape_unprintable(failure.text.rpartition(": ")[2] if len(failure.text) > 300 else failure.text)
