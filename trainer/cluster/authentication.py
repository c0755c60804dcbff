"""Mutual authentication of two workers by the token of their Job, before either reads a message of the other.

Both prove that they know the token without sending it (a challenge and its HMAC in each direction). All fields have a
fixed length, so that nothing of an unknown process is parsed or stored. The role in the HMAC prevents that one worker's
proof is reflected to another one. Messages after that are not signed: this protects against processes that connect to
the port, not against those that can change packets on the way. Without a token (outside of Kubernetes) any worker that
uses the protocol is accepted.
"""

import hmac
import secrets

from trainer.cluster.control import Connection, ProtocolError

GREETING = b"kubetune peer 1\n"  # distinguishes workers from other servers, and from another version of this protocol
NONCE_BYTES = 32
DIGEST = "sha256"
DIGEST_BYTES = 32


class WrongTokenError(ConnectionError):
    """The peer does not have the token of this Job."""


def accept_peer(peer: Connection, token: str) -> None:
    """Authenticate on the side that accepted the connection.

    Raises ProtocolError if the peer is not a worker, WrongTokenError if it has another token.
    """
    own = secrets.token_bytes(NONCE_BYTES)
    peer.socket.sendall(GREETING + own)
    _require_magic(peer)
    other, proof = peer.receive_exactly(NONCE_BYTES), peer.receive_exactly(DIGEST_BYTES)
    if not hmac.compare_digest(proof, _prove(token, b"connecting", own, other)):
        raise WrongTokenError("a process without the token of this Job")
    peer.socket.sendall(_prove(token, b"accepting", other, own))


def contact_peer(peer: Connection, token: str) -> None:
    """Authenticate on the side that opened the connection. Raises the errors of `accept_peer`."""
    _require_magic(peer)
    other, own = peer.receive_exactly(NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
    peer.socket.sendall(GREETING + own + _prove(token, b"connecting", other, own))
    try:
        proof = peer.receive_exactly(DIGEST_BYTES)
    except ConnectionError as error:
        raise WrongTokenError("it refuses the token of this Job") from error
    if not hmac.compare_digest(proof, _prove(token, b"accepting", own, other)):
        raise WrongTokenError("it does not have the token of this Job")


def _require_magic(peer: Connection) -> None:
    if peer.receive_exactly(len(GREETING)) != GREETING:
        raise ProtocolError("the peer is not a worker")


def _prove(token: str, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(token.encode(), role + first + second, DIGEST)
