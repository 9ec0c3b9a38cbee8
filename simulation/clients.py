"""A client of a trial: reads, stalls, leaves, comes back when its router is gone, checks it all.

Owns the promises that are made to one request: I1 and I2 as its stream shows them, I7 and L1 at its
end. Does not know faults or workers.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

from core.errors import (
    DeadlineExceeded,
    InternalError,
    NoWorker,
    Overloaded,
    Quarantined,
    RateLimited,
    ServingError,
    TooLate,
)
from core.types import (
    ChoiceFinished,
    GenerateRequest,
    Logprob,
    PromptScored,
    RequestEnded,
    RequestEvent,
    TextDelta,
)
from router.request_stream import RequestStream
from simulation.cluster import SimCluster
from simulation.faults.kinds import Kind
from simulation.metering import MeteredCall, read_to_its_end
from simulation.oracle import Expected, Oracle
from simulation.plan import TIMEOUT_S, PlannedRequest, TrialPlan
from simulation.report import Report
from simulation.router_node import SimRouter
from simulation.traps import Place

UNANSWERED_PING_S = 3.0
MAX_RECONNECTS = 8
MAX_REFUSALS = 1
"""For its key's quota: with the next one a client gives up."""
TOKENS_BEFORE_RAISING = 2
PLACES = {Kind.DECODER_RAISES: Place.DECODER, Kind.EMIT_RAISES: Place.EMIT}


