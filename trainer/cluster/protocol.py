"""The format of messages between workers: a prefix with the lengths, a JSON object (the header), and a payload."""

import struct

from trainer.errors import BUG, INTERRUPTED

MAGIC = b"kubetune"  # distinguishes workers from other servers (TensorFlow's own, a web server)
PREFIX = struct.Struct("!8sIQ")  # magic, bytes of the header, bytes of the payload


def translate_peer_failure(code: int, message: str, worker: int, sender: int) -> tuple[int, str]:
    """Return the exit code and message of a peer for the failure of `worker`.

    The code is that of the failed worker. After a bug it is 75, because a restart might succeed.
    """
    if code == BUG:
        return INTERRUPTED, f"worker {worker} failed with a bug ({message}); its log has the traceback"
    return code, f"worker {worker}: {message}" if worker == sender else message
