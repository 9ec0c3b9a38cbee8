"""Those who look on while a simulated cluster runs.

Owns what they hear: steps, ends of attempts, and what routers report of requests. Does not know
what is checked.
"""

from __future__ import annotations

from core.block_hash import BlockHash
from core.errors import ServingError
from core.plan import StepPlan
from core.types import GenerateRequest, RequestEnded
from engine.scheduling.sequence import Sequence
from router.placement import Placement
from router.prefix_outcome import PromptOutcome
from router.prompt_prefixes import PromptNames
from router.request_state import RequestObserver, RequestState
from simulation.quota_record import QuotaAsk
from worker.attempt import Attempt


class ClusterObserver(RequestObserver):
    """Hears what happens in a cluster; this one notes nothing."""

    def step(self, node: str, plan: StepPlan) -> None:
        """Note a step that a worker is about to take."""

    def attempt_ended(self, node: str, attempt: Attempt) -> None:
        """Note the end of an attempt at a worker."""

    def block_stored(self, node: str, scope: str, name: BlockHash) -> None:
        """Note that a worker has given a block of a scope its name."""

    def blocks_found(self, node: str, sequence: Sequence, block_ids: list[int]) -> None:
        """Note which leading blocks of a sequence its worker found cached, as it starts."""

    def placed(
        self, router: str, run: RequestState, names: PromptNames, placement: Placement
    ) -> None:
        """Note that a router has placed a request; `names` are those of its prompt's blocks."""

    def charge_asked(self, ask: QuotaAsk) -> None:
        """Note that a router is asked to charge a request; what comes of it will stand in `ask`."""

    def charge_answered(self, ask: QuotaAsk, error: ServingError | None) -> None:
        """Note that a router has granted a charge, or refused it."""


class Observers(ClusterObserver):
    """Passes everything on to each observer that has joined."""

    def __init__(self) -> None:
        """Nobody looks on yet."""
        self._all: list[ClusterObserver] = []

    def join(self, observer: ClusterObserver) -> None:
        """Let one more hear everything from now on."""
        self._all.append(observer)

    def step(self, node: str, plan: StepPlan) -> None:
        """Pass on."""
        for observer in self._all:
            observer.step(node, plan)

    def attempt_ended(self, node: str, attempt: Attempt) -> None:
        """Pass on."""
        for observer in self._all:
            observer.attempt_ended(node, attempt)

    def block_stored(self, node: str, scope: str, name: BlockHash) -> None:
        """Pass on."""
        for observer in self._all:
            observer.block_stored(node, scope, name)

    def blocks_found(self, node: str, sequence: Sequence, block_ids: list[int]) -> None:
        """Pass on."""
        for observer in self._all:
            observer.blocks_found(node, sequence, block_ids)

    def placed(
        self, router: str, run: RequestState, names: PromptNames, placement: Placement
    ) -> None:
        """Pass on."""
        for observer in self._all:
            observer.placed(router, run, names, placement)

    def charge_asked(self, ask: QuotaAsk) -> None:
        """Pass on."""
        for observer in self._all:
            observer.charge_asked(ask)

    def charge_answered(self, ask: QuotaAsk, error: ServingError | None) -> None:
        """Pass on."""
        for observer in self._all:
            observer.charge_answered(ask, error)

    def request_ended(self, run: RequestState, ended: RequestEnded) -> None:
        """Pass on."""
        for observer in self._all:
            observer.request_ended(run, ended)

    def request_refused(self, request: GenerateRequest, error: ServingError) -> None:
        """Pass on."""
        for observer in self._all:
            observer.request_refused(request, error)

    def prompt_computed(self, run: RequestState, outcome: PromptOutcome) -> None:
        """Pass on."""
        for observer in self._all:
            observer.prompt_computed(run, outcome)

    def retried(self, error: ServingError) -> None:
        """Pass on."""
        for observer in self._all:
            observer.retried(error)
