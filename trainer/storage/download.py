"""Failed downloads of other libraries: the same command can succeed later."""

import http.client
import ssl
import urllib.error

from trainer.errors import Interrupted
from trainer.names import escape_unprintable

_NETWORK = (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException, urllib.error.URLError)
# Of requests and TFDS, which are not imported here. A wrong checksum is that of an incomplete file.
_NAMES = {"RequestException", "DownloadError", "NonMatchingChecksumError"}
_KERAS = ("URL fetch failure", "Incomplete or corrupted file")  # `get_file` raises Exception and ValueError


def translate_download_error(
    error: BaseException, problem: str, *, key: str, value: str | None, fix: str
) -> Interrupted | None:
    """Translate the error of a failed download to `Interrupted`; None for any other error.

    `problem` names what could not be downloaded, `fix` is what helps where there is no network.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if not any(map(_is_network_error, chain)):
        return None
    reason = escape_unprintable((str(error).strip().splitlines() or [type(error).__name__])[0])
    fix = f"start the same command again; without a network, {fix}"
    return Interrupted(f"{problem} ({reason})", key=key, value=value, fix=fix)


def _is_network_error(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, _NETWORK) or bool(names & _NAMES) or str(error).startswith(_KERAS)
