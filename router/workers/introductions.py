"""Which workers know which, so that no request has to wait for a pair to connect.

Owns the senders and receivers of KV that are here now. Each pair is introduced once: a newcomer
costs one step for each of its partners. Does not know streams.
"""

from __future__ import annotations

from core.ids import WorkerLife
from core.session import Role, WorkerDescriptor
from router.workers.routes import KVRoutes


class Introductions:
    """Introduces senders to receivers when either joins."""

    def __init__(self) -> None:
        self._senders: dict[WorkerLife, str] = {}
        self._receivers: dict[WorkerLife, KVRoutes] = {}

    def joined(self, descriptor: WorkerDescriptor, routes: KVRoutes) -> None:
        """Introduce a connected worker, unless it has been introduced already."""
        life = descriptor.worker_id, descriptor.incarnation
        if descriptor.role is Role.PREFILL:
            if life not in self._senders:
                self._senders[life] = descriptor.transfer_address
                for receiver in self._receivers.values():
                    receiver.introduce(descriptor.transfer_address)
        elif self._receivers.get(life) is not routes:  # a new session has routes of its own
            self._receivers[life] = routes
            for address in self._senders.values():
                routes.introduce(address)

    def left(self, descriptor: WorkerDescriptor) -> None:
        """Forget a lost worker; if it comes back, it is a newcomer."""
        life = descriptor.worker_id, descriptor.incarnation
        # A receiver has no address to forget: nobody dials it for KV.
        address = self._senders.pop(life, None)
        if address is not None:
            for receiver in self._receivers.values():
                receiver.forget(address)
        self._receivers.pop(life, None)
