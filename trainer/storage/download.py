"""Request the size of a download, and translate failed downloads by other libraries (Keras, TFDS) for the user."""

import http.client
import ssl
import urllib.error
import urllib.request
from typing import Any

from trainer.errors import Interrupted
from trainer.names import escape_unprintable

CONNECT_SECONDS = 20.0  # timeout of each socket operation of `request_size`: connecting, and each read
_NETWORK_ERRORS = (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException, urllib.error.URLError)
# Error classes of requests and TFDS, by name because those libraries are not imported here. TFDS raises
# NonMatchingChecksumError for an incomplete file, too.
_NETWORK_ERROR_NAMES = {"RequestException", "DownloadError", "NonMatchingChecksumError"}
_RETRYABLE_CLIENT_STATUSES = (408, 429)  # request timeout, too many requests; all 5xx statuses are also retryable
# Prefixes of the error messages of `keras.utils.get_file`, which raises plain Exception and ValueError.
_KERAS_ERROR_PREFIXES = ("URL fetch failure", "Incomplete or corrupted file")


def request_size(url: str) -> int:
    """Return the size in bytes of the file at a URL, without downloading it; 0 if the response has no Content-Length.

    Raises:
        OSError: the server cannot be reached or times out, or it responds with an error (`urllib.error.HTTPError`).
        http.client.HTTPException: the response is not HTTP.
        ValueError: `url` is not a URL.
    """
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS) as response:
        return int(response.headers.get("Content-Length") or 0)


def translate_download_error(
    error: BaseException, problem: str, *, key: str, value: str | None, fix: str
) -> Interrupted | None:
    """Translate a failed download into an `Interrupted` if the same download can succeed later.

    Return None for any other error, such as a status with which the server rejects the URL (403, 404). After a timeout
    or an overload of the server (408, 429, 5xx), the same download can succeed.

    Args:
        error: error of urllib, requests, Keras or TFDS. Its causes and contexts are also inspected, but not a context
            that `raise ... from None` suppresses.
        problem: beginning of the message, such as "TFDS cannot download it".
        key: argument or configuration key that requires the download.
        value: value of `key`.
        fix: what the user can do without network access.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    statuses = [status for link in chain if (status := _get_status(link))]
    is_rejected = any(status < 500 and status not in _RETRYABLE_CLIENT_STATUSES for status in statuses)
    if is_rejected or not any(map(_is_network_error, chain)):
        return None
    reason = escape_unprintable((str(error).strip().splitlines() or [type(error).__name__])[0])
    fix = f"start the same command again; without a network, {fix}"
    return Interrupted(f"{problem} ({reason})", key=key, value=value, fix=fix)


def _is_network_error(error: BaseException) -> bool:
    """Return whether an error of urllib, requests, Keras or TFDS is caused by the network or the server."""
    class_names = {cls.__name__ for cls in type(error).__mro__}
    return (
        isinstance(error, _NETWORK_ERRORS)
        or bool(class_names & _NETWORK_ERROR_NAMES)
        or str(error).startswith(_KERAS_ERROR_PREFIXES)
    )


def _get_status(error: Any) -> int | None:
    """Return the HTTP status in an error of urllib (`code`) or requests (`response`), or None if there is none."""
    status = error.code if isinstance(error, urllib.error.HTTPError) else None
    return status or getattr(getattr(error, "response", None), "status_code", None)
