"""Mutual authentication of two workers with their Job's token, before they exchange messages.

Each worker proves that it knows the token without sending it: it receives a random nonce, and returns an HMAC that is
computed from the token and the nonce (challenge-response). All fields have a fixed length, so that nothing from an
unknown process is parsed or stored. The HMAC also covers the sender's role, so that a worker's proof cannot be sent
back to it. Later messages are not signed: authentication protects against processes that connect to the port, but not
against those that can change packets on the network. If the token is empty (no uid, or a JobSet with several Jobs), any
process that uses this protocol with an empty token is accepted.
"""

import hmac
import secrets

from trainer.cluster.control import Connection, ProtocolError

GREETING = b"kubetune peer 1\n"  # distinguishes workers from other servers, and from other versions of this protocol
NONCE_BYTES = 32
DIGEST = "sha256"
DIGEST_BYTES = 32  # length of a SHA-256 digest


class WrongTokenError(ConnectionError):
    """The peer does not know this Job's token."""


def accept_peer(peer: Connection, token: str) -> None:
    """Authenticate a peer that has connected to this worker, and prove to it that this worker knows the token.

    Raises:
        ProtocolError: the peer does not send a worker's greeting.
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
    """Authenticate to the peer that this worker has connected to, and verify that the peer also knows the token.

    Raises:
        ProtocolError: the peer does not send a worker's greeting.
        WrongTokenError: the peer does not know the token, or closes the connection instead of sending its proof.
        OSError: the connection is closed, broken or timed out.
    """
    _require_greeting(peer)
    peer_nonce, own_nonce = peer.receive_exactly(NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
    peer.socket.sendall(GREETING + own_nonce + _prove(token, b"connecting", peer_nonce, own_nonce))
    try:
        proof = peer.receive_exactly(DIGEST_BYTES)
    except ConnectionError as error:
        raise WrongTokenError("it rejects the token of this Job") from error
    if not hmac.compare_digest(proof, _prove(token, b"accepting", own_nonce, peer_nonce)):
        raise WrongTokenError("it does not have the token of this Job")


def _require_greeting(peer: Connection) -> None:
    if peer.receive_exactly(len(GREETING)) != GREETING:
        raise ProtocolError("the peer is not a worker")


def _prove(token: str, role: bytes, verifier_nonce: bytes, prover_nonce: bytes) -> bytes:
    """Compute the proof that the worker in this role (b"connecting" or b"accepting") knows the token."""
    return hmac.digest(token.encode(), role + verifier_nonce + prover_nonce, DIGEST)
