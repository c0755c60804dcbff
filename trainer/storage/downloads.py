"""Failed downloads by Keras and TensorFlow Datasets: faults of the network, which a retry can overcome."""

import http.client
import socket
import urllib.error
from collections.abc import Iterator

import requests

_NETWORK_ERRORS = (
    urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, socket.gaierror,
    requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError,
)  # fmt: skip


def is_network_fault(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, is of the network or of an overloaded server.

    A server that refuses the address (404, 403) would refuse it again.
    """
    causes = list(_list_causes(error))
    statuses = [cause.code for cause in causes if isinstance(cause, urllib.error.HTTPError)]
    statuses += [
        cause.response.status_code
        for cause in causes
        if isinstance(cause, requests.HTTPError) and cause.response is not None
    ]
    if statuses:
        return all(status in (408, 429) or status >= 500 for status in statuses)
    return any(isinstance(cause, _NETWORK_ERRORS) for cause in causes)


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and those during whose handling it was raised."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
