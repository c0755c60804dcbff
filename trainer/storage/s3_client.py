"""The process-wide clients for S3 (obstore): credentials, timeouts, and errors with a fix.

obstore reads its settings from environment variables (AWS_ENDPOINT_URL, AWS_REGION, ...). It takes credentials from the
environment (AWS_ACCESS_KEY_ID, ...), a web identity (IRSA), EKS Pod Identity or the node's role. Its own retries are
used only for the parts of an upload.
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
    CHECK_BUCKET_FIX,
    NO_BUCKET_PROBLEM,
    TRANSIENT_STATUSES,
    CorruptTransfer,
    Result,
    Timeouts,
    Transient,
)

# Request timeouts, in seconds, are rounded up to one of these values, because each timeout requires its own client.
_TIMEOUTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_MAX_PART_RETRIES = 1000  # in effect unlimited: retries end at the deadline
_CREDENTIALS_FIX = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, give the pod's service account a role (IRSA, EKS Pod Identity), "
    "or set AWS_SKIP_SIGNATURE=true for a public bucket"
)
_CONFLICT_STATUS = 409  # response to conditional writes at the same time; they have to be retried
# S3's error codes for invalid credentials (status 400 or 403; missing permissions have other codes), for a bucket in
# another region, and for requests with status 400 that a retry cannot fix.
_BAD_CREDENTIALS_CODES = {
    "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}  # fmt: skip
_WRONG_REGION_CODES = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_PERMANENT_CODES = {"InvalidBucketName", "InvalidRequest", "InvalidArgument", "KeyTooLongError", "EntityTooLarge"}
# URLs of the servers that issue credentials: for a node, for a container or pod, and for web identities (STS).
_CREDENTIALS_URL = re.compile(r"https?://([^/\s]+/latest/(api/token|meta-data)|169\.254\.170\.|\[fd00:ec2::23\]|sts\.)")


@dataclass(frozen=True)
class Failure:
    """The fields of S3's error response, parsed from the text of an obstore error."""

    text: str  # complete text of the error, without the debug output of obstore's Rust code
    status: int | None  # HTTP status of the response; None if there was no response
    code: str  # S3's error code, such as NoSuchBucket; "" if the response has no body
    message: str  # S3's error message; "" if the response has no body


def parse_failure(error: BaseException) -> Failure:
    """Parse the text of an obstore error, which has no attributes for the fields of S3's response."""
    text = str(error).partition("\n\nDebug source:")[0]
    status = re.search(r"non-2xx status code: (\d{3})", text)
    code, message = (re.search(f"<{tag}>(.*?)</{tag}>", text, re.S) for tag in ("Code", "Message"))
    return Failure(text, int(status[1]) if status else None, code[1] if code else "", message[1] if message else "")


def get_store(bucket: str, timeouts: Timeouts, retry_seconds: float = 0.0) -> S3Store:
    """Return this process's client for a bucket. The first call with these arguments creates it.

    A client cannot be used after a fork or for other AWS_* variables, so each process and environment has its own.

    Args:
        timeouts: connect and read timeout in seconds; rounded up.
        retry_seconds: maximum duration of retries by the client itself, in seconds; 0 if the caller retries.

    Raises:
        DataError: the endpoint in the environment is not a URL.
    """
    connect, read = (next((limit for limit in _TIMEOUTS if limit >= seconds), seconds) for seconds in timeouts)
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _create_store(os.getpid(), settings, bucket, (connect, read), retry_seconds)


