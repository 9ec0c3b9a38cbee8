"""Readiness: a small request that crosses both workers, again and again.

Owns the canary, and whether the router is ready. Does not know HTTP or gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from core import events
from core.config import RouterConfig
from core.errors import NoWorker
from core.ids import Ids
from core.ports import Clock
from core.session import Role
from core.types import GenerateRequest, Path, RequestEnded, RequestEvent, SamplingParams
from router.admission import CANARY_TIER
from router.orchestrator import Orchestrator
from router.request_builder import ServedModel
from router.workers.sessions import WorkerSessions

CANARY_TIMEOUT_S = 10.0
CANARY_TOKENS = 4


class Canary:
    """The proof behind `/ready`."""

    def __init__(
        self,
        model: ServedModel,
        config: RouterConfig,
        orchestrator: Orchestrator,
        sessions: WorkerSessions,
        clock: Clock,
        ids: Ids,
        expected_roles: frozenset[Role],
        *,
        must_cross: bool,
    ) -> None:
        """Prepare; `start` sends the first one.

        Args:
            model: Whose vocabulary the prompt is from.
            config: The router's.
            orchestrator: Runs the canary like any request.
            sessions: Show which pools live.
            clock: Of this process.
            ids: Name the requests.
            expected_roles: Pools that the config asks for.
            must_cross: Path pd is forced: the router is ready only while all of them live.
        """
        self._model = model
        self._config = config
        self._orchestrator = orchestrator
        self._sessions = sessions
        self._clock = clock
        self._ids = ids
        self._expected_roles = expected_roles
        self._must_cross = must_cross
        self._has_crossed = False
        self._task: asyncio.Task[None] | None = None
        self.took_s: float | None = None
        self.has_passed = False
        """A request got through at least once."""
        self._error = "no canary has run yet"
        self.on_checked: Callable[[bool], Awaitable[None]] | None = None
        """Called after every canary: is the router ready?"""

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
            changed = self._sessions.changed
            await self._once()
            is_good = self.is_good
            is_still_starting = was_good is None and self._sessions.is_starting()
            if is_good is not was_good and (is_good or not is_still_starting):
                self._log()
                was_good = is_good
            if self.on_checked is not None:
                await self.on_checked(is_good)
            try:
                async with asyncio.timeout(self._config.canary_interval_s if is_good else 1.0):
                    await changed.wait()
                    # Changes come in groups: one worker leaves, another joins.
                    await asyncio.sleep(0.2)
            except TimeoutError:
                pass

    def _log(self) -> None:
        if self.is_good and self.took_s is not None:
            events.ROUTER_READY.log(canary_ms=round(self.took_s * 1000, 3))
        else:
            events.ROUTER_NOT_READY.log(reason=self.error)

    async def _once(self) -> None:
        if self._missing_roles():
            self.took_s = None
            return
        started_at = self._clock.now_s()
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
        crosses = self._live_roles() == {Role.PREFILL, Role.DECODE}
        ended: list[RequestEvent] = []
        await self._orchestrator.run(
            request, ended.append, forced_path=Path.PD if crosses else Path.LOCAL
        )
        last = ended[-1]
        error = last.error if isinstance(last, RequestEnded) else NoWorker("the canary did not end")
        self.took_s = None if error else self._clock.now_s() - started_at
        self._error = error.message if error else ""
        self.has_passed = self.has_passed or error is None
        self._has_crossed = self._has_crossed or (error is None and crosses)

    def _live_roles(self) -> set[Role]:
        return {c.descriptor.role for c in self._sessions.candidates()}

    def _missing_roles(self) -> list[str]:
        """List roles without which there is no readiness.

        All expected ones before the first canary has crossed, or always when it must cross; later
        any one worker is enough, since requests can run local.
        """
        live = self._live_roles()
        if self._must_cross or not self._has_crossed or not live:
            return sorted(self._expected_roles - live)
        return []

    @property
    def error(self) -> str:
        """Why the router is not ready; empty when it is."""
        missing = self._missing_roles()
        return f"no {' and no '.join(missing)} worker is live" if missing else self._error

    @property
    def is_good(self) -> bool:
        """True when the last canary got through and nobody it needs has gone since."""
        return self.took_s is not None and not self._missing_roles()
