"""The format of messages between workers: a prefix with two lengths, a header (a JSON object), and a payload."""

import struct

from trainer.errors import BUG, INTERRUPTED

MAGIC = b"kubetune"  # distinguishes workers from other servers, such as TensorFlow's own or a web server
PREFIX = struct.Struct("!8sIQ")  # MAGIC, length of the header in bytes, length of the payload in bytes


def translate_peer_failure(code: int, message: str, worker: int, sender: int) -> tuple[int, str]:
    """Return the exit code and message with which this worker ends because another worker has failed.

    The exit code does not change, except after a bug (exit code 1): it is then 75, because a restart may succeed.

    Args:
        code: exit code in the report.
        message: problem in the report.
        worker: index of the failed worker.
        sender: index of the peer that has sent the report. If the chief has forwarded another worker's report,
            `message` already names the failed worker.
    """
    if code == BUG:
        return INTERRUPTED, f"worker {worker} failed with a bug ({message}); its log has the traceback"
    return code, f"worker {worker}: {message}" if worker == sender else message