class SimClient:
    """One client and what it received."""

    def __init__(
        self,
        cluster: SimCluster,
        plan: TrialPlan,
        planned: PlannedRequest,
        index: int,
        report: Report,
    ) -> None:
        """Nothing is asked yet; `run` does."""
        self._cluster = cluster
        self._plan = plan
        self._planned = planned
        self._index = index
        self._report = report
        self.request = cluster.request(
            planned.name,
            planned.prompt,
            planned.sampling,
            planned.timeout_s,
            planned.scope,
            planned.tier,
        )
        self._tokens: list[list[int]] = [[] for _ in range(planned.sampling.n)]
        self._texts = [""] * planned.sampling.n
        self._has_tail = [False] * planned.sampling.n
        self._finish: dict[int, str] = {}
        self._torn: set[int] = set()
        self._scores: tuple[Logprob, ...] | None = None
        self._has_scores_of_stream = False
        self.ended: RequestEnded | None = None
        self._is_cancelled = False
        self._was_starting = False
        self._num_refusals = 0
        self._is_refused = False
        if planned.raises is not None:
            cluster.traps.arm(PLACES[planned.raises], planned.name, TOKENS_BEFORE_RAISING)

    async def run(self) -> None:
        """Ask, and ask again elsewhere, until there is an end."""
        num_streams = 0
        while num_streams < MAX_RECONNECTS:
            router = await self._alive_router(num_streams)
            wake = asyncio.Event()
            # After its router's death it asks for the rest, and names the positions it has.
            request = self._resuming() if num_streams else self.request
            self._has_scores_of_stream = False
            try:
                stream = await self._open(router, request, wake)
            except RateLimited as error:
                router.closed(wake)
                if await self._asks_again(error):
                    continue
                return
            if stream is None:
                router.closed(wake)
                if self._is_cancelled:
                    return
                continue
            self._report.reconnects += num_streams > 0
            num_streams += 1
            is_over = await self._read(router, stream, wake)
            router.closed(wake)
            # A live router sees the connection close; a paused one when it runs again.
            if router.is_alive:
                asyncio.get_running_loop().create_task(
                    stream.close(), context=router.context.copy()
                )
            if is_over:
                break
        if self._planned.is_repeated and self.ended is not None:
            await self._repeat()

    def _resuming(self) -> GenerateRequest:
        have = tuple(
            # The text that a decoder held back at the end is a position, and so is the finish.
            len(tokens) + (2 if choice in self._finish else self._has_tail[choice])
            for choice, tokens in enumerate(self._tokens)
        )
        # Every other client sends its tokens along, as ours does; one that reads server-sent events
        # cannot.
        received = tuple(tuple(t) for t in self._tokens) if self._index % 2 else ()
        return replace(self.request, resume_from=have, resume_tokens=received)

    async def _alive_router(self, attempt: int) -> SimRouter:
        while True:
            routers = self._cluster.routers
            for step in range(len(routers)):
                router = routers[(self._index + attempt + step) % len(routers)]
                if router.is_alive and router.name not in self._cluster.paused:
                    return router
            await asyncio.sleep(0.05)

    async def _read(self, router: SimRouter, stream: RequestStream, wake: asyncio.Event) -> bool:
        """Read one stream; False: it broke, come back elsewhere."""
        loop = asyncio.get_running_loop()
        planned = self._planned
        stall_s = planned.stall_s
        leaves_at = None if planned.cancel_after_s is None else loop.time() + planned.cancel_after_s
        while True:
            wake.clear()
            if not router.is_alive:
                return False
            for event in stream.take() if router.name not in self._cluster.paused else []:
                self._check(event, router)
            if self.ended is not None:
                return True
            if leaves_at is not None and loop.time() >= leaves_at:
                self._is_cancelled = True
                self._report.bitten[Kind.CANCEL] += 1
                return True
            # Once, after the first tokens: credit must run out in mid-answer.
            if stall_s and any(self._tokens):
                self._report.bitten[Kind.SLOW_READER] += 1
                await asyncio.sleep(stall_s)
                stall_s = 0.0
            wait_s = UNANSWERED_PING_S if leaves_at is None else max(0.0, leaves_at - loop.time())
            try:
                async with asyncio.timeout(wait_s):
                    await wake.wait()
            except TimeoutError:
                # Its pings go unanswered: a client cannot know pause from death.
                if router.name in self._cluster.paused:
                    return False

    # --- keys with limits -------------------------------------------------------------------------

    async def _open(
        self, router: SimRouter, request: GenerateRequest, wake: asyncio.Event
    ) -> RequestStream | None:
        """Start a request, charged before that if its key has limits.

        Returns:
            None if there was no answer, or the client has left.

        Raises:
            RateLimited: It is over its quota.
        """
        planned = self._planned
        if not planned.key:
            return router.open(request, wake)
        call = MeteredCall(self._cluster, router, planned, request, wake)
        wait_s = UNANSWERED_PING_S if planned.cancel_after_s is None else planned.cancel_after_s
        while router.is_alive and not call.is_answered:
            wake.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await wake.wait()
            except TimeoutError:
                if planned.cancel_after_s is not None:
                    self._is_cancelled = True
                    self._report.bitten[Kind.CANCEL] += 1
                    break
                if router.name in self._cluster.paused:
                    break
        if call.is_answered:
            return call.stream
        call.leave()
        return None

    async def _asks_again(self, error: RateLimited) -> bool:
        """Wait as long as a refusal says; False: it was told so too often."""
        self._num_refusals += 1
        self._is_refused = self._num_refusals > MAX_REFUSALS
        if self._is_refused:
            return False
        await asyncio.sleep(max(1, math.ceil(error.retry_after_s)))
        self._renew_deadline()
        return True

    async def _repeat(self) -> None:
        """Send the request once more, for the same charge; what comes was checked already."""
        self._renew_deadline()
        router = await self._alive_router(1)
        wake = asyncio.Event()
        try:
            stream = await self._open(router, self.request, wake)
        except RateLimited:
            stream = None
        if stream is not None:
            await read_to_its_end(stream, wake, router)
        if stream is not None and router.is_alive:
            asyncio.get_running_loop().create_task(stream.close(), context=router.context.copy())
        router.closed(wake)

    def _renew_deadline(self) -> None:
        deadline_at = self._cluster.clock.now_s() + self._planned.timeout_s
        self.request = replace(self.request, deadline_at=deadline_at)

    # --- what comes -------------------------------------------------------------------------------

    def _check(self, event: RequestEvent, router: SimRouter) -> None:
        name = self._planned.name
        report = self._report
        if self.ended is not None:
            report.violated(f"I2 {name}: {type(event).__name__} after its end")
        match event:
            case PromptScored(logprobs):
                self._check_scores(logprobs)
            case TextDelta():
                self._check_delta(event)
            case ChoiceFinished(choice, reason):
                if choice in self._finish:
                    report.violated(f"I2 {name}: choice {choice} finished twice")
                self._finish[choice] = reason.value
            case RequestEnded():
                self.ended = event
                self._was_starting = router.sessions.is_starting()
                self._check_end(event)

    def _check_scores(self, logprobs: tuple[Logprob, ...]) -> None:
        name = self._planned.name
        if self._has_scores_of_stream:
            self._report.violated(f"I2 {name}: the prompt was scored twice")
        if any(self._tokens):
            self._report.violated(f"I2 {name}: scores of the prompt came after tokens")
        self._has_scores_of_stream = True
        self._scores = logprobs

    def _check_delta(self, delta: TextDelta) -> None:
        choice = delta.choice
        tokens = self._tokens[choice]
        is_next = delta.position == len(tokens)
        is_after_end = choice in self._finish or self._has_tail[choice]
        if (not is_next or is_after_end) and choice not in self._torn:
            self._torn.add(choice)
            self._report.violated(
                f"I2 {self._planned.name}: position {delta.position} of choice {choice} after "
                f"{len(tokens)}"
            )
        is_scored = (
            self._planned.sampling.prompt_logprobs is not None and len(self._planned.prompt) > 1
        )
        if is_scored and self._scores is None:
            self._report.violated(f"I2 {self._planned.name}: tokens before the prompt's scores")
        # Kept although it was torn: the comparison at the end shows what came.
        tokens += delta.token_ids
        self._texts[choice] += delta.text
        self._has_tail[choice] = not delta.token_ids

    def _check_end(self, ended: RequestEnded) -> None:
        name = self._planned.name
        report = self._report
        late_s = self._cluster.clock.now_s() - self.request.deadline_at - self._planned.stall_s
        phases = ended.timing.phases()
        # A client in a hurry may find its router paused at its deadline, for up to 6 s.
        if late_s > (1 if self._planned.timeout_s == TIMEOUT_S else 10):
            report.violated(f"L1 {name}: ended {late_s:.1f} s after its deadline")
        if min(phases.values()) < -1e-9 or abs(sum(phases.values()) - ended.timing.e2e_s) > 1e-6:
            report.violated(f"I7 {name}: phases {phases} do not add up to {ended.timing.e2e_s}")
        report.retries += sum(not a.endswith((":ok", ":draining")) for a in ended.timing.attempts)
        report.moves += sum(a.endswith(":draining") for a in ended.timing.attempts)
        report.decisions.append(f"{name} {' '.join(ended.timing.attempts)}")

    # --- afterwards -------------------------------------------------------------------------------

    def compare(self, oracle: Oracle) -> None:
        """Check the whole stream against the reference (I1), and its ending (I7)."""
        name = self._planned.name
        report = self._report
        expected = oracle.expected(self.request)
        if self._is_cancelled:
            report.endings["cancelled"] += 1
        elif self._is_refused:
            report.endings["over_quota"] += 1
        elif self.ended is None:
            report.violated(f"I2 {name}: no terminal event")
        else:
            self._compare_end(self.ended, len(expected))
        if self._scores is not None:
            report.scored += 1
            if self._scores != oracle.scores(self.request):
                report.violated(f"I1 {name}: {len(self._scores)} scores of the prompt are wrong")
        for choice, want in enumerate(expected):
            report.tokens += len(self._tokens[choice])
            if not self._is_exact(choice, want):
                tokens = tuple(self._tokens[choice])
                text = self._texts[choice]
                report.violated(f"I1 {name} choice {choice}: {tokens} {text!r} is not {want}")

    def _is_exact(self, choice: int, want: Expected) -> bool:
        tokens = tuple(self._tokens[choice])
        text = self._texts[choice]
        if choice in self._finish:
            return (tokens, text, self._finish[choice]) == (want.token_ids, want.text, want.finish)
        return tokens == want.token_ids[: len(tokens)] and want.text.startswith(text)

    def _compare_end(self, ended: RequestEnded, num_choices: int) -> None:
        name = self._planned.name
        report = self._report
        error = ended.error
        is_victim = isinstance(error, InternalError) and name in self._cluster.traps.victims
        kind = type(error).__name__ if error else "finished"
        report.endings["injected" if is_victim else kind] += 1
        if error is None and len(self._finish) != num_choices:
            report.violated(f"I2 {name}: {len(self._finish)} of {num_choices} choices finished")
        if error is not None and not is_victim and not self._is_justified(error, ended):
            report.violated(f"I7 {name}: {error!r} after {ended.timing.attempts}")

    def _is_justified(self, error: ServingError, ended: RequestEnded) -> bool:
        """Return True if an error is honest.

        It is if the request met more faults than it has attempts for, if no worker was left and
        none was starting, if admission was overloaded, or if its client was in a hurry.
        """
        num_faults = sum(not a.endswith((":ok", ":draining")) for a in ended.timing.attempts)
        match error:
            case NoWorker():
                return num_faults > 0 and not self._was_starting
            case Quarantined():
                return num_faults > 2
            case DeadlineExceeded() | TooLate() if self._planned.timeout_s < TIMEOUT_S:
                return True
            case Overloaded():
                return self._plan.style.is_overload
            case _:
                return error.is_retryable and (
                    num_faults > self._plan.shape.router.max_fault_attempts
                )
