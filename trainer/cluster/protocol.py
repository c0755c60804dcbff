"""Messages between workers: a header with the lengths, one JSON object, and a payload."""

import struct

from trainer.errors import BUG, INTERRUPTED

MAGIC = b"kubetune"  # distinguishes workers from other servers (TensorFlow's own, a web server)
HEADER = struct.Struct("!8sIQ")  # magic, bytes of JSON, bytes of payload


def describe_peer_failure(code: int, message: str, worker: int, sender: int) -> tuple[int, str]:
    """Exit code and message for the failure of a `worker`: its own, but 75 after a bug, as a restart may succeed."""
    if code == BUG:
        return INTERRUPTED, f"worker {worker} failed with a bug ({message}); its log has the traceback"
    return code, f"worker {worker}: {message}" if worker == sender else message
