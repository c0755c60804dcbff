"""The format of messages between workers: a prefix with the lengths, the header (a JSON object), and a payload."""

import struct

from trainer.errors import BUG, INTERRUPTED

MAGIC = b"kubetune"  # distinguishes workers from other servers, such as TensorFlow's own or a web server
PREFIX = struct.Struct("!8sIQ")  # MAGIC, length of the header in bytes, length of the payload in bytes


def translate_peer_failure(code: int, message: str, worker: int, sender: int) -> tuple[int, str]:
    """Return the exit code and message with which a worker ends because another one has failed.

    The exit code is that of the failed worker. After a bug (exit code 1) it is 75, because a restart may succeed.

    Args:
        code: exit code of the failed worker.
        message: problem that the failed worker has reported.
        worker: index of the failed worker.
        sender: index of the peer that has sent the report. If it is the chief that passes on the report of another
            worker, `message` already names the failed one.
    """
    if code == BUG:
        return INTERRUPTED, f"worker {worker} failed with a bug ({message}); its log has the traceback"
    return code, f"worker {worker}: {message}" if worker == sender else message
