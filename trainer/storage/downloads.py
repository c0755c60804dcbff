"""Failed downloads by Keras and TensorFlow Datasets: faults of the network, which a retry can overcome."""

import http.client
import socket
import urllib.error
from collections.abc import Iterator

_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, socket.gaierror)


def is_network_fault(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, is of the network or of an overloaded server.

    A server that refuses the address (404, 403) would refuse it again.
    """
    import requests  # here, since reading a configuration needs neither a network nor its import time

    network_errors = (*_NETWORK_ERRORS, requests.ConnectionError, requests.Timeout,
                      requests.exceptions.ChunkedEncodingError)  # fmt: skip
    causes = list(_list_causes(error))
    statuses = [cause.code for cause in causes if isinstance(cause, urllib.error.HTTPError)]
    statuses += [
        cause.response.status_code
        for cause in causes
        if isinstance(cause, requests.HTTPError) and cause.response is not None
    ]
    if statuses:
        return all(status in (408, 429) or status >= 500 for status in statuses)
    return any(isinstance(cause, network_errors) for cause in causes)


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and those during whose handling it was raised."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
