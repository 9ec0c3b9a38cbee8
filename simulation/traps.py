"""Exceptions put where the product's own code might raise one.

Owns which trap is armed, for whom, and who stepped into one: only that request may suffer. Does not
know schedules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from core.ids import RouterId, TransferId
from core.session import Submit
from core.types import GenerateRequest, Path, RequestEvent, TextDelta
from router.choice_output import TextDecoder
from router.orchestrator import Orchestrator
from router.request_state import Emit
from simulation.ports import InlineDecoder
from worker.attempts import AttemptTable
from worker.ports import WorkerRole

CALLBACKS = (
    "transfer_reserved",
    "transfer_sent",
    "transfer_starting",
    "transfer_arrived",
)
"""What an agent posts to its worker's loop while a transfer goes well."""


class Injected(Exception):
    """Not of our error tree: what a library or a mistake raises."""


class Place(StrEnum):
    """Where a trap can lie."""

    DECODER = "decoder"
    EMIT = "emit"
    SUBMIT = "submit"
    CALLBACK = "callback"


class Traps:
    """Armed traps by place and by whom they wait for: a request, or a node."""

    def __init__(self) -> None:
        """Nothing is armed."""
        self._armed: dict[tuple[Place, str], int] = {}
        self.sprung: Counter[Place] = Counter()
        self.asking: dict[str, dict[TransferId, None]] = {}
        """By decode worker: hand-overs for which a reservation was asked."""
        self.victims: set[str] = set()
        """Requests, by the client's name."""

    def arm(self, place: Place, whom: str, after: int = 0) -> None:
        """Raise once at a place, after it was passed `after` times."""
        self._armed[place, whom] = after

    def disarm(self, place: Place, whom: str) -> bool:
        """Take an armed trap away; False: it has sprung."""
        return self._armed.pop((place, whom), None) is not None

    def step(self, place: Place, whom: str, request_id: str) -> None:
        """Pass a place.

        Raises:
            Injected: A trap was armed here.
        """
        left = self._armed.get((place, whom))
        if left is None:
            return
        if left:
            self._armed[place, whom] = left - 1
            return
        # Once: the attempt that follows must succeed.
        del self._armed[place, whom]
        self.sprung[place] += 1
        # A run id is the client's request id and a number of the run.
        self.victims.add(request_id.partition("~")[0])
        raise Injected(f"injected: {place}")

    # --- at a router ------------------------------------------------------------------------------

    def decoder(self, request: GenerateRequest) -> TextDecoder:
        """Make a text decoder that may raise."""
        return _TrappedDecoder(self, request.request_id)

    def trap_emit(self, orchestrator: Orchestrator) -> None:
        """Let the consumer of an orchestrator's events raise on a token."""
        run = orchestrator.run

        async def trapped(
            request: GenerateRequest, emit: Emit, forced_path: Path | None = None
        ) -> None:
            def passing(event: RequestEvent) -> None:
                if isinstance(event, TextDelta):
                    self.step(Place.EMIT, request.request_id, request.request_id)
                emit(event)

            await run(request, passing, forced_path)

        orchestrator.run = trapped  # type: ignore[method-assign]

    # --- at a worker ------------------------------------------------------------------------------

    def trap_worker(self, node: str, attempts: AttemptTable) -> None:
        """Let what a session reader calls raise."""
        inner = attempts.submit

        def trapped(router_id: RouterId, submit: Submit) -> None:
            self.step(Place.SUBMIT, node, submit.run_id)
            inner(router_id, submit)

        attempts.submit = trapped  # type: ignore[method-assign]

    def trap_role(self, node: str, attempts: AttemptTable) -> None:
        """Let what an agent posts to the worker's loop raise."""
        role: WorkerRole = attempts.role
        for name in CALLBACKS:
            if (callback := getattr(role, name, None)) is not None:
                setattr(role, name, self._trapped_callback(node, attempts, name, callback))

    def _trapped_callback(
        self, node: str, attempts: AttemptTable, name: str, callback: Callable[..., None]
    ) -> Callable[..., None]:
        asking = self.asking.setdefault(node, {})

        def trapped(transfer_id: TransferId, *args: Any) -> None:  # noqa: ANN401
            for key, attempt in attempts.by_run.items():
                if attempt.submit.transfer_id == transfer_id:
                    self.step(Place.CALLBACK, node, key)
                    break
            if name == "transfer_starting":
                asking[transfer_id] = None
            callback(transfer_id, *args)

        return trapped


class _TrappedDecoder:
    def __init__(self, traps: Traps, request_id: str) -> None:
        self._inner = InlineDecoder()
        self._traps = traps
        self._request_id = request_id

    def push(self, token_id: int) -> str:
        self._traps.step(Place.DECODER, self._request_id, self._request_id)
        return self._inner.push(token_id)

    def flush(self) -> str:
        return self._inner.flush()
