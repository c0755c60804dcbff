"""Failed downloads of other libraries: the same command can succeed later."""

import http.client
import ssl
import urllib.error
import urllib.request
from typing import Any

from trainer.errors import Interrupted
from trainer.names import escape_unprintable

CONNECT_SECONDS = 20.0
_NETWORK = (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException, urllib.error.URLError)
# Of requests and TFDS, which are not imported here. A wrong checksum is that of an incomplete file.
_NAMES = {"RequestException", "DownloadError", "NonMatchingChecksumError"}
_RETRIED = (408, 429)  # request timeout, too many requests
_KERAS = ("URL fetch failure", "Incomplete or corrupted file")  # `get_file` raises Exception and ValueError


def request_size(url: str) -> int:
    """Return the size of the file at a URL, 0 if its server does not state it. Nothing is downloaded."""
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS) as response:
        return int(response.headers.get("Content-Length") or 0)


def translate_download_error(
    error: BaseException, problem: str, *, key: str, value: str | None, fix: str
) -> Interrupted | None:
    """Translate the error of a failed download to `Interrupted`; None for any other error.

    A server that refuses the address (403, 404) would refuse it again; one that is overloaded (429, 5xx) would not.

    `problem` names what could not be downloaded, `fix` is what helps where there is no network.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    statuses = [status for error in chain if (status := _get_status(error))]
    is_refused = any(status < 500 and status not in _RETRIED for status in statuses)
    if is_refused or not any(map(_is_network_error, chain)):
        return None
    reason = escape_unprintable((str(error).strip().splitlines() or [type(error).__name__])[0])
    fix = f"start the same command again; without a network, {fix}"
    return Interrupted(f"{problem} ({reason})", key=key, value=value, fix=fix)


def _is_network_error(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, _NETWORK) or bool(names & _NAMES) or str(error).startswith(_KERAS)


def _get_status(error: Any) -> int | None:
    """Return the HTTP status of an error of urllib (`code`) or requests (`response`), or None."""
    status = error.code if isinstance(error, urllib.error.HTTPError) else None
    return status or getattr(getattr(error, "response", None), "status_code", None)
