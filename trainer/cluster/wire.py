"""Messages between workers over TCP: a small JSON header, then as many raw bytes as it announces."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from typing import Any

MAGIC = b"kubetune"  # whatever else answers on the port (TensorFlow's own server, a web server) is told apart by it
HEADER = struct.Struct("!8sIQ")  # magic, bytes of JSON, bytes of payload
LONGEST_HEADER = 1 << 20
CHUNK = 1 << 20


class Stranger(ConnectionError):
    """What answers is not a worker that waits for its peers."""


class Wire:
    """One connection to a peer. `send` may be called from any thread, `receive` from one.

    Attributes:
        heard: time.monotonic() of the last bytes that arrived.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.heard = time.monotonic()
        self._sending = threading.Lock()

    def send(self, kind: str, payload: bytes = b"", **facts: Any) -> None:
        """Send one message.

        Raises:
            OSError: the connection is gone.
        """
        header = json.dumps({"kind": kind, **facts}).encode()
        with self._sending:
            self.connection.sendall(HEADER.pack(MAGIC, len(header), len(payload)) + header)
            if payload:
                self.connection.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Wait for one message: its header and its payload.

        Raises:
            Stranger: the other side speaks something else.
            OSError: the connection is gone, or its timeout has passed.
        """
        magic, length, payload = HEADER.unpack(self._exactly(HEADER.size))
        if magic != MAGIC or length > LONGEST_HEADER:
            raise Stranger("something else answers there")
        return json.loads(self._exactly(length)), self._exactly(payload)

    def _exactly(self, count: int) -> bytes:
        parts, left = [], count
        while left:
            part = self.connection.recv(min(left, CHUNK))
            if not part:
                raise ConnectionError("closed")
            self.heard = time.monotonic()
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the connection; the peer sees its end at once."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
