"""A stub worker: the worker's end of a session, and no engine behind it.

Owns the attempts of one router and the instants at which their tokens are due: the first
`first_token_s` after the Submit, those of a decode step together, `token_s` apart. Does not know
models, KV or how a router places requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import assert_never

from bench.router.stub_blocks import StubBlocks
from core.errors import WorkerLost
from core.ids import Epoch, RunId
from core.ports import Clock, MessageStream, Network, StreamClosed
from core.session import (
    AttemptEnded,
    Cancel,
    ConnectPeers,
    Credit,
    Hello,
    Load,
    OfferPrefix,
    PeerReport,
    Progress,
    RouteReport,
    RouterHeartbeat,
    StepFrame,
    Submit,
    Task,
    TokenDelta,
    ToWorker,
    Welcome,
    WorkerDescriptor,
    WorkerTiming,
)
from core.types import FinishReason
from transport.sequenced import NumberedStream

HEARTBEAT_S = 0.5
FIRST_LETTER = ord("a")
NUM_LETTERS = 26


@dataclass(frozen=True, slots=True)
class StubPace:
    """How fast stub workers answer."""

    first_token_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class StubFirstToken:
    """When a stub had a request, and when it sent the first token (monotonic seconds)."""

    received_at: float
    sent_at: float


@dataclass(slots=True, eq=False)
class _StubAttempt:
    submit: Submit
    received_at: float
    position: int
    """Of the next token."""
    limit: int
    """Of the router's credit."""
    timings: WorkerTiming
    has_spoken: bool = False
    is_parked: bool = False
    """It waits for credit."""


