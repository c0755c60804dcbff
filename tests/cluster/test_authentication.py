"""Hostile processes on the network: they cannot join a run, end it, or pose as one of its workers."""

import contextlib
import dataclasses
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.test_control import clusters, connect, connected
from tests.errors import raises
from tests.waiting import PATIENCE, wait_until
from trainer.cluster.authentication import (
    DIGEST_BYTES,
    GREETING,
    NONCE_BYTES,
    WrongTokenError,
    accept_peer,
    contact_peer,
)
from trainer.cluster.control import Connection, ControlChannel, ProtocolError
from trainer.cluster.discovery import Cluster, discover
from trainer.cluster.protocol import MAGIC, PREFIX
from trainer.cluster.rendezvous import rendezvous
from trainer.errors import Interrupted

TOKEN = "4f1c3a52-0000-4000-8000-2d5b8a6f0001"


def job(count: int, token: str = TOKEN) -> list[Cluster]:
    return [dataclasses.replace(cluster, token=token) for cluster in clusters(count)]


def join_without_proof(peer: Connection, cluster: Cluster) -> None:
    """What the protocol accepted without authentication: pose as worker 1, then end the run with exit code 2."""
    peer.send("join", job=cluster.job, index=1, size=cluster.size)
    peer.send("failed", code=2, message="ended by an unknown process", worker=1)


def join_with_another_token(peer: Connection, cluster: Cluster) -> None:
    with pytest.raises(WrongTokenError):
        contact_peer(peer, "another token")
    join_without_proof(peer, cluster)


def reflect_the_challenge(peer: Connection, cluster: Cluster) -> None:
    """Let the chief itself prove a nonce: its own proof is of the other role."""
    challenge = peer.receive_exactly(len(GREETING) + NONCE_BYTES)
    peer.socket.sendall(challenge + b"\0" * DIGEST_BYTES)
    join_without_proof(peer, cluster)


def announce_a_terabyte(peer: Connection, _: Cluster) -> None:
    peer.socket.sendall(PREFIX.pack(MAGIC, 2, 10**12) + b"{}" + b"x" * 100_000)


def send_nested_json(peer: Connection, _: Cluster) -> None:
    peer.socket.sendall(PREFIX.pack(MAGIC, 200_000, 0) + b"[" * 200_000)


def send_random_bytes(peer: Connection, _: Cluster) -> None:
    peer.socket.sendall(struct.pack("!Q", 2**63) * 64)


def stay_silent(peer: Connection, _: Cluster) -> None:
    peer.receive_exactly(1)


