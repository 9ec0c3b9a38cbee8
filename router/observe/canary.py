"""The canary: a small request that crosses both workers, again and again.

Owns when it is sent and what it asks. Does not know HTTP or gRPC, nor what else readiness needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Protocol

from core import events
from core.config import RouterConfig
from core.errors import NoWorker
from core.ids import Ids
from core.ports import Clock
from core.session import Role
from core.timeline import rounded_ms
from core.types import (
    CANARY_TIER,
    GenerateRequest,
    Path,
    RequestEnded,
    RequestEvent,
    SamplingParams,
)
from router.observe.readiness import Proof
from router.request_params import ServedModel
from router.request_stream import RequestRunner

CANARY_TIMEOUT_S = 10.0
CANARY_TOKENS = 4
NOT_READY_INTERVAL_S = 1.0
SETTLE_S = 0.2
"""Changes come in groups: one worker leaves, another joins."""


class LivePools(Protocol):
    """Which pools have workers (`router.workers.sessions`)."""

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change."""
        ...

    def is_starting(self) -> bool:
        """True while a worker is expected."""
        ...

    def live_roles(self) -> Collection[Role]:
        """Roles of which a worker can take requests."""
        ...


class Canary:
    """Sends canaries, and notes in the proof how they end."""

    def __init__(
        self,
        model: ServedModel,
        config: RouterConfig,
        runner: RequestRunner,
        pools: LivePools,
        clock: Clock,
        ids: Ids,
        proof: Proof,
    ) -> None:
        """Prepare; `start` sends the first one.

        Args:
            model: Whose vocabulary the prompt is from.
            config: The router's.
            runner: Runs the canary like any request.
            pools: Show which of them live.
            clock: Of this process.
            ids: Name the requests.
            proof: Takes the results.
        """
        self._model = model
        self._config = config
        self._runner = runner
        self._pools = pools
        self._clock = clock
        self._ids = ids
        self._proof = proof
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start sending."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop sending."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        """Send canaries: at intervals, and whenever a worker joins or leaves."""
        was_good: bool | None = None
        while True:
            changed = self._pools.changed  # before the canary: a change during it counts
            await self._once()
            is_good = self._proof.is_good
            # While workers start for the first time nothing is wrong: that is no news for a log.
            is_still_starting = was_good is None and self._pools.is_starting()
            if is_good is not was_good and (is_good or not is_still_starting):
                self._log()
                was_good = is_good
            self._proof.note_checked()
            interval_s = self._config.canary_interval_s if is_good else NOT_READY_INTERVAL_S
            try:
                async with asyncio.timeout(interval_s):
                    await changed.wait()
                    await asyncio.sleep(SETTLE_S)
            except TimeoutError:
                pass

    def _log(self) -> None:
        took_s = self._proof.took_s
        if self._proof.is_good and took_s is not None:
            events.ROUTER_READY.log(canary_ms=rounded_ms(took_s))
        else:
            events.ROUTER_NOT_READY.log(reason=self._proof.error)

    async def _once(self) -> None:
        if self._proof.missing_roles():
            self._proof.note_unsent()
            return
        started_at = self._clock.now_s()
        # Any tokens do: what is proved is that a request gets through, not what it says.
        prompt = tuple(i % self._model.vocabulary_size for i in range(1, 9))
        request = GenerateRequest(
            request_id=self._ids.request(),
            model=self._model.name,
            token_ids=prompt,
            sampling=SamplingParams(temperature=0.0, max_tokens=CANARY_TOKENS, ignore_eos=True),
            seed=0,
            deadline_at=started_at + CANARY_TIMEOUT_S,
            tier=CANARY_TIER,
        )
        # Over the transfer if it can be: it is what a local request would not prove.
        crosses = set(self._pools.live_roles()) == {Role.PREFILL, Role.DECODE}
        ended: list[RequestEvent] = []
        await self._runner.run(
            request, ended.append, forced_path=Path.PD if crosses else Path.LOCAL
        )
        last = ended[-1]
        error = last.error if isinstance(last, RequestEnded) else NoWorker("the canary did not end")
        took_s = None if error else self._clock.now_s() - started_at
        self._proof.note(took_s, error.message if error else "", crossed=crosses)
