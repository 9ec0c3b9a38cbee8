"""What a request would cost on each worker, as seconds to its first token.

Owns the prediction and the order of workers by it. Does not know paths, streams or time.

    queued + uncached tokens
    ──────────────────────── + exposed transfer + step time of what decodes there + exposed fetch
        prefill tokens/s

A prefix that a worker holds saves the tokens of it and nothing else: where many wait, computing it
anew on an idle worker is cheaper. On real traces every prompt shares its first block; the longest
prefix alone would send them all to one worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp

from core.config import PlacementConfig
from core.ids import WorkerId
from router.candidate import RECENT_S, Candidate
from router.prefix_sources import Fetch, PrefixSources

DEFAULT_RULES = PlacementConfig()
WORK_WEIGHT = 1.5
"""A token computed here delays this request once, and those behind it by half as much again."""
OCCUPANCY_WEIGHT = 0.02
"""A token computed of late holds room in the cache that a newcomer would take."""
NOISE_SHARE = 0.25
"""Speeds that differ by less are equal."""
NOISE_S = 0.005
"""Routes that are later than the best by less are equal: it is the step in which KV arrives."""
FETCH_WEIGHT = 0.25
"""A fetched token takes room here that it has elsewhere already: while its holder waits for no more
than that, it stays where it is."""
MIN_FETCH_WAIT_S = 0.1
MAX_FETCH_WAIT_S = 2.0
"""Between these, a fetch may take as long as what it saves."""
PREFERENCE = 0.5
"""A worker that a request's key used before may take that share of the prompt longer than another:
a key stands for what the view does not know, and where everybody holds nothing it decides."""
MAX_PREFERENCE_TOKENS = 1_024
"""Beyond that a key excuses no queue, however long the prompt."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The prediction for one worker; `total_s` and what it is made of."""

    worker_id: WorkerId
    cached_tokens: int
    uncached_tokens: int
    queued_tokens: int
    prefill_s: float
    """Until the prompt is computed, those before it included."""
    transfer_s: float
    decode_s: float
    weighed_s: float
    """By which workers are ordered: what those who come after will pay is in it."""
    source: str = ""
    """From whom it would fetch; empty: from nobody."""
    fetched_tokens: int = 0
    """Neither cached nor uncached: they would come from there."""
    fetch_s: float = 0.0
    """By which the fetch would be late."""
    is_preferred: bool = False
    """The request's key used it before."""
    delay_s: float = 0.0
    """What the sequences that decode there lose together, if each waits for this prompt."""
    measured_tokens_per_s: float = 0.0
    """The worker's speed, if it was measured; 0: it was not."""

    @property
    def total_s(self) -> float:
        """Seconds to the first token."""
        return self.prefill_s + self.transfer_s + self.decode_s + self.fetch_s

    @property
    def price_s(self) -> float:
        """Seconds to the first token, and those that others lose by it."""
        return self.total_s + self.delay_s