ATTACKS = [
    join_without_proof, join_with_another_token, reflect_the_challenge, announce_a_terabyte, send_nested_json,
    send_random_bytes, stay_silent,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_hostile_peer_does_not_disturb_the_rendezvous(attack: Callable[[Connection, Cluster], None]) -> None:
    chief, second = job(2)
    lines: list[str] = []
    channels: list[Any] = []
    waiting = threading.Thread(target=lambda: channels.extend(connected([chief], PATIENCE, lines)))
    waiting.start()
    peers = [connect(chief) for _ in range(3)]
    for peer in peers:
        with contextlib.suppress(OSError):
            attack(peer, chief)
    channels += connected([second], PATIENCE, lines)
    waiting.join()
    assert all(isinstance(channel, ControlChannel) for channel in channels), channels
    first, other = sorted(channels, key=lambda channel: channel.index)
    other.gather("a", b"2")
    assert first.gather("a", b"1") == [b"1", b"2"]
    for channel in channels:
        channel.disconnect()
    for peer in peers:
        peer.close()


@contextlib.contextmanager
def posing_as_the_chief(respond: Callable[[Connection], object]) -> Iterator[Cluster]:
    """A hostile server at the address of worker 0; yields the cluster of worker 1."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer = Connection(server.accept()[0])
                    with contextlib.suppress(OSError):
                        respond(peer)
                    peer.close()

        threading.Thread(target=accept, daemon=True).start()
        (_, own) = clusters(2)
        addresses = (f"127.0.0.1:{server.getsockname()[1]}", own.addresses[1])
        yield Cluster(1, addresses, "test", "job", TOKEN)


def refuse(peer: Connection) -> None:
    peer.socket.sendall(GREETING + b"n" * NONCE_BYTES)
    peer.receive_exactly(len(GREETING) + NONCE_BYTES + DIGEST_BYTES)
    peer.socket.sendall(b"x" * DIGEST_BYTES)
    peer.send("refused", reason="exit with 2")


@pytest.mark.parametrize(
    ("respond", "problem"),
    [
        (refuse, "it does not have the token of this Job; it is of another Job"),
        (lambda peer: accept_peer(peer, "another token"), "it rejects the token of this Job"),
        (lambda peer: peer.send("refused", reason="exit with 2"), "another server uses its port"),
    ],
)
def test_a_worker_believes_no_server_without_the_token(respond: Callable[[Connection], object], problem: str) -> None:
    """A refusal would be exit code 2, which fails the Job for good."""
    with posing_as_the_chief(respond) as cluster, raises(Interrupted, key="runtime.start_timeout", problem=problem):
        rendezvous(cluster, 1.5, lambda _: None, lambda: None)


def test_a_process_with_another_token_is_reported_once() -> None:
    chief, second = job(2)
    lines: list[str] = []
    channels: list[Any] = []
    reports = lambda: [line for line in lines if "a process without the token of this Job; ignored" in line]  # noqa: E731
    waiting = threading.Thread(target=lambda: channels.extend(connected([chief], PATIENCE, lines)))
    waiting.start()
    for _attempt in range(3):
        with pytest.raises(WrongTokenError):
            contact_peer(connect(chief), "another token")
    wait_until(reports)
    channels += connected([second], PATIENCE, [])
    waiting.join()
    assert len(reports()) == 1
    for channel in channels:
        channel.disconnect()


class Recorder(Connection):
    """A connection that records what it sends."""

    def __init__(self, connected_socket: socket.socket) -> None:
        self.sent: list[bytes] = []
        self.last_received = 0.0
        original, sent = connected_socket, self.sent

        class Recording:
            recv = original.recv

            def sendall(self, data: bytes) -> None:
                sent.append(data)
                original.sendall(data)

        self.socket: Any = Recording()


def accepted_error(send: Callable[[socket.socket], object]) -> BaseException | None:
    """Let `send` contact a worker with the token; return the error with which that one refuses it."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted = Connection(server.accept()[0])
        contacting = threading.Thread(target=send, args=(client,))
        contacting.start()
        try:
            accept_peer(accepted, TOKEN)
            return None
        except ConnectionError as error:
            return error
        finally:
            contacting.join()
            accepted.close()


def test_a_proof_is_not_valid_twice() -> None:
    """The recorded bytes of a worker do not fit the next challenge."""
    recorders: list[Recorder] = []

    def contact(client: socket.socket) -> None:
        recorders.append(Recorder(client))
        contact_peer(recorders[0], TOKEN)

    assert accepted_error(contact) is None
    replayed = b"".join(recorders[0].sent)
    assert isinstance(accepted_error(lambda client: client.sendall(replayed)), WrongTokenError)


def test_another_protocol_is_no_wrong_token() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted = Connection(server.accept()[0])
        client.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100)
        with pytest.raises(ProtocolError):
            accept_peer(accepted, TOKEN)
        accepted.close()


def test_the_token_is_the_uid_of_the_job_and_is_in_no_log_line() -> None:
    pod = {"WORKER_COUNT": "2", "JOB_NAME": "a", "SERVICE_NAME": "b", "JOB_COMPLETION_INDEX": "0", "JOB_UID": TOKEN}
    cluster = discover(pod)
    assert cluster.token == TOKEN
    assert TOKEN not in repr(cluster)
    assert discover({**pod, "JOB_UID": ""}).token == ""
    several = {"JOBSET_NAME": "s", "REPLICATED_JOB_NAME": "w", "JOB_INDEX": "0", "REPLICATED_JOB_REPLICAS": "2"}
    assert discover({**pod, **several}).token == ""  # its Jobs have different ones
