"""Whose pools serve a request: its tier's own or the shared ones, then those that it spills to.

Owns which workers a tier may use, and when a request leaves its first pools for the next. Pure:
placement on the workers of one pair of pools is a function that it is given. Does not know how a
cost is predicted.

    own or shared pools ── no worker that can take it, or late ──▶ next of `spill_to` ──▶ ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from core.config import SHARED_PAIR, PoolPair, TierConfig, own_pair, pairs_of
from core.errors import NoWorker
from core.ids import WorkerId
from core.session import PoolId
from core.types import GenerateRequest
from router.candidate import Candidate
from router.placement import Placement

Place = Callable[[Sequence[Candidate]], Placement]
"""Places the request on some workers; raises `NoWorker`."""


@dataclass(frozen=True, slots=True)
class _Pools:
    """Pools that serve a request together."""

    name: str
    """Whose they are, in the words of a reason."""
    ids: frozenset[PoolId]

    def of(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return those of the candidates that are in them."""
        return [c for c in candidates if c.descriptor.pool in self.ids]


class PoolChoice:
    """The pools of each tier, in the order in which its requests may use them."""

    def __init__(self, tiers: Mapping[str, TierConfig]) -> None:
        """Read which tiers have pools of their own."""
        self._tiers = tiers
        self._orders = {name: _in_order(pairs_of(name, tiers)) for name in tiers}
        own = [pair for name, tier in tiers.items() if (pair := own_pair(name, tier)).name == name]
        self.is_divided = bool(own)
        """Some tier has a pool of its own; if none has, every worker is everybody's."""
        # Of canaries, which have no tier: they prove the shared pools while these have workers.
        everything = frozenset(
            pool for pair in (SHARED_PAIR, *own) for pool in (pair.prefill, pair.decode)
        )
        self._order_of_others = (*_in_order((SHARED_PAIR,)), _Pools("any", everything))

    def usable(self, tier: str, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the workers on which requests of a tier may run."""
        if not self.is_divided:
            return candidates
        ids = {pool for pools in self._order_of(tier) for pool in pools.ids}
        return [c for c in candidates if c.descriptor.pool in ids]

    def place(
        self,
        request: GenerateRequest,
        candidates: Sequence[Candidate],
        excluded: frozenset[WorkerId],
        place: Place,
    ) -> Placement:
        """Place a request on the first of its tier's pools in which a worker can take it in time.

        Where all would be late, it goes where its first token is predicted to come first.

        Args:
            request: Tokenized.
            candidates: Every worker that can take requests.
            excluded: Workers that have failed this request.
            place: Chooses among the workers of some pools.

        Raises:
            NoWorker: No worker of any of them can take it.
        """
        if not self.is_divided:
            return place(candidates)
        order = self._order_of(request.tier)
        found = [(pools.name, pools.of(candidates)) for pools in order]
        # Where all lack the same, such as decode workers, their order decides.
        lacks = [_lack(some, request, excluded) for _, some in found]
        able = [one for one, lack in zip(found, lacks, strict=True) if lack == min(lacks)]
        limit_s = self._limit_s(request.tier)
        placed = _placed(able, place, limit_s)
        # One that is in time comes first of all: those before it are late.
        name, placement = min(placed.items(), key=lambda one: one[1].predicted_s)
        first = order[0].name
        note = f"pools of {name}" if name != SHARED_PAIR.name else "shared pools"
        if name != first:
            note = f"spilled from {first} to {name}: {_why(first, placed, limit_s)}"
        return replace(placement, reason=f"{note}; {placement.reason}")

    def _order_of(self, tier: str) -> tuple[_Pools, ...]:
        return self._orders.get(tier, self._order_of_others)

    def _limit_s(self, tier: str) -> float:
        """Return how late a first token may be predicted before others are asked; 0: any time."""
        own = self._tiers.get(tier)
        return 0.0 if own is None else own.max_ttft_s or own.slo_ttft_s


def _in_order(pairs: Sequence[PoolPair]) -> tuple[_Pools, ...]:
    return tuple(_Pools(pair.name, frozenset((pair.prefill, pair.decode))) for pair in pairs)


def _lack(
    candidates: Sequence[Candidate], request: GenerateRequest, excluded: frozenset[WorkerId]
) -> int:
    """Say what is missing for a request to be taken: the less, the better.

    A decode worker decides: without one a prefill worker decodes, without the other one it computes
    the prompt itself.
    """
    decode = [c for c in candidates if not c.is_prefill]
    others = [c for c in decode if c.worker_id not in excluded]
    num_tokens = len(request.token_ids)
    if any(
        -(-num_tokens // c.block_size_tokens) + request.sampling.n <= c.num_available
        for c in others
    ):
        return 0
    return 1 if others else 2 if decode else 3


def _placed(
    able: Sequence[tuple[str, Sequence[Candidate]]], place: Place, limit_s: float
) -> dict[str, Placement]:
    """Place on one after the other until a first token comes in time; at least one is found.

    Raises:
        NoWorker: There is none.
    """
    placed: dict[str, Placement] = {}
    refusals: list[NoWorker] = []
    for name, candidates in able:
        try:
            placed[name] = place(candidates)
        except NoWorker as error:
            refusals.append(error)
            continue
        if not limit_s or placed[name].predicted_s <= limit_s:
            break
    if not placed:
        names = ", ".join(name for name, _ in able)
        raise NoWorker(f"in the pools of {names}: {refusals[0].message}")
    return placed


def _why(first: str, placed: Mapping[str, Placement], limit_s: float) -> str:
    """Say why a request left the first pools."""
    if first not in placed:
        return f"no worker of {first} can take it"
    late_s = placed[first].predicted_s
    return f"{late_s * 1e3:.0f} ms expected there, {limit_s * 1e3:.0f} ms allowed"
