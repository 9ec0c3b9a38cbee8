"""The attempts that listen to one worker, and the delivery of its frames to them.

Owns who listens, and what of a frame is stale. Does not know streams. An exception in one attempt
ends that attempt; the others get what is theirs all the same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Protocol

from core.containment import contained
from core.errors import ServingError, WorkerLost
from core.ids import Epoch, RunId, WorkerId
from core.ports import Clock
from core.session import AttemptEnded, StepFrame, TokenDelta, Wanted
from router.workers.load import WorkerLoad


class Subscriber(Protocol):
    """An attempt that listens to a worker."""

    @property
    def epoch(self) -> Epoch:
        """The attempt's number; what comes for another one is stale."""
        ...

    def wanted(self) -> Wanted:
        """What is still missing, for a reconnect."""
        ...

    def on_delta(self, worker_id: WorkerId, delta: TokenDelta) -> None:
        """New tokens arrived."""
        ...

    def on_ended(self, worker_id: WorkerId, ended: AttemptEnded) -> None:
        """The worker has done its task, or failed at it."""
        ...

    def on_lost(self, worker_id: WorkerId, error: WorkerLost) -> None:
        """The worker is gone."""
        ...

    def fail(self, error: ServingError) -> None:
        """One of these callbacks raised: end the attempt, once."""
        ...


class Subscriptions:
    """Who listens to one worker, by run."""

    def __init__(self, worker_id: WorkerId, load: WorkerLoad, clock: Clock) -> None:
        """Start empty; runs that are added here count in `load`."""
        self.num_stale = 0
        """Deltas and ends that nobody wanted any more."""
        self._worker_id = worker_id
        self._load = load
        self._clock = clock
        self._subscribers: dict[RunId, Subscriber] = {}

    def __len__(self) -> int:
        return len(self._subscribers)

    def add(self, run_id: RunId, subscriber: Subscriber, num_tokens: int) -> None:
        """Deliver what comes for a run; `num_tokens` are load until the worker first answers."""
        self._subscribers[run_id] = subscriber
        self._load.add(run_id, num_tokens, self._clock.now_s())

    def remove(self, run_id: RunId) -> bool:
        """Deliver nothing more for a run; False if nobody listened."""
        if self._subscribers.pop(run_id, None) is None:
            return False
        self._load.remove(run_id, self._clock.now_s())
        return True

    def wanted(self, queued: Collection[RunId]) -> tuple[Wanted, ...]:
        """What every attempt still misses; the Submit of a `queued` run follows, perhaps again."""
        wanted: list[Wanted] = []
        # A failing attempt may unsubscribe while this loop runs: hence the copy.
        for run_id, subscriber in list(self._subscribers.items()):
            with contained("what a request still wants", subscriber.fail):
                wanted.append(replace(subscriber.wanted(), is_coming=run_id in queued))
        return tuple(wanted)

    def deliver(self, frame: StepFrame) -> None:
        """Pass every item of a frame to its attempt."""
        for delta in frame.deltas:
            subscriber = self._subscriber_of(delta)
            if subscriber is not None:
                with contained("the delivery of tokens", subscriber.fail):
                    subscriber.on_delta(self._worker_id, delta)
        # After the tokens: an end closes the attempt, and what came behind it would be dropped.
        for ended in frame.ended:
            subscriber = self._subscriber_of(ended)
            if subscriber is not None:
                with contained("the delivery of an attempt's end", subscriber.fail):
                    subscriber.on_ended(self._worker_id, ended)

    def _subscriber_of(self, item: TokenDelta | AttemptEnded) -> Subscriber | None:
        subscriber = self._subscribers.get(item.run_id)
        if subscriber is None or subscriber.epoch != item.epoch:
            self.num_stale += 1
            return None
        self._load.answered(item.run_id, self._clock.now_s())
        return subscriber

    def lose(self, error: WorkerLost) -> None:
        """End every attempt that listens: the worker is gone."""
        # Emptied first: `on_lost` may unsubscribe.
        subscribers = self._subscribers
        self._subscribers = {}
        self._load.clear()
        for subscriber in subscribers.values():
            with contained("telling a request that its worker is gone", subscriber.fail):
                subscriber.on_lost(self._worker_id, error)