@cache
def _create_store(
    _process: int, settings: tuple[tuple[str, str], ...], bucket: str, timeouts: Timeouts, retry_seconds: float
) -> S3Store:
    """Create the client for a process, environment and bucket; see `get_store`."""
    key = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if dict(settings).get(name)), None)
    endpoint = dict(settings)[key] if key else ""
    if key and not re.match(r"https?://[^/]", endpoint):
        raise DataError("is not the address of a server", key=key, value=endpoint, fix="write it as https://HOST:PORT")
    connect, read = (timedelta(seconds=seconds) for seconds in timeouts)
    pause = timedelta(seconds=retries.INITIAL_BACKOFF_SECONDS)
    return S3Store(
        bucket,
        # Otherwise obstore deletes an object by a request for many objects, which needs Content-MD5 on some servers.
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
    """Call `request`, and retry after transient errors of obstore until the deadline.

    `request` makes one attempt with these connect and read timeouts in seconds. `permission` is the required
    permission, which error messages name unless the response names one.

    Raises:
        DataError: the request failed with a permanent error, such as a missing permission.
        Interrupted: no attempt succeeded before the deadline.
    """
    num_bad_requests = 0

    def classify(error: Exception) -> Transient | TrainerError | None:
        """Classify an error of `request` for `retries.call_with_retries`."""
        nonlocal num_bad_requests
        verdict = classify_error(error, address, permission)
        if isinstance(verdict, Transient) and verdict.reason.startswith("400 "):
            num_bad_requests += 1
            if num_bad_requests > retries.MAX_BAD_REQUESTS:
                return _make_rejection_error(address, parse_failure(error))
        return verdict

    return retries.call_with_retries(address, request, classify)


def classify_error(error: BaseException, address: str, permission: str) -> Transient | TrainerError | None:
    """Translate an error of a request for the object at `address`, which requires `permission`.

    Return a Transient if a retry can succeed, a DataError with a fix if not, or None for any other error.
    """
    if isinstance(error, CorruptTransfer):
        return Transient(f"corrupt response: {error}")
    failure = parse_failure(error)
    if isinstance(error, ValueError) and "parse path" in failure.text:
        problem = f"{escape_unprintable(address)}: S3's client cannot address such a name ({_make_printable(failure)})"
        return DataError(problem, fix="rename it")
    if not (isinstance(error, BaseError) or (isinstance(error, FileNotFoundError) and failure.status)):
        return None
    if _CREDENTIALS_URL.search(failure.text):
        return _classify_credentials_error(failure, address)
    if failure.status is None:
        return _classify_without_response(error, failure, address)
    if failure.status in TRANSIENT_STATUSES or failure.status == _CONFLICT_STATUS or failure.code == "RequestTimeout":
        return Transient(f"{failure.status} {http.client.responses.get(failure.status, '')}".strip())
    if failure.code in _WRONG_REGION_CODES or failure.status == 301:
        problem, value = f"{address}: is in another region", os.environ.get("AWS_REGION")
        return DataError(problem, key="AWS_REGION", value=value, fix="set it to the region of the bucket")
    if failure.code in _BAD_CREDENTIALS_CODES:
        problem = f"{address}: the storage refused {describe_identity()} ({failure.status} {failure.code})"
        return DataError(problem, fix=_CREDENTIALS_FIX)
    if failure.status in (401, 403):
        return _make_permission_error(address, permission, failure)
    if failure.status == 404:
        return DataError(f"{address}: {NO_BUCKET_PROBLEM}", fix=CHECK_BUCKET_FIX)
    if failure.status == 400 and failure.code not in _PERMANENT_CODES:
        return Transient("400 corrupt request")
    return _make_rejection_error(address, failure)


def _classify_without_response(error: BaseException, failure: Failure, address: str) -> Transient | TrainerError:
    """Translate an obstore error without an HTTP response, according to its text."""
    if "LOCATION" in failure.text:  # a redirect of S3 to another region has no Location header
        problem, value = f"{address}: is in another region", os.environ.get("AWS_REGION")
        return DataError(problem, key="AWS_REGION", value=value, fix="set it to the region of the bucket")
    if "parsing Path" in failure.text or "empty path segment" in failure.text:
        problem = f"{address}: has an object whose name S3's client cannot read ({_make_printable(failure)})"
        return DataError(problem, fix="rename or remove that object")
    if "token" in failure.text.lower() and "HTTP error" not in failure.text:  # the token file cannot be read
        return DataError(f"{address}: there are no credentials ({_make_printable(failure)})", fix=_CREDENTIALS_FIX)
    full_text = str(error)
    for word, reason in (("imed", "timeout"), ("refused", "connection refused"), ("Connect", "no connection")):
        if word in full_text.replace("retry_timeout", ""):
            return Transient(reason)
    return Transient("connection broken")


def _classify_credentials_error(failure: Failure, address: str) -> Transient | TrainerError:
    """Translate an error of a server that issues credentials.

    In a pod or with a role, the result is Transient unless the server has rejected the request. Elsewhere, for example
    on a laptop, a server that does not respond means that there are no credentials.
    """
    has_role = any(name in os.environ for name in ("AWS_ROLE_ARN", *_POD_ROLE_VARIABLES)) or (
        "KUBERNETES_SERVICE_HOST" in os.environ
    )
    is_rejected = failure.status is not None and failure.status not in TRANSIENT_STATUSES
    if has_role and not is_rejected:
        return Transient("no access token")
    reason = f" ({failure.status} {failure.code})".replace(" )", ")") if failure.status and has_role else ""
    return DataError(f"{address}: {describe_identity()} got no credentials{reason}", fix=_CREDENTIALS_FIX)


# Environment variables that EKS or ECS sets in a container with a role.
_POD_ROLE_VARIABLES = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")


def describe_identity() -> str:
    """Describe the account that sends the requests, such as "access key AKIA...".

    The order of the checks is the order in which obstore searches for credentials.
    """
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "on", "yes"):
        return "nobody (anonymous)"
    if key := os.environ.get("AWS_ACCESS_KEY_ID"):
        return f"access key {key}"
    if (role := os.environ.get("AWS_ROLE_ARN")) and os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return f"role {role}"
    if any(os.environ.get(name) for name in _POD_ROLE_VARIABLES):
        return "the role of this pod"
    return "the role of this node"


def _make_permission_error(address: str, permission: str, failure: Failure) -> DataError:
    """Make the error for a missing permission. Name the permission in the response, or `permission` if it has none."""
    missing_permission = (re.findall(r"s3:\w+", failure.message) or [permission])[0]
    response = f"({failure.status}: {failure.message})" if failure.message else f"({failure.status})"
    problem = f"{address}: {describe_identity()} lacks the permission {missing_permission} {response}"
    return DataError(problem, fix="grant it (docs/storage.md)")


def _make_rejection_error(address: str, failure: Failure) -> DataError:
    response = f"({failure.status}: {failure.message or failure.code or 'no reason'})"
    return DataError(f"{address}: the storage refused the request {response}", fix=CHECK_BUCKET_FIX)


def _make_printable(failure: Failure) -> str:
    """Return the text of a failure as printable characters, or only its last part if it is long."""
    return escape_unprintable(failure.text.rpartition(": ")[2] if len(failure.text) > 300 else failure.text)
