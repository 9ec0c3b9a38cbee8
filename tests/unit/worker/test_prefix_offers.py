"""What a worker sends of its cache to a peer, and what it keeps for that."""

from types import SimpleNamespace

import pytest

from core.errors import KVTransferError
from core.ids import Incarnation, TransferId, WorkerId
from core.kv_layout import KVLayout
from core.session import OfferPrefix
from kv_transfer.sender import Blocks, Offer
from worker.prefix_offers import PrefixOffers

ONE, OTHER = TransferId(b"1" * 16), TransferId(b"2" * 16)
PEER = (WorkerId("decode-a"), Incarnation(7))
CALLS = ("offer", "start", "publish", "commit", "decline", "end_send")


class World:
    """Offers of a worker that has `held` of any prefix; `posted` is what its agent was told."""

    def __init__(self, held=(4, 5, 6), exports_kv=True):
        self.posted, self.asked, self.unpinned = [], [], []
        prefixes = SimpleNamespace(
            prefix=lambda tokens, scope: (tokens, scope),
            pin=lambda prefix: self.asked.append(prefix) or list(held),
            unpin=self.unpinned.append,
        )
        components = SimpleNamespace(
            kv=SimpleNamespace(generation=3),
            layout=KVLayout("m", "uint8", 2, 1, 8, 4),
            exports_kv=exports_kv,
        )
        agents = SimpleNamespace(
            send=SimpleNamespace(**{name: name for name in CALLS}),
            post=lambda call, *args: self.posted.append((call, *args)),
        )
        self.offers = PrefixOffers(components, prefixes, agents)

    def offer(self, transfer_id=ONE):
        self.offers.offer(OfferPrefix(transfer_id, (1, 2, 3), "acme", *PEER))


def test_what_is_here_is_offered_and_sent_whole_but_for_what_the_peer_has():
    world = World()
    world.offer()
    assert world.asked == [((1, 2, 3), "acme")]
    assert world.posted == [("offer", Offer(ONE, *PEER, 3)), ("start", ONE, 12)]
    world.posted.clear()
    world.offers.transfer_reserved(ONE, 1)
    assert world.posted == [
        ("publish", ONE, 0, Blocks(0, 1, (5, 6), 8)),
        ("publish", ONE, 0, Blocks(1, 1, (5, 6), 8)),
        ("commit", ONE, 0, {}, frozenset()),
    ]
    world.offers.transfer_sent(ONE)
    assert world.offers.num_sent == 1 and ONE in world.offers
    world.offers.transfer_drained(ONE, 0)
    assert world.unpinned == [[4, 5, 6]] and len(world.offers) == world.offers.num_declined == 0


def test_to_a_peer_that_has_all_meanwhile_nothing_is_sent_but_the_end():
    world = World()
    world.offer()
    world.posted.clear()
    world.offers.transfer_reserved(ONE, 3)
    assert world.posted == [("commit", ONE, 0, {}, frozenset())]


@pytest.mark.parametrize("why", [{"held": ()}, {"exports_kv": False}])
def test_what_cannot_be_sent_is_declined_and_leaves_nothing(why):
    world = World(**why)
    world.offer()
    assert world.posted == [("decline", ONE)]
    assert world.offers.num_declined == 1 and len(world.offers) == 0


def test_a_transfer_that_is_lost_is_ended_and_its_blocks_stay_until_nobody_reads_them():
    world = World()
    world.offer()
    error = KVTransferError("gone")
    world.offers.transfer_lost(ONE, error)
    assert world.posted[-1] == ("end_send", ONE, error) and world.unpinned == []
    world.offers.transfer_drained(ONE, 0)
    world.posted.clear()
    world.offers.transfer_reserved(ONE, 0)
    assert world.posted == [] and world.unpinned == [[4, 5, 6]] and world.offers.num_sent == 0


def test_each_offer_has_its_own_blocks():
    world = World()
    world.offer()
    world.offer(OTHER)
    world.offers.transfer_drained(ONE, 0)
    assert OTHER in world.offers and len(world.offers) == len(world.unpinned) == 1
