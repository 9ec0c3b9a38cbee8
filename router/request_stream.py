"""Events of running requests, for one consumer.

Owns the queue between the orchestrator and a server, the credit that follows what the consumer
took, and the grouping of several requests into one reply. Does not know HTTP or gRPC.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Protocol

from core.errors import ServingError, SlowReader
from core.types import (
    ChoiceFinished,
    GenerateRequest,
    Path,
    RequestEnded,
    RequestEvent,
    TextDelta,
)
from router.request_state import Emit, RunKey
from router.turns import Turns

OnEnded = Callable[[RequestEnded | None], None]
"""Gets a request's end; None if it never began to run."""


class RequestRunner(Protocol):
    """What runs requests (`router.orchestrator`)."""

    async def run(
        self, request: GenerateRequest, emit: Emit, forced_path: Path | None = None
    ) -> None:
        """Run one request; the last event that `emit` gets is its end."""
        ...

    def consumed(self, run_key: RunKey, num_positions: int) -> None:
        """Note that the client has taken `num_positions` of every choice."""
        ...

    def abort(self, run_key: RunKey, error: ServingError | None = None) -> bool:
        """End a request with an error; False if it is not running."""
        ...

    def is_admitted(self, run_key: RunKey) -> bool:
        """Return True while it runs with its permits; False while it waits for them."""
        ...

    async def drain(self, grace_s: float) -> None:
        """Let requests finish for `grace_s`, then end the rest."""
        ...


def slow_reader(limit_s: float) -> SlowReader:
    """Make the error of a request whose client has not read for `limit_s`."""
    return SlowReader(f"the client did not read for {limit_s:g} s")


class RequestStream:
    """Events of one running request.

    The queue needs no bound of its own: a worker computes at most `credit_positions` beyond what
    the consumer took.
    """

    def __init__(
        self,
        runner: RequestRunner,
        request: GenerateRequest,
        turns: Turns,
        has_events: asyncio.Event,
        on_ended: OnEnded = lambda _: None,
    ) -> None:
        """Start the request; `turns` sets `has_events`, and `on_ended` is called once."""
        self.request = request
        self.is_over = False
        self._runner = runner
        self._turns = turns
        self._has_events = has_events
        self._events: deque[RequestEvent] = deque()
        # A resuming client has these positions; without them its credit would begin at nothing.
        self._taken: dict[int, int] = dict(enumerate(request.resume_from))
        self._open_choices = set(range(request.sampling.n))
        self._ended: RequestEnded | None = None
        self._task = asyncio.get_running_loop().create_task(runner.run(request, self._emit))
        # Of the task: one that is cancelled before it runs emits no end.
        self._task.add_done_callback(lambda _: on_ended(self._ended))

    @property
    def is_admitted(self) -> bool:
        """False while the request may still be refused a permit."""
        return self.is_over or self._runner.is_admitted(self.request.run_key)

    def _emit(self, event: RequestEvent) -> None:
        if isinstance(event, RequestEnded):
            self._ended = event
        self._events.append(event)
        self._turns.wake(self._has_events)

    def take(self) -> list[RequestEvent]:
        """Return the events since the last call; `RequestEnded` is the last of all.

        While the router is behind, the tokens of a choice come as one event.
        """
        events = list(self._events)
        self._events.clear()
        for event in events:
            if isinstance(event, TextDelta):
                self._taken[event.choice] = event.position + len(event.token_ids)
            elif isinstance(event, ChoiceFinished):
                self._open_choices.discard(event.choice)
            elif isinstance(event, RequestEnded):
                self.is_over = True
        # The slowest choice counts: credit is one number for all choices of a request.
        if self._open_choices and self._open_choices <= self._taken.keys():
            # A finished choice needs no credit, and must not hold back the others.
            self._runner.consumed(
                self.request.run_key, min(self._taken[c] for c in self._open_choices)
            )
        shown = [e for e in events if not isinstance(e, ChoiceFinished) or e.is_new]
        return _joined(shown) if self._turns.is_behind else shown

    async def close(self, reason: ServingError | None = None) -> None:
        """End the request if it still runs, and wait until it is gone.

        Args:
            reason: Its error; by default the client has left.
        """
        if reason is not None and not self._task.done():
            self._runner.abort(self.request.run_key, reason)
        # One that waits to take over another's place is in no table yet: only its task can end it.
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def _joined(events: list[RequestEvent]) -> list[RequestEvent]:
    """Make one event of the tokens of a choice that follow one another."""
    joined: list[RequestEvent] = []
    for choice, some in groupby(events, _choice_of_tokens):
        if choice is None:
            joined += some
            continue
        deltas = [event for event in some if isinstance(event, TextDelta)]
        joined.append(
            TextDelta(
                choice,
                deltas[0].position,
                tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
                "".join([delta.text for delta in deltas]),
                tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
            )
        )
    return joined


def _choice_of_tokens(event: RequestEvent) -> int | None:
    """Return the choice of new tokens; a tail without tokens stays alone, with its position."""
    return event.choice if isinstance(event, TextDelta) and event.token_ids else None


class StreamGroup:
    """The requests behind one reply: one for each prompt."""

    def __init__(
        self,
        runner: RequestRunner,
        requests: Sequence[GenerateRequest],
        turns: Turns,
        on_ended: OnEnded = lambda _: None,
    ) -> None:
        """Start them all; `turns` wakes the consumer, `on_ended` is called once for each."""
        self._has_events = asyncio.Event()
        self._streams = [
            RequestStream(runner, request, turns, self._has_events, on_ended)
            for request in requests
        ]
        self._reminder: asyncio.TimerHandle | None = None

    @property
    def requests(self) -> list[GenerateRequest]:
        """The requests, in the order of the prompts."""
        return [stream.request for stream in self._streams]

    async def batch(self, timeout_s: float | None = None) -> list[tuple[int, RequestEvent]]:
        """Wait for events and return all there are, each with the index of its prompt.

        Returns:
            An empty list if none arrived within `timeout_s`.
        """
        loop = asyncio.get_running_loop()
        idle_at = None if timeout_s is None else loop.time() + timeout_s
        while True:
            # Cleared before looking, so that an event in between wakes the wait below.
            self._has_events.clear()
            events = [
                (index, event)
                for index, stream in enumerate(self._streams)
                for event in stream.take()
            ]
            if events or (idle_at is not None and loop.time() >= idle_at):
                return events
            # Most waits end long before: one timer serves them all, and is set again when it ends
            # before its wait does.
            if idle_at is not None and self._reminder is None:
                self._reminder = loop.call_at(idle_at, self._remind)
            await self._has_events.wait()

    def _remind(self) -> None:
        """Let the consumer look at the time."""
        self._reminder = None
        self._has_events.set()

    @property
    def is_admitted(self) -> bool:
        """True when no request can be refused a permit any more."""
        return all(stream.is_admitted for stream in self._streams)

    @property
    def is_over(self) -> bool:
        """True when every request has ended and its last event was taken."""
        return all(stream.is_over for stream in self._streams)

    async def close(self, reason: ServingError | None = None) -> None:
        """End what still runs; without a reason, because the client has left."""
        if self._reminder is not None:
            self._reminder.cancel()
            self._reminder = None
        await asyncio.gather(*(stream.close(reason) for stream in self._streams))
