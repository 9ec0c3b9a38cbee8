"""The bytes in which routers keep ledgers and their clock in the store.

Owns the format, its authentication and the checks of what is read. Does not know where it is kept.

    tag │ msgpack of the value      the tag is a keyed hash over the name in the store and the rest
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple, TypeVar

import msgspec
from msgspec.msgpack import Decoder, encode

from router.quotas.ledger import Ledger, Run, Slot

TAG_BYTES = 16


class ClockValue(NamedTuple):
    """What the routers agree on about time."""

    epoch: str
    """Changes when the store is found to have lost something."""
    now_ms: int
    base: str
    """Names the time that is counted: routers that began apart have several, until they meet."""
    lost_ms: int
    """When that was found last; below 0: never."""


class LedgerValue(NamedTuple):
    """One key's ledger."""

    now_ms: int
    """By the clock of its writer."""
    slots: list[tuple[str, int, Slot]]
    runs: dict[str, Run]


Value = TypeVar("Value", ClockValue, LedgerValue)


class ValueCodec:
    """Writes and reads values with one cluster's key."""

    def __init__(self, cluster_key: str) -> None:
        """Derive the key of the tags from the secret that a cluster shares."""
        self._key = hashlib.blake2b(
            cluster_key.encode(), digest_size=32, person=b"baton.quotas"
        ).digest()
        self._clock = Decoder(ClockValue)
        self._ledger = Decoder(LedgerValue)

    def write_clock(self, name: str, value: ClockValue) -> bytes:
        """Return the bytes of a clock."""
        return self._sealed(name, encode(value))

    def write_ledger(self, name: str, ledger: Ledger, now_ms: int) -> bytes:
        """Return the bytes of a ledger."""
        slots = [(router, second, slot) for (router, second), slot in ledger.slots.items()]
        return self._sealed(name, encode(LedgerValue(now_ms, slots, ledger.runs)))

    def read_clock(self, name: str, value: bytes) -> ClockValue | None:
        """Read a clock; None if no router of this cluster wrote it."""
        return self._read(name, value, self._clock)

    def read_ledger(self, name: str, value: bytes) -> LedgerValue | None:
        """Read a ledger; None if no router of this cluster wrote it."""
        return self._read(name, value, self._ledger)

    def _read(self, name: str, value: bytes, decoder: Decoder[Value]) -> Value | None:
        tag = value[:TAG_BYTES]
        body = value[TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(name, body)):
            return None
        try:
            return decoder.decode(body)
        except msgspec.MsgspecError:  # of another version
            return None

    def _sealed(self, name: str, body: bytes) -> bytes:
        return self._tag(name, body) + body

    def _tag(self, name: str, body: bytes) -> bytes:
        content = name.encode() + b"\0" + body
        return hashlib.blake2b(content, key=self._key, digest_size=TAG_BYTES).digest()
