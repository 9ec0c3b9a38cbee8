"""The proof that both ends of an inner stream are of one cluster, where no certificate says so.

Owns the words that the two ends exchange and how they are compared: keyed hashes over a nonce of
the listener, which is part of its address, and one of the dialler. What a dialler shows is worth
nothing to anybody else, not even to who takes over the port of a worker that died. Does not know
gRPC. Called by `kv_transfer.grpc_network`.

    dialler ── its nonce, its word ──▶ listener    a wrong word: refused before anything is read
            ◀── the listener's word ──             a wrong word: nothing that came is looked at
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

NONCE_BYTES = 16
WORD_BYTES = 32


def stream_key(cluster_key: str) -> bytes:
    """Derive the key of the words from the secret that the processes of a cluster share."""
    secret = cluster_key.encode()
    return hashlib.blake2b(secret, digest_size=32, person=b"baton.streams").digest()


def new_nonce() -> str:
    """Draw what makes the words of one listener, or of one stream, unlike all others."""
    return secrets.token_hex(NONCE_BYTES)


class StreamProof:
    """What the two ends of one stream show each other."""

    def __init__(self, key: bytes, method: str, listener: str, dialler: str) -> None:
        """Name the stream.

        Args:
            key: From `stream_key`; empty: words that anybody can work out, for tests.
            method: What kind of stream it is; words for one kind are worth nothing for another.
            listener: Nonce of who listens.
            dialler: Nonce of who dials.
        """
        self._key, self._names = key, (method, listener, dialler)

    @property
    def dialler_word(self) -> str:
        """What the dialler shows."""
        return self._word("dialler")

    @property
    def listener_word(self) -> str:
        """What the listener shows."""
        return self._word("listener")

    def is_dialler(self, word: str) -> bool:
        """True if a word is the dialler's; the time it takes says nothing of how near it was."""
        return hmac.compare_digest(word.encode(), self.dialler_word.encode())

    def is_listener(self, word: str) -> bool:
        """True if a word is the listener's; compared like a dialler's."""
        return hmac.compare_digest(word.encode(), self.listener_word.encode())

    def _word(self, end: str) -> str:
        text = "\0".join((end, *self._names)).encode()
        return hashlib.blake2b(text, key=self._key, digest_size=WORD_BYTES).hexdigest()
