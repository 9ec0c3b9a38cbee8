"""Which workers were told of which, so that no request is the first to meet a pair.

Owns the two lists, senders and receivers of KV, as they are now. A newcomer costs one step for each
partner it has, and nothing else does: a receiver hears of all senders once, a sender is told to
each receiver once, and what is gone is forgotten. Does not know streams.
"""

from __future__ import annotations

from core.ids import WorkerLife
from core.session import Role
from router.workers.session import WorkerSession


class Introductions:
    """Connections, mappings and groups are made when a worker joins."""

    def __init__(self) -> None:
        """Nobody is there."""
        self._senders: dict[WorkerLife, str] = {}
        self._receivers: dict[WorkerLife, WorkerSession] = {}

    def joined(self, session: WorkerSession) -> None:
        """A worker is connected; one that is here already has been introduced."""
        descriptor = session.descriptor
        if descriptor.role is Role.PREFILL:
            if session.key not in self._senders:
                self._senders[session.key] = descriptor.transfer_address
                for receiver in self._receivers.values():
                    receiver.introduce(descriptor.transfer_address)
        elif self._receivers.get(session.key) is not session:
            self._receivers[session.key] = session
            for address in self._senders.values():
                session.introduce(address)

    def left(self, session: WorkerSession) -> None:
        """A worker is lost; should it come back, it is a newcomer."""
        address = self._senders.pop(session.key, None)
        if address is not None:
            for receiver in self._receivers.values():
                receiver.forget_peer(address)
        self._receivers.pop(session.key, None)
