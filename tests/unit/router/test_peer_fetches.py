"""How a router arranges a fetch between two workers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from core.config import PlacementConfig
from core.errors import WorkerLost
from core.session import (
    FetchOutcome,
    FetchReport,
    Load,
    OfferPrefix,
    PrefixSource,
    Role,
    WorkerDescriptor,
)
from core.types import GenerateRequest, Path, SamplingParams
from router.candidate import Candidate
from router.peer_fetches import PeerFetches
from router.placement import Placement, PlacementConstraints
from router.prefix_sources import REST_S, Fetch

SOURCE = WorkerDescriptor("a", Role.PREFILL, 1, "s", "kv of a", "m", "digest", 16, 100, 2_048)
RECEIVER = replace(SOURCE, worker_id="b", incarnation=2, transfer_address="kv of b")
REQUEST = GenerateRequest("r", "m", tuple(range(50)), SamplingParams(), 1, 0.0, scope="acme")
FETCHES = PlacementConstraints(PlacementConfig(peer_fetch=True))
PLACED = Placement(Path.LOCAL, RECEIVER, RECEIVER, "", fetch=Fetch(SOURCE, 32, 16, 0.1, 0.5))


class World:
    """Fetches over sessions that write down what is sent; `now_s` is the time."""

    def __init__(self, is_lost=False):
        self.sent, self.now_s = [], 0.0

        def send(message):
            if is_lost:
                raise WorkerLost("gone")
            self.sent.append(message)

        sessions = SimpleNamespace(get=lambda worker: SimpleNamespace(send=send))
        ids = SimpleNamespace(transfer=lambda: b"t" * 16)
        self.fetches = PeerFetches(sessions, ids, SimpleNamespace(now_s=lambda: self.now_s))

    def best(self, constraints=FETCHES):
        candidate = Candidate(SOURCE, Load(free_blocks=100))
        sources = self.fetches.sources([candidate], {"a": 2}, constraints)
        return sources.best_for(RECEIVER)


def test_the_source_is_asked_for_the_prefix_and_one_token_more():
    world = World()
    assert world.fetches.ask(REQUEST, PLACED) == PrefixSource(b"t" * 16, "kv of a", 32, 0.5)
    assert world.sent == [OfferPrefix(b"t" * 16, tuple(range(33)), "acme", "b", 2)]


def test_nobody_is_asked_where_nothing_is_fetched_and_a_lost_source_is_done_without():
    world = World()
    assert world.fetches.ask(REQUEST, replace(PLACED, fetch=None)) is None and world.sent == []
    assert World(is_lost=True).fetches.ask(REQUEST, PLACED) is None


def test_sources_are_looked_for_where_fetching_is_on_and_somebody_has_published_blocks():
    world = World()
    assert world.best() == (32, SOURCE)
    assert world.best(replace(FETCHES, excluded=frozenset({"a"}))) is None
    assert world.fetches.sources([], {}, FETCHES) is None
    off = PlacementConstraints(PlacementConfig(peer_fetch=False))
    assert world.fetches.sources([], {"a": 2}, off) is None


@pytest.mark.parametrize("outcome", [FetchOutcome.FAILED, FetchOutcome.FETCHED])
def test_a_source_at_which_a_fetch_failed_is_left_alone_for_a_while(outcome):
    world = World()
    world.now_s = 100.0
    world.fetches.note(replace(PLACED, fetch=None), FetchReport(FetchOutcome.FAILED))
    assert world.best() is not None, "it was no fetch"
    world.fetches.note(PLACED, FetchReport(outcome, 16, 0.1))
    assert (world.best() is None) is (outcome is FetchOutcome.FAILED)
    world.now_s += REST_S
    assert world.best() == (32, SOURCE)
