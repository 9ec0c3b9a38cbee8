"""Requests of keys with limits: charged by their router before they run, settled at their end.

Owns that way, as a router's servers go it, and what a trial notes of it. Does not know what is
checked.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from core.errors import DeadlineExceeded, ServingError
from core.types import GenerateRequest, RequestEnded
from router.access.identities import Identity
from router.request_params import RequestParams
from router.request_stream import RequestStream
from simulation.plan import METERED, PlannedRequest
from simulation.quota_record import FREE, QuotaAsk, QuotaCost
from simulation.router_node import SimRouter
from simulation.shape import ClusterShape
from simulation.world import World


def limit_of(shape: ClusterShape) -> QuotaCost:
    """Return what each key with limits may use in a minute."""
    tier = shape.tiers.get(METERED)
    return FREE if tier is None else QuotaCost(tier.requests_per_minute, tier.tokens_per_minute)


def estimate_of(planned: PlannedRequest, limit: QuotaCost) -> QuotaCost:
    """Return what a request is charged before it runs: its prompt and its longest answer."""
    num_prompt = len(planned.prompt)
    tokens = num_prompt + planned.sampling.max_tokens * planned.sampling.n
    if planned.is_length_open and limit.tokens:  # an estimate keeps nobody out for good
        tokens = max(num_prompt + 1, min(tokens, limit.tokens))
    return QuotaCost(1, tokens)


def identity_of(key: str) -> Identity:
    """Return who calls with a key that has limits."""
    return Identity(tier=METERED, key=key)


class MeteredCall:
    """One call of a client: it waits for its charge, and then has a stream."""

    def __init__(
        self,
        world: World,
        router: SimRouter,
        planned: PlannedRequest,
        request: GenerateRequest,
        wake: asyncio.Event,
    ) -> None:
        """Ask on the router's node; `wake` is set when there is an answer, or the router dies."""
        self._world = world
        self._router = router
        self._planned = planned
        self._request = request
        self._wake = wake
        limit = limit_of(world.shape)
        self._ask = QuotaAsk(
            router.name,
            planned.key,
            planned.name,
            estimate_of(planned, limit),
            world.clock.now_s(),
        )
        router.connected(wake)
        world.observers.charge_asked(self._ask)
        self._task = asyncio.get_running_loop().create_task(
            self._run(), context=router.context.copy()
        )
        self._task.add_done_callback(lambda _: wake.set())

    @property
    def is_answered(self) -> bool:
        """True once `stream` has something to say."""
        return self._task.done()

    @property
    def stream(self) -> RequestStream:
        """What it got.

        Raises:
            RateLimited: It was refused.
        """
        return self._task.result()

    def leave(self) -> None:
        """Wait no longer; the router sees that, when it runs."""
        self._task.cancel()
        self._task.add_done_callback(self._let_go)

    def _let_go(self, task: asyncio.Task[RequestStream]) -> None:
        if task.cancelled() or task.exception() is not None:
            return
        if self._router.is_alive:  # it was served just before
            asyncio.get_running_loop().create_task(
                task.result().close(), context=self._router.context.copy()
            )

    # --- on the router's node ---------------------------------------------------------------------

    async def _run(self) -> RequestStream:
        ask = self._ask
        planned = self._planned
        sampling = {} if planned.is_length_open else {"max_tokens": planned.sampling.max_tokens}
        is_resumed = bool(self._request.resume_from)
        params = RequestParams(
            self._request.token_ids,
            sampling,
            request_id=planned.name if planned.is_named or is_resumed else "",
            identity=identity_of(planned.key),
        )
        try:
            charge = await self._router.charging.charge(
                [params], [self._request], is_resumable=True
            )
        except ServingError as error:
            self._answered(error)
            raise
        except asyncio.CancelledError:
            ask.left_s = self._world.clock.now_s()
            raise
        if charge is None or charge._charge is None:
            raise RuntimeError(f"key {planned.key} has no limit")
        ask.is_granted = True
        ask.charged = QuotaCost(*charge._charge.amount)
        self._answered(None)

        def ended(end: RequestEnded | None) -> None:
            ask.used = used_of(end)
            ask.ended_s = self._world.clock.now_s()
            charge.request_ended(end)

        return self._router.open(self._request, self._wake, ended)

    def _answered(self, error: ServingError | None) -> None:
        ask = self._ask
        ask.answered_s = self._world.clock.now_s()
        task = asyncio.current_task()
        ask.is_local = task in self._router.local_charges
        self._router.local_charges.pop(self._task, None)
        self._world.observers.charge_answered(ask, error)


def used_of(end: RequestEnded | None) -> QuotaCost:
    """Return what a request has cost: nothing if it never ran, or failed by our fault."""
    if end is None or not end.timing.path:
        return FREE
    is_ours = end.error is not None and end.error.http_status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if is_ours and not isinstance(end.error, DeadlineExceeded):
        return FREE
    tokens = end.usage.prompt_tokens + end.usage.completion_tokens
    return QuotaCost(1, tokens)


async def read_to_its_end(stream: RequestStream, wake: asyncio.Event, router: SimRouter) -> None:
    """Read a stream until it has ended, or its router is dead."""
    while router.is_alive:
        wake.clear()
        if any(isinstance(event, RequestEnded) for event in stream.take()):
            return
        await wake.wait()
