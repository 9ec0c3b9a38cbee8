"""The fetches of prefixes between workers, as the router arranges them.

Owns the request to the source, and what is learned from the answers. Does not know how a fetch is
chosen, or how an attempt is made.

    router ── OfferPrefix ──▶ source ◀── Fetch stream ── receiver ◀── Submit ── router
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.errors import WorkerLost
from core.ids import Ids, WorkerId
from core.ports import Clock
from core.session import FetchReport, OfferPrefix, PrefixSource
from core.types import GenerateRequest
from router.candidate import Candidate
from router.placement import Placement, PlacementConstraints
from router.prefix_sources import FetchSpeeds, PrefixSources
from router.workers.sessions import WorkerSessions


class PeerFetches:
    """Lets workers fetch from one another, where `PlacementConfig.peer_fetch` is on."""

    def __init__(self, sessions: WorkerSessions, ids: Ids, clock: Clock) -> None:
        """Know no speeds yet."""
        self._sessions = sessions
        self._ids = ids
        self._clock = clock
        self._speeds = FetchSpeeds()

    def sources(
        self,
        candidates: Sequence[Candidate],
        published_blocks: Mapping[WorkerId, int],
        constraints: PlacementConstraints,
    ) -> PrefixSources | None:
        """Find who could send the beginning of a prompt; None: nobody is to.

        Args:
            candidates: Live workers.
            published_blocks: How many leading blocks each has in its pool: what is only on its way
                to a worker cannot be fetched from there.
            constraints: Whether anything is fetched, and from whom nothing: those that have failed
                the request.
        """
        if not constraints.rules.peer_fetch or not published_blocks:
            return None
        return PrefixSources(
            candidates,
            published_blocks,
            self._speeds,
            self._clock.now_s(),
            constraints.excluded,
        )

    def ask(self, request: GenerateRequest, placement: Placement) -> PrefixSource | None:
        """Ask the source to offer what the placed worker fetches; None: it fetches nothing."""
        fetch = placement.fetch
        if fetch is None:
            return None
        receiver = placement.prefill
        transfer_id = self._ids.transfer()
        offer = OfferPrefix(
            transfer_id,
            # One more: the last token of a prompt is never looked for in a cache.
            request.token_ids[: fetch.num_tokens + 1],
            request.scope,
            receiver.worker_id,
            receiver.incarnation,
        )
        try:
            self._sessions.get(fetch.source).send(offer)
        except WorkerLost:
            return None  # then it is computed
        address = fetch.source.transfer_address
        return PrefixSource(transfer_id, address, fetch.num_tokens, fetch.wait_s)

    def note(self, placement: Placement, report: FetchReport) -> None:
        """Learn from what became of a fetch."""
        fetch = placement.fetch
        if fetch is not None:
            self._speeds.note(fetch.source, placement.prefill, report, self._clock.now_s())
