"""Prompts that were sent and will be cached soon: what the view of the workers cannot know yet.

Owns the expected prefixes, bounded in number and in time. Does not know workers' state or streams.

Without them a burst of one new prefix scatters: nobody holds it until its first prompt is computed
and the view has it. Names are chained, so that a block that is expected implies all before
it, and only some blocks of a long prompt are kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from core.block_hash import BlockHash
from core.ids import RunId, WorkerId

KEPT_S = 1.0
"""How long after its answer a prompt is expected: by then its worker has published it."""
MAX_PROMPTS = 4_096


@dataclass(frozen=True, slots=True)
class _Expected:
    worker: WorkerId
    block_hashes: tuple[BlockHash, ...]


class ExpectedPrefixes:
    """Prefixes on their way, by worker."""

    def __init__(self) -> None:
        """Expect nothing."""
        self._prompts: OrderedDict[RunId, _Expected] = OrderedDict()
        self._counts: dict[BlockHash, dict[WorkerId, int]] = {}
        self._ends: deque[tuple[float, RunId, _Expected]] = deque()

    def __len__(self) -> int:
        """Prompts that are expected."""
        return len(self._prompts)

    def add(self, run_id: RunId, worker: WorkerId, block_hashes: Sequence[BlockHash]) -> None:
        """A prompt was sent to a worker; the oldest makes room if there are too many."""
        self.remove(run_id)
        kept = tuple(block_hashes[position - 1] for position in _positions(len(block_hashes)))
        if not kept:
            return
        self._prompts[run_id] = _Expected(worker, kept)
        for block_hash in kept:
            counts = self._counts.setdefault(block_hash, {})
            counts[worker] = counts.get(worker, 0) + 1
        if len(self._prompts) > MAX_PROMPTS:
            self.remove(next(iter(self._prompts)))

    def answered(self, run_id: RunId, now_s: float) -> None:
        """A prompt was computed: the view will know it soon."""
        expected = self._prompts.get(run_id)
        if expected is not None:
            self._ends.append((now_s + KEPT_S, run_id, expected))

    def remove(self, run_id: RunId) -> None:
        """A prompt will not be computed, or is known by other ways."""
        expected = self._prompts.pop(run_id, None)
        if expected is None:
            return
        for block_hash in expected.block_hashes:
            counts = self._counts[block_hash]
            counts[expected.worker] -= 1
            if not counts[expected.worker]:
                del counts[expected.worker]
                if not counts:
                    del self._counts[block_hash]

    def match(self, block_hashes: Sequence[BlockHash], now_s: float) -> dict[WorkerId, int]:
        """Count the leading blocks that each worker will hold, rounded down for long prompts."""
        while self._ends and self._ends[0][0] <= now_s:
            _, run_id, expected = self._ends.popleft()
            # Not of a later attempt of the same run, which may have gone to another worker.
            if self._prompts.get(run_id) is expected:
                self.remove(run_id)
        matched: dict[WorkerId, int] = {}
        for position in _positions(len(block_hashes)):
            counts = self._counts.get(block_hashes[position - 1])
            # Names are chained: where one is unknown, none after it can be known.
            if counts is None:
                break
            for worker in counts:
                matched[worker] = position
        return matched


def _positions(num_blocks: int) -> Iterator[int]:
    """Yield at which blocks a prompt is known: each at first, fewer later."""
    # A prompt of a thousand blocks keeps some 130 names; a few blocks less hardly change a cost.
    yield from range(1, min(num_blocks, 64) + 1)
    yield from range(72, min(num_blocks, 512) + 1, 8)
    yield from range(576, num_blocks + 1, 64)
