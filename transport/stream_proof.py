"""The proof that both ends of an internal stream belong to one cluster, without certificates.

Owns the message authentication codes (MACs) that the two ends exchange and how they are compared:
keyed hashes over a nonce of the listener, which is part of its address, and one of the dialler. A
dialler's MAC is useless for any other stream, even to a process that takes over the port of a dead
worker. Does not know gRPC.

    dialler ── its nonce and MAC ──▶ listener    a wrong MAC: refused before anything is read
            ◀── the listener's MAC ──            a wrong MAC: no message is read
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

NONCE_BYTES = 16
MAC_BYTES = 32


def stream_key(cluster_key: str) -> bytes:
    """Derive the key of the MACs from the secret that the processes of a cluster share."""
    # With a person of its own: other keys are derived from the same secret, and must differ.
    secret = cluster_key.encode()
    return hashlib.blake2b(secret, digest_size=32, person=b"baton.streams").digest()


def new_nonce() -> str:
    """Draw a nonce, which makes the MACs of a listener or a stream unique."""
    return secrets.token_hex(NONCE_BYTES)


class StreamProof:
    """The two MACs of one stream."""

    def __init__(self, key: bytes, method: str, listener: str, dialler: str) -> None:
        """Prove one stream.

        Args:
            key: From `stream_key`; empty: MACs that anyone can compute, for tests.
            method: The kind of stream; a MAC for one kind is wrong for another.
            listener: The listener's nonce.
            dialler: The dialler's nonce.
        """
        self._key = key
        self._names = (method, listener, dialler)

    @property
    def dialler_mac(self) -> str:
        """MAC that the dialler sends."""
        return self._mac("dialler")

    @property
    def listener_mac(self) -> str:
        """MAC that the listener sends."""
        return self._mac("listener")

    def is_dialler(self, mac: str) -> bool:
        """True if a MAC is the dialler's; compared in constant time."""
        return hmac.compare_digest(mac.encode(), self.dialler_mac.encode())

    def is_listener(self, mac: str) -> bool:
        """True if a MAC is the listener's; compared in constant time."""
        return hmac.compare_digest(mac.encode(), self.listener_mac.encode())

    def _mac(self, end: str) -> str:
        # With the end in it, or a listener could send the dialler's own MAC back as proof.
        # A separator that no name contains: two triples must never make one text.
        text = "\0".join((end, *self._names)).encode()
        return hashlib.blake2b(text, key=self._key, digest_size=MAC_BYTES).hexdigest()
