"""Mutual authentication of two workers with the token of their Job, before they exchange messages.

Each worker proves that it knows the token without sending it: it receives a random nonce, and returns the HMAC of the
nonce (challenge-response). All fields have a fixed length, so that nothing from an unknown process is parsed or stored.
The HMAC includes the role of its sender, so that the proof of one worker cannot be sent back to it. Later messages are
not signed: this protects against processes that connect to the port, not against those that can change packets on the
network. If the token is empty (not set, or several Jobs of a JobSet), every worker that uses the protocol is accepted.
"""

import hmac
import secrets

from trainer.cluster.control import Connection, ProtocolError

GREETING = b"kubetune peer 1\n"  # distinguishes workers from other servers, and from other versions of this protocol
NONCE_BYTES = 32
DIGEST = "sha256"
DIGEST_BYTES = 32  # of a SHA-256 digest


class WrongTokenError(ConnectionError):
    """The peer does not know the token of this Job."""


def accept_peer(peer: Connection, token: str) -> None:
    """Authenticate a peer that has connected to this worker, and prove to it that this worker knows the token.

    Raises:
        ProtocolError: the peer does not send the greeting of a worker.
        WrongTokenError: the peer does not know the token.
        OSError: the connection is closed, broken or timed out.
    """
    own_nonce = secrets.token_bytes(NONCE_BYTES)
    peer.socket.sendall(GREETING + own_nonce)
    _require_greeting(peer)
    peer_nonce, proof = peer.receive_exactly(NONCE_BYTES), peer.receive_exactly(DIGEST_BYTES)
    if not hmac.compare_digest(proof, _prove(token, b"connecting", own_nonce, peer_nonce)):
        raise WrongTokenError("a process without the token of this Job")
    peer.socket.sendall(_prove(token, b"accepting", peer_nonce, own_nonce))


def contact_peer(peer: Connection, token: str) -> None:
    """Authenticate to the peer that this worker has connected to, and verify that it knows the token too.

    Raises:
        ProtocolError: the peer does not send the greeting of a worker.
        WrongTokenError: the peer does not know the token, or closes the connection instead of sending its proof.
        OSError: the connection is closed, broken or timed out.
    """
    _require_greeting(peer)
    peer_nonce, own_nonce = peer.receive_exactly(NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
    peer.socket.sendall(GREETING + own_nonce + _prove(token, b"connecting", peer_nonce, own_nonce))
    try:
        proof = peer.receive_exactly(DIGEST_BYTES)
    except ConnectionError as error:
        raise WrongTokenError("it refuses the token of this Job") from error
    if not hmac.compare_digest(proof, _prove(token, b"accepting", own_nonce, peer_nonce)):
        raise WrongTokenError("it does not have the token of this Job")


def _require_greeting(peer: Connection) -> None:
    if peer.receive_exactly(len(GREETING)) != GREETING:
        raise ProtocolError("the peer is not a worker")


def _prove(token: str, role: bytes, first_nonce: bytes, second_nonce: bytes) -> bytes:
    """Compute the proof that a worker in this role ("connecting" or "accepting") knows the token."""
    return hmac.digest(token.encode(), role + first_nonce + second_nonce, DIGEST)
