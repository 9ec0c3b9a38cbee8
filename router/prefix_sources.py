"""Who could send the beginning of a prompt to a worker that lacks it, and how long that takes.

Owns the choice of the holder and the measured speed of fetches. Does not know streams, or what
computing would cost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from core.ids import Incarnation, WorkerId
from core.session import FetchOutcome, FetchReport, WorkerDescriptor
from router.candidate import Candidate

DEFAULT_TOKENS_PER_S = 50_000.0
"""Of a model of 0.5B parameters over one core, or of a larger one over a fast network."""
OVERHEAD_S = 0.01
"""Two messages of the router's, a stream, a reservation: what a fetch of one block takes."""
NEWEST_SHARE = 0.2
"""Weight of the newest fetch in the measured speed."""
REST_S = 5.0
"""For which nobody is sent to a worker that a fetch failed at: each try costs a request a wait."""
MAX_RESTING = 1_024


@dataclass(frozen=True, slots=True)
class Fetch:
    """A worker pulls the first `num_tokens` of a prompt from `source`."""

    source: WorkerDescriptor
    num_tokens: int
    num_gained: int
    """Of these, the tokens that it does not hold already."""
    exposed_s: float
    """What the fetch adds to the wait: it goes on while the worker computes what came before."""
    wait_s: float
    """After which it is given up."""


class FetchSpeeds:
    """What past fetches have shown."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._tokens_per_s: dict[bool, float] = {}
        """By whether both workers are on one node: shared memory is another thing than a wire."""
        self._resting: OrderedDict[Incarnation, float] = OrderedDict()

    def note(
        self,
        source: WorkerDescriptor,
        receiver: WorkerDescriptor,
        report: FetchReport,
        now_s: float,
    ) -> None:
        """Learn from a fetch that has ended."""
        if report.outcome in (FetchOutcome.LATE, FetchOutcome.FAILED):
            self._resting.pop(source.incarnation, None)
            self._resting[source.incarnation] = now_s + REST_S
            if len(self._resting) > MAX_RESTING:
                self._resting.popitem(last=False)
        if report.outcome == FetchOutcome.FETCHED and report.num_tokens > 0:
            newest = report.num_tokens / max(report.took_s - OVERHEAD_S, OVERHEAD_S / 10)
            is_near = _are_near(source, receiver)
            known = self._tokens_per_s.get(is_near, newest)
            self._tokens_per_s[is_near] = known + NEWEST_SHARE * (newest - known)

    def seconds(
        self, source: WorkerDescriptor, receiver: WorkerDescriptor, num_tokens: int
    ) -> float:
        """Predict a fetch."""
        tokens_per_s = self._tokens_per_s.get(_are_near(source, receiver), DEFAULT_TOKENS_PER_S)
        return OVERHEAD_S + num_tokens / tokens_per_s

    def is_resting(self, source: WorkerDescriptor, now_s: float) -> bool:
        """Return True while a worker is asked for nothing."""
        return self._resting.get(source.incarnation, 0.0) > now_s


def _are_near(source: WorkerDescriptor, receiver: WorkerDescriptor) -> bool:
    return source.node == receiver.node


class PrefixSources:
    """The best holder of one prompt's beginning, by the content that workers can exchange."""

    def __init__(
        self,
        candidates: Iterable[Candidate],
        published_blocks: Mapping[WorkerId, int],
        speeds: FetchSpeeds,
        now_s: float,
        excluded: frozenset[WorkerId] = frozenset(),
    ) -> None:
        """Look at every holder once.

        Args:
            candidates: Live workers.
            published_blocks: How many leading blocks each of them has published.
            speeds: Of fetches.
            now_s: On the clock of `speeds`.
            excluded: Workers that have failed this request.
        """
        self._speeds = speeds
        self.most_tokens = 0
        """That any worker holds."""
        best: dict[str, tuple[tuple[int, int], WorkerDescriptor]] = {}
        for c in candidates:
            descriptor = c.descriptor
            num_blocks = published_blocks.get(descriptor.worker_id, 0)
            if not num_blocks or descriptor.worker_id in excluded or not descriptor.exports_kv:
                continue
            if speeds.is_resting(descriptor, now_s):
                continue
            # Of equal ones the least busy, so that a popular prefix is not drawn from one alone.
            key = num_blocks * descriptor.block_size_tokens, -c.num_running
            known = best.get(descriptor.content_digest)
            if known is None or key > known[0]:
                best[descriptor.content_digest] = key, descriptor
                self.most_tokens = max(self.most_tokens, key[0])
        self._best = {digest: (key[0], holder) for digest, (key, holder) in best.items()}

    def best_for(self, receiver: WorkerDescriptor) -> tuple[int, WorkerDescriptor] | None:
        """Find who holds most of what a worker could use, and how many tokens."""
        found = self._best.get(receiver.content_digest)
        if found is None or found[1].incarnation == receiver.incarnation:
            return None
        sizes = sorted((found[1].block_size_tokens, receiver.block_size_tokens))
        return found if sizes[1] % sizes[0] == 0 else None

    def seconds(
        self, source: WorkerDescriptor, receiver: WorkerDescriptor, num_tokens: int
    ) -> float:
        """Predict a fetch."""
        return self._speeds.seconds(source, receiver, num_tokens)
