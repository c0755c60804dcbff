"""A proxy that injects faults of networks and servers with given probabilities."""

import base64
import contextlib
import hashlib
import http.client
import io
import math
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import google_crc32c

from tests.waiting import PATIENCE

# Not forwarded: unavailable, limited, reset. Forwarded, with a faulty response: lost, slow, truncated, corrupted.
# Damaged before it is forwarded: corrupted_upload.
KINDS = ("unavailable", "limited", "reset", "lost", "slow", "truncated", "corrupted", "corrupted_upload")
EVENLY = {kind: 0.2 / len(KINDS) for kind in KINDS}  # one fault in five requests


class FaultyProxy:
    """A proxy of `upstream`; `odds` maps kinds to probabilities and may be changed at any time.

    `counts` counts each kind, and "passed". A kind that does not apply to a request, as truncation without a body, is
    replaced by `instead`, so that the fraction of faults is as configured.
    """

    def __init__(self, upstream: str, odds: dict[str, float], seed: int = 0, scheme: str = "gs") -> None:
        self.upstream, self.odds, self.scheme = upstream, odds, scheme
        self.faults_left = math.inf  # faults until all requests pass
        self.instead = "unavailable"
        self.retry_after = "0"
        self.slow_seconds = 0.02
        self.verifies_uploads = True  # as the real storage, unlike the emulator
        self.refused = ""  # requests whose path contains this are answered with 403, unless it is empty
        self.dropped_headers: set[str] = set()  # of responses, in lower case
        self.counts: Counter[str] = Counter()
        self.bytes_out = 0
        self._noise = random.Random(seed)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def draw(self, possible: set[str]) -> str:
        with self._lock:
            left, kind = self._noise.random(), "passed"
            for candidate, probability in self.odds.items() if self.faults_left else ():
                if (left := left - probability) < 0:
                    kind = candidate if candidate in possible else self.instead
                    self.faults_left -= 1
                    break
            self.counts[kind] += 1
            return kind

    def bit(self, body: bytes, start: int, end: int) -> bytes:
        """Flip one bit of the body in [start, end)."""
        with self._lock:
            index, bit = self._noise.randrange(start, end), self._noise.randrange(8)
        return body[:index] + bytes([body[index] ^ (1 << bit)]) + body[index + 1 :]

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:  # `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    proxy._serve(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_request

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = _read_body(request)
        if self.scheme == "s3":
            payload = (0, len(body)) if request.command == "PUT" else (0, 0)
            media, as_declared = request.command == "GET" and "list-type=" not in request.path, _as_signed
        else:
            payload = _payload(body) if "uploadType=multipart" in request.path else (0, 0)
            media, as_declared = request.command == "GET" and "alt=media" in request.path, _as_declared
        possible = {"unavailable", "limited", "reset", "lost"}
        possible |= {"slow", "truncated"} if request.command not in ("DELETE", "HEAD") else set()
        possible |= {"corrupted"} if media else set()
        possible |= {"corrupted_upload"} if payload[1] > payload[0] else set()
        kind = self.draw(possible)
        if self.refused and self.refused in request.path:
            return _respond(request, 403, {}, b"no")
        if kind == "unavailable":
            return _respond(request, 503, {}, b"try later")
        if kind == "limited":
            return _respond(request, 429, {"Retry-After": self.retry_after}, b"too many")
        if kind == "reset":
            return _reset(request)
        if kind == "corrupted_upload":
            body = self.bit(body, *payload)
        if self.verifies_uploads and payload[1] > payload[0] and not as_declared(request, body, *payload):
            return _respond(request, 400, {}, b"the content does not match its checksum")
        try:
            status, headers, content = self._forward(request, body)
        except (OSError, http.client.HTTPException):
            return _reset(request)
        self.bytes_out += len(content)
        if kind == "lost":
            return _reset(request)
        if kind == "corrupted" and content:
            content = self.bit(content, 0, len(content))
        pause = self.slow_seconds if kind == "slow" else 0.0
        _respond(request, status, headers, content, pause, cut=kind == "truncated")

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The response of the server, with the proxy's address instead of its own."""
        address = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE)
        try:
            omitted = (
                ("transfer-encoding",) if self.scheme == "s3" else ("host", "transfer-encoding")
            )  # part of the signature in S3
            headers = {k: v for k, v in request.headers.items() if k.lower() not in omitted}
            connection.request(request.command, request.path, body, headers | {"Connection": "close"})
            response = connection.getresponse()
            content = response.read()
            if "json" in (response.getheader("Content-Type") or ""):
                content = content.replace(self.upstream.encode(), self.url.encode())
            dropped = ("transfer-encoding", "connection", "date", *self.dropped_headers)
            dropped += ("content-length",) if request.command != "HEAD" else ()
            rest = {k: v.replace(self.upstream, self.url) for k, v in response.getheaders() if k.lower() not in dropped}
            return response.status, rest, content
        finally:
            connection.close()


def _read_body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding") == "chunked":
        body = b""
        while size := int(request.rfile.readline(), 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return body
    return request.rfile.read(int(request.headers.get("Content-Length") or 0))


def _payload(body: bytes) -> tuple[int, int]:
    """Start and end of the content of a multipart upload, without metadata and boundaries."""
    start = body.find(b"\r\n\r\n", body.find(b"\r\n\r\n") + 4) + 4
    return start, body.rfind(b"\r\n--")


def _as_signed(request: BaseHTTPRequestHandler, body: bytes, _start: int, _end: int) -> bool:
    """Return whether the content has the SHA-256 that its signature covers, as S3 requires."""
    return request.headers["x-amz-content-sha256"] == hashlib.sha256(body).hexdigest()


def _as_declared(_request: BaseHTTPRequestHandler, body: bytes, start: int, end: int) -> bool:
    """Return whether the content has the CRC32C in the metadata of a multipart upload."""
    declared = re.search(rb'"crc32c": ?"([^"]+)"', body[:start])
    assert declared, "an upload without its CRC32C"
    return base64.b64decode(declared[1]) == google_crc32c.value(body[start:end]).to_bytes(4, "big")


def _respond(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes, pause: float = 0,
    cut: bool = False,
) -> None:  # fmt: skip
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    if status != 204 and "Content-Length" not in headers:
        request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command == "HEAD":
        return
    half = len(content) // 2
    request.wfile.write(content[:half])
    if cut:
        request.close_connection = True
        return
    if pause:
        request.wfile.flush()
        time.sleep(pause)
    request.wfile.write(content[half:])
    request.wfile.flush()


def _reset(request: BaseHTTPRequestHandler) -> None:
    """End the connection with a TCP reset."""
    request.close_connection = True
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()
    # The file objects also hold the socket open; the handler flushes one afterwards.
    request.rfile.close()
    with contextlib.suppress(OSError, ValueError):
        request.wfile.close()
    request.wfile = io.BytesIO()


@contextlib.contextmanager
def faults(upstream: str, odds: dict[str, float] = EVENLY, seed: int = 0, scheme: str = "gs") -> Iterator[FaultyProxy]:
    """A proxy of `upstream`, closed at the end."""
    proxy = FaultyProxy(upstream, dict(odds), seed, scheme)
    try:
        yield proxy
    finally:
        proxy.close()