class Prediction:
    """The costs of one request; every question is constant in the number of workers."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        num_tokens: int,
        num_choices: int,
        held_blocks: Mapping[WorkerId, int],
        now_s: float,
        rules: PlacementConfig = DEFAULT_RULES,
        preferred: frozenset[WorkerId] = frozenset(),
        sources: PrefixSources | None = None,
    ) -> None:
        """Take what all the questions have in common.

        A worker that was not measured yet counts like the others. So does one whose speed is near
        theirs: it is noise, and would send every prompt that comes to idle workers to the same one.

        Args:
            candidates: Whose speeds are compared.
            num_tokens: Of the prompt.
            num_choices: Of the request; each may need a block of its own.
            held_blocks: Leading blocks of the prompt that each worker holds, or soon will.
            now_s: On the clock of the candidates' instants.
            rules: What is assumed while nothing is measured, and what a sequence costs a prompt.
            preferred: Workers that the request's key used before.
            sources: From whom a worker may fetch what it lacks; None: from nobody.
        """
        self._num_tokens = num_tokens
        self._num_choices = num_choices
        self._sequence_tokens = rules.sequence_tokens
        self._held_blocks = held_blocks
        self.most_held_blocks = max(held_blocks.values(), default=0)
        self._now_s = now_s
        self._sources = sources
        # What nobody holds is fetched by nobody: nearly every worker is passed over by one compare.
        self._most_tokens = sources.most_tokens if sources is not None else 0
        self._preferred = preferred
        speeds = [c.prefill_tokens_per_s for c in candidates if c.prefill_tokens_per_s]
        usual = sum(speeds) / len(speeds) if speeds else rules.prefill_tokens_per_s
        self._usual_tokens_per_s = usual
        self._slow_tokens_per_s = usual * (1 - NOISE_SHARE)
        self._fast_tokens_per_s = usual * (1 + NOISE_SHARE)

    def cached_tokens(self, c: Candidate) -> int:
        """Tokens of the prompt that the worker need not compute: never the last one."""
        num_blocks = self._held_blocks.get(c.worker_id)
        if not num_blocks:
            return 0
        size = c.block_size_tokens
        most = (self._num_tokens - 1) // size
        return (num_blocks if num_blocks < most else most) * size

    def uncached_tokens(self, c: Candidate) -> int:
        """Tokens of the prompt that the worker must compute."""
        fetch = self.fetch(c)
        num_gained = fetch.num_gained if fetch is not None else 0
        return self._num_tokens - self.cached_tokens(c) - num_gained

    def fetch(self, c: Candidate) -> Fetch | None:
        """What the worker should fetch, if that is cheaper than computing it."""
        tokens_per_s = self.tokens_per_s(c)
        queued_s = self.queued_tokens(c, tokens_per_s) / tokens_per_s
        return self._fetch(c, self.cached_tokens(c), queued_s, tokens_per_s)

    def _fetch(
        self, c: Candidate, cached_tokens: int, queued_s: float, tokens_per_s: float
    ) -> Fetch | None:
        sources = self._sources
        if sources is None or self._most_tokens <= cached_tokens:
            return None
        found = sources.best_for(c.descriptor)
        if found is None:
            return None
        held_tokens, source = found
        size = c.block_size_tokens
        num_tokens = min(held_tokens, self._num_tokens - 1) // size * size
        num_gained = num_tokens - cached_tokens
        if num_gained <= 0:
            return None
        exposed_s = max(0.0, sources.seconds(source, c.descriptor, num_gained) - queued_s)
        saved_s = num_gained / tokens_per_s
        if exposed_s >= saved_s:
            return None
        wait_s = min(max(queued_s + saved_s, MIN_FETCH_WAIT_S), MAX_FETCH_WAIT_S)
        return Fetch(source, num_tokens, num_gained, exposed_s, wait_s)

    def tokens_per_s(self, c: Candidate) -> float:
        """How fast a worker computes prompts."""
        own = c.prefill_tokens_per_s
        is_usual = not own or self._slow_tokens_per_s <= own <= self._fast_tokens_per_s
        return self._usual_tokens_per_s if is_usual else own

    def queued_tokens(self, c: Candidate, tokens_per_s: float) -> float:
        """Tokens to compute before this prompt, less what must be done of the first by now."""
        if not c.head_tokens:
            return c.queued_tokens
        done = (self._now_s - c.head_started_s) * tokens_per_s
        if done <= 0:
            return c.queued_tokens
        most = c.head_tokens - 1
        return c.queued_tokens - (done if done < most else most)

    def cost(self, c: Candidate, receiver: WorkerId | None = None) -> Cost:
        """Predict for one worker; its KV goes to `receiver`, or stays there if that is None."""
        tokens_per_s = self.tokens_per_s(c)
        cached_tokens = self.cached_tokens(c)
        fetch = self.fetch(c)
        num_gained = fetch.num_gained if fetch is not None else 0
        uncached_tokens = self._num_tokens - cached_tokens - num_gained
        queued_tokens = self.queued_tokens(c, tokens_per_s)
        late_s = 0.0
        num_running = c.num_running
        num_delayed = c.num_decoding
        if receiver is not None:
            late_s = c.exposed_by_receiver.get(receiver, c.exposed_transfer_s)
            num_running = num_delayed = 0
        return Cost(
            worker_id=c.worker_id,
            cached_tokens=cached_tokens,
            uncached_tokens=uncached_tokens,
            queued_tokens=round(queued_tokens),
            prefill_s=(queued_tokens + uncached_tokens) / tokens_per_s,
            transfer_s=late_s,
            decode_s=num_running * self._sequence_tokens / tokens_per_s,
            weighed_s=self._weights((c,), has_transfer=receiver is not None)[0],
            source=fetch.source.worker_id if fetch is not None else "",
            fetched_tokens=num_gained,
            fetch_s=fetch.exposed_s if fetch is not None else 0.0,
            is_preferred=c.worker_id in self._preferred,
            delay_s=num_delayed * uncached_tokens / tokens_per_s,
            measured_tokens_per_s=c.prefill_tokens_per_s,
        )

    def _weights(self, pool: Sequence[Candidate], *, has_transfer: bool) -> list[float]:
        """Weigh workers: the prediction, and what those who come after lose by it.

        Without the share of recent work, prompts that come to idle workers would all go to the one
        that first held a block which every prompt begins with.
        """
        # A router does this for every worker and request: one flat loop, without calls.
        num_tokens = self._num_tokens
        num_held = self._held_blocks.get
        usual = self._usual_tokens_per_s
        slow = self._slow_tokens_per_s
        fast = self._fast_tokens_per_s
        most_tokens = self._most_tokens
        sequence_tokens = 0 if has_transfer else self._sequence_tokens
        now_s = self._now_s
        decayed = now_s / RECENT_S  # what `recent_work` has lost of its logarithm by now
        weights = []
        for c in pool:
            own = c.prefill_tokens_per_s
            tokens_per_s = usual if not own or slow <= own <= fast else own
            queued: float = c.queued_tokens
            if c.head_tokens:
                done = (now_s - c.head_started_s) * tokens_per_s
                if done > 0:
                    most_done = c.head_tokens - 1
                    queued -= done if done < most_done else most_done
            cached = 0
            num_blocks = num_held(c.worker_id)
            if num_blocks:
                size = c.block_size_tokens
                most_blocks = (num_tokens - 1) // size
                cached = (num_blocks if num_blocks < most_blocks else most_blocks) * size
            uncached = num_tokens - cached
            late_s = c.exposed_transfer_s if has_transfer else 0.0
            doubled = 0.0
            if most_tokens > cached:
                fetch = self._fetch(c, cached, queued / tokens_per_s, tokens_per_s)
                if fetch is not None:
                    uncached -= fetch.num_gained
                    late_s += fetch.exposed_s
                    doubled = FETCH_WEIGHT * fetch.num_gained
            occupied = OCCUPANCY_WEIGHT * exp(c.recent_work - decayed)
            tokens = queued + WORK_WEIGHT * uncached + occupied + c.num_running * sequence_tokens
            weights.append((tokens + doubled) / tokens_per_s + late_s)
        if self._preferred:
            for index, c in enumerate(pool):
                if c.worker_id in self._preferred:
                    tokens = min(PREFERENCE * self.uncached_tokens(c), MAX_PREFERENCE_TOKENS)
                    weights[index] -= tokens / self.tokens_per_s(c)
        return weights

    def senders(self, pool: Sequence[Candidate], number: int) -> list[Candidate]:
        """Return the prefill workers that weigh least; of equals those with fewer requests."""
        weights = self._weights(pool, has_transfer=True)
        return _least(pool, weights, [c.pending_requests for c in pool], number)

    def computing_less(self, pool: Sequence[Candidate], num_tokens: int) -> Sequence[Candidate]:
        """Find the workers that would have to compute fewer tokens than so many."""
        num_held = self._held_blocks.get
        most_cached = self._num_tokens - max(1, num_tokens)
        if most_cached < 0:
            return pool
        return [c for c in pool if num_held(c.worker_id, 0) * c.block_size_tokens > most_cached]

    def local(self, pool: Sequence[Candidate], number: int) -> list[Candidate]:
        """Return the best workers for both phases: by room, by weight, by blocks in use.

        A worker with few sequences may have no blocks left. Where nobody holds any of the prompt,
        all would compute as much of it, and few sequences decide.
        """
        found: list[Candidate] = []
        for some in self._by_room(pool):
            if len(found) < number:
                weights = (
                    self._weights(some, has_transfer=False)
                    if self._held_blocks
                    else self._num_sequences(some)
                )
                found += _least(some, weights, self._num_blocks(some), number - len(found))
        return found

    def receiver(self, sender: Candidate, pool: Sequence[Candidate]) -> Candidate:
        """Choose who decodes: by room, by sequences and late transfers, by blocks in use."""
        pool = self.with_room(pool)
        weights: Sequence[float] = self._num_sequences(pool)
        known = sender.exposed_by_receiver
        if known:
            usual_s = sender.exposed_transfer_s
            late_s = [known.get(c.worker_id, usual_s) for c in pool]
            least_s = min(late_s) + NOISE_S
            # As many sequences as would take that long from a step.
            per_s = self._usual_tokens_per_s / self._sequence_tokens
            weights = [
                running + max(0.0, late - least_s) * per_s
                for running, late in zip(weights, late_s, strict=True)
            ]
        return _least(pool, weights, self._num_blocks(pool), 1)[0]

    def _num_sequences(self, pool: Sequence[Candidate]) -> list[int]:
        """Count what runs at each worker, one less at that of the request's key."""
        if not self._preferred:
            return [c.num_running for c in pool]
        return [c.num_running - (c.worker_id in self._preferred) for c in pool]

    def _num_blocks(self, pool: Sequence[Candidate]) -> list[int]:
        """Count the blocks in use at each worker, less those that it holds of the prompt.

        What a receiver holds is not sent again, and its next turn may need no transfer at all.
        """
        if not self._held_blocks:
            return [c.used_blocks for c in pool]
        num_held = self._held_blocks.get
        return [c.used_blocks - num_held(c.worker_id, 0) for c in pool]

    def with_room(self, pool: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the workers that could hold the prompt now; all, if none could."""
        roomy, full = self._by_room(pool)
        return roomy or full

    def _by_room(self, pool: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
        """Split workers into those that could hold the prompt now, and the others."""
        num_tokens = self._num_tokens
        num_choices = self._num_choices
        roomy = [
            c
            for c in pool
            if -(-num_tokens // c.block_size_tokens) + num_choices <= c.num_available
        ]
        if len(roomy) == len(pool):
            return roomy, []
        ids = {id(c) for c in roomy}
        return roomy, [c for c in pool if id(c) not in ids]


def _least(
    pool: Sequence[Candidate], weights: Sequence[float], ties: Sequence[int], number: int
) -> list[Candidate]:
    """Return those that weigh least, in order; of equals those of lesser `ties`, then by name."""
    # Of many workers few can be among them, and only those are compared in full.
    limit = sorted(weights)[min(number, len(weights)) - 1] if weights else 0.0
    keys = sorted(
        (weight, ties[index], pool[index].worker_id, index)
        for index, weight in enumerate(weights)
        if weight <= limit
    )
    return [pool[key[-1]] for key in keys[:number]]
