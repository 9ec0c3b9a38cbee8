"""Which workers know which, so that no request has to wait for a pair to connect.

Owns the senders and receivers of KV that are here now. Each pair is introduced once: a newcomer
costs one step for each of its partners. Does not know streams.
"""

from __future__ import annotations

from core.ids import WorkerLife
from core.session import Role
from router.workers.session import WorkerSession


class Introductions:
    """Introduces senders to receivers when either joins."""

    def __init__(self) -> None:
        self._senders: dict[WorkerLife, str] = {}
        self._receivers: dict[WorkerLife, WorkerSession] = {}

    def joined(self, session: WorkerSession) -> None:
        """Introduce a connected worker, unless it has been introduced already."""
        descriptor = session.descriptor
        if descriptor.role is Role.PREFILL:
            if session.key not in self._senders:
                self._senders[session.key] = descriptor.transfer_address
                for receiver in self._receivers.values():
                    receiver.routes.introduce(descriptor.transfer_address)
        elif self._receivers.get(session.key) is not session:
            self._receivers[session.key] = session
            for address in self._senders.values():
                session.routes.introduce(address)

    def left(self, session: WorkerSession) -> None:
        """Forget a lost worker; if it comes back, it is a newcomer."""
        address = self._senders.pop(session.key, None)
        if address is not None:
            for receiver in self._receivers.values():
                receiver.routes.forget(address)
        self._receivers.pop(session.key, None)