class StubWorker:
    """Answers one router; a newer stream takes the place of an older one."""

    def __init__(
        self,
        descriptor: WorkerDescriptor,
        network: Network,
        pace: StubPace,
        blocks: StubBlocks,
        clock: Clock,
        on_first_token: Callable[[int, StubFirstToken], object],
    ) -> None:
        """Prepare; `listen` begins to serve.

        Args:
            descriptor: Who it is; its address comes with `listen`.
            network: Where it listens.
            pace: How fast it answers.
            blocks: What it would have cached.
            clock: Of this process.
            on_first_token: Called with a request's seed when this worker sends its first token.
        """
        self.descriptor = descriptor
        self._network = network
        self._pace = pace
        self._blocks = blocks
        self._clock = clock
        self._on_first_token = on_first_token
        self._attempts: dict[RunId, _StubAttempt] = {}
        self._due: list[tuple[float, int, _StubAttempt]] = []
        self._order = itertools.count()
        self._wake = asyncio.Event()
        self._steps = 0
        self._stream: MessageStream | None = None

    async def listen(self) -> None:
        """Serve sessions at the address that the descriptor has from now on."""
        address = await self._network.listen(self._serve)
        self.descriptor = replace(self.descriptor, session_address=address)

    async def close(self) -> None:
        """End every stream."""
        await self._network.close()

    # --- the session ------------------------------------------------------------------------------

    async def _serve(self, inner: MessageStream) -> None:
        stream = NumberedStream(inner)
        with contextlib.suppress(StreamClosed):
            hello = await stream.recv()
            if not isinstance(hello, Hello):
                stream.reset()
                return
            forgotten = self._begin_session(stream, hello)
        try:
            await stream.send(Welcome(self.descriptor))
            if forgotten:
                await stream.send(StepFrame(self._steps, (), forgotten))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(stream))
                tasks.create_task(self._write(stream))
                tasks.create_task(self._heartbeat(stream))
        except* StreamClosed:
            pass  # the router dials again

    def _begin_session(self, stream: MessageStream, hello: Hello) -> tuple[AttemptEnded, ...]:
        """Take the place of an older stream; returns the ends of what its router still wants."""
        if self._stream is not None:
            self._stream.reset()
        self._stream = stream
        # Nothing is sent twice here: what a router still wants after a reconnect has failed.
        self._attempts.clear()
        self._due.clear()
        error = WorkerLost("the stub worker forgets its attempts with their session")
        return tuple(
            AttemptEnded(want.run_id, want.epoch, Task.LOCAL, WorkerTiming(), error)
            for want in hello.wanted
            if not want.is_coming
        )

    async def _read(self, stream: MessageStream) -> None:
        while True:
            await self._take(await stream.recv(), stream)

    async def _take(self, message: ToWorker, stream: MessageStream) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Cancel(run_id, epoch):
                self._cancel(run_id, epoch)
            case Credit():
                self._credit(message)
            case ConnectPeers(addresses):
                # A route like any other: it only must be there.
                routes = tuple(RouteReport(address, "shm") for address in addresses)
                await stream.send(PeerReport(routes))
            case OfferPrefix() | RouterHeartbeat() | Hello():
                pass  # there is no KV to offer
            case _:
                assert_never(message)

    async def _heartbeat(self, stream: MessageStream) -> None:
        while True:
            load = Load(
                num_running=len(self._attempts),
                free_blocks=self._blocks.num_blocks - len(self._blocks),
                cached_blocks=len(self._blocks),
            )
            # It waits and computes nothing: whoever takes long over a token is not stuck.
            await stream.send(Progress(self._steps, self._steps, work_in_hand=False, load=load))
            await asyncio.sleep(HEARTBEAT_S)

    # --- attempts ---------------------------------------------------------------------------------

    def _submit(self, submit: Submit) -> None:
        request = submit.request
        now_s = self._clock.now_s()
        num_cached = self._blocks.take(request.scope, request.token_ids)
        attempt = _StubAttempt(
            submit,
            received_at=now_s,
            position=len(submit.emitted[0]),
            limit=submit.credit,
            timings=WorkerTiming(prefill_s=self._pace.first_token_s, cached_tokens=num_cached),
        )
        self._attempts[submit.run_id] = attempt
        due_at = now_s + self._pace.first_token_s
        if submit.task is Task.DECODE:
            # The KV comes behind the first token, in time for a later step.
            due_at = self._next_step(due_at + self._pace.token_s)
            attempt.timings = WorkerTiming()
        self._schedule(attempt, due_at)

    def _next_step(self, at: float) -> float:
        """Return the first instant from `at` on at which all sequences take a step."""
        return math.ceil(at / self._pace.token_s) * self._pace.token_s

    def _schedule(self, attempt: _StubAttempt, due_at: float) -> None:
        if attempt.position >= attempt.limit:
            attempt.is_parked = True
            return
        heapq.heappush(self._due, (due_at, next(self._order), attempt))
        self._wake.set()

    def _cancel(self, run_id: RunId, epoch: Epoch) -> None:
        attempt = self._attempts.get(run_id)
        if attempt is not None and attempt.submit.epoch <= epoch:
            del self._attempts[run_id]

    def _credit(self, credit: Credit) -> None:
        attempt = self._attempts.get(credit.run_id)
        if attempt is None or attempt.submit.epoch != credit.epoch:
            return
        attempt.limit = credit.limit
        if attempt.is_parked and attempt.position < attempt.limit:
            attempt.is_parked = False
            self._schedule(attempt, self._next_step(self._clock.now_s()))

    # --- frames -----------------------------------------------------------------------------------

    async def _write(self, stream: MessageStream) -> None:
        while True:
            # Cleared before the look: what comes after it wakes this task again.
            self._wake.clear()
            frame = self._build_frame()
            if frame is not None:
                await stream.send(frame)
            else:
                await self._wait()

    async def _wait(self) -> None:
        """Wait for a message, or until the next token is due."""
        wait_s = self._due[0][0] - self._clock.now_s() if self._due else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._wake.wait()

    def _build_frame(self) -> StepFrame | None:
        """Take one token of every attempt that is due; None if none is."""
        now_s = self._clock.now_s()
        deltas: list[TokenDelta] = []
        ended: list[AttemptEnded] = []
        due: list[_StubAttempt] = []
        while self._due and self._due[0][0] <= now_s:
            due.append(heapq.heappop(self._due)[2])
        for attempt in due:
            # It may have been cancelled, or submitted again.
            if self._attempts.get(attempt.submit.run_id) is attempt:
                self._advance(attempt, now_s, deltas, ended)
        if not deltas:
            return None
        self._steps += 1
        return StepFrame(self._steps, tuple(deltas), tuple(ended))

    def _advance(
        self,
        attempt: _StubAttempt,
        now_s: float,
        deltas: list[TokenDelta],
        ended: list[AttemptEnded],
    ) -> None:
        """Produce an attempt's next token, and its end if that was the last one."""
        submit = attempt.submit
        request = submit.request
        position = attempt.position
        attempt.position += 1
        is_whole = attempt.position >= request.sampling.max_tokens
        deltas.append(
            TokenDelta(
                submit.run_id,
                submit.epoch,
                choice=0,
                position=position,
                token_ids=(FIRST_LETTER + position % NUM_LETTERS,),
                finish=FinishReason.LENGTH if is_whole else None,
                timings=None if attempt.has_spoken else attempt.timings,
            )
        )
        if position == 0:
            self._on_first_token(request.seed, StubFirstToken(attempt.received_at, now_s))
        attempt.has_spoken = True
        # A prefill worker's task is the first token; the rest is decode's.
        if is_whole or submit.task is Task.PREFILL:
            end = AttemptEnded(submit.run_id, submit.epoch, submit.task, attempt.timings)
            ended.append(end)
            del self._attempts[submit.run_id]
        else:
            # Half a step on: this one comes a little late, and the next must not be the same.
            self._schedule(attempt, self._next_step(now_s + self._pace.token_s / 2))
