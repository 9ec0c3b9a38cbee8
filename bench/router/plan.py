"""What `baton bench router` offers, and at which pace its stub workers answer.

Owns the plan, the three loads that follow from it, and their prompts. Does not know processes, HTTP
or sessions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.load import Planned, Shape
from bench.load import plan as plan_requests

STREAM_PROMPT_TOKENS = 64
"""Short: the load of streams measures what output costs."""


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """What the user asked for."""

    rate: float = 200.0
    """Requests a second, Poisson, while the first token is measured."""
    prompt_tokens: int = 4096
    shared_tokens: int = 2048
    """Leading tokens that a prompt has in common with those of its group; no more than it has."""
    output_tokens: int = 16
    streams: int = 256
    overload: float = 10.0
    """Offered load over capacity, while refusals are measured."""
    max_concurrent: int = 32
    """Requests that the router admits at once meanwhile; none may queue."""
    seconds: float = 10.0
    """Of each load."""
    workers: int = 2
    """Stub workers of each pool."""
    clients: int = 1
    """Processes that send."""
    first_token_ms: float = 20.0
    token_ms: float = 20.0
    seed: int = 0

    @property
    def answer_s(self) -> float:
        """How long the stubs take over one answer."""
        return (self.first_token_ms + self.output_tokens * self.token_ms) / 1e3

    @property
    def capacity_per_s(self) -> float:
        """Answers a second of `max_concurrent` requests in flight."""
        return self.max_concurrent / self.answer_s

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return max(
            self.prompt_tokens + self.output_tokens, STREAM_PROMPT_TOKENS + self.stream_tokens
        )

    @property
    def stream_tokens(self) -> int:
        """Output of one long stream: as much as comes in the time of a load."""
        return max(2, round(self.seconds * 1e3 / self.token_ms))

    def first_token_load(self) -> RouterLoad:
        """Return the load under which the first token is measured."""
        return self._open_load(self.rate)

    def stream_load(self) -> RouterLoad:
        """Return as many long answers as there are streams, all asked for at once."""
        return RouterLoad(
            requests=self.streams,
            prompt_tokens=STREAM_PROMPT_TOKENS,
            output_tokens=self.stream_tokens,
            seed=self.seed,
        )

    def overload_load(self) -> RouterLoad:
        """Return the load most of which is refused."""
        return self._open_load(self.overload * self.capacity_per_s)

    def _open_load(self, rate: float) -> RouterLoad:
        return RouterLoad(
            requests=max(1, round(rate * self.seconds)),
            rate=rate,
            prompt_tokens=self.prompt_tokens,
            shared_tokens=self.shared_tokens,
            output_tokens=self.output_tokens,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """The requests of one process, numbered from `first_index`; rate 0: all at once."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    rate: float = 0.0
    shared_tokens: int = 0
    groups: int = 16
    """Prompts of one group begin alike."""
    seed: int = 0
    first_index: int = 0

    def split(self, num_clients: int) -> list[RouterLoad]:
        """Divide the load among processes; none of them sends what another one sends."""
        loads = []
        first = 0
        for client in range(num_clients):
            count = self.requests // num_clients + (client < self.requests % num_clients)
            share = self.rate * count / self.requests
            loads.append(replace(self, requests=count, rate=share, first_index=first))
            first += count
        return [load for load in loads if load.requests]

    def requests_due(self) -> list[Planned]:
        """Return when each request is due; its prompt is that of `prompts`."""
        seed = self.seed + self.first_index
        shape = Shape(self.requests, 1, self.output_tokens, self.rate, seed=seed)
        return [replace(p, index=p.index + self.first_index) for p in plan_requests(shape)]

    def prompts(self) -> Iterator[str]:
        """Yield texts of which every letter is one token of the tiny model, without an end."""
        beginnings = [
            _letters(random.Random(f"{self.seed}:{group}"), self.shared_tokens)  # noqa: S311
            for group in range(self.groups)
        ]
        rng = random.Random(f"{self.seed}:from {self.first_index}")  # noqa: S311 - a load
        while True:
            beginning = rng.choice(beginnings)
            yield beginning + _letters(rng, self.prompt_tokens - self.shared_tokens)


def _letters(rng: random.Random, count: int) -> str:
    return rng.randbytes(-(-count // 2)).hex()[:count]
