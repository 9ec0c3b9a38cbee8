"""A prefix that comes from a peer: when it is worth it, what becomes of it, and who waits."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from core.clocks import LoopClock
from core.errors import KVTransferError, PoolExhausted, TransferNotFound
from core.ids import Incarnation, TransferId, WorkerId
from core.kv_layout import KVLayout
from core.session import FetchOutcome, FetchReport, PrefixSource, Submit, Task
from core.types import GenerateRequest, SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import Limits
from engine.scheduling.scheduler import Scheduler
from kv_transfer.receiver import Arrival, FetchOrder
from kv_transfer.reserved_blocks import Reservation
from simulation.loop import run_virtual
from worker import prefix_fetches
from worker.attempt import Attempt
from worker.prefix_fetches import PrefixFetches

SIZE = 4
PROMPT = tuple(range(1, 15))
"""Three blocks and two tokens."""
ONE, OTHER = TransferId(b"1" * 16), TransferId(b"2" * 16)
ME = (WorkerId("prefill-a"), Incarnation(9))
NOTHING_HERE = FetchReport()
ARRIVAL = Arrival(0, 0, "inproc", 0)
CALLS = ("fetch", "reserved", "refuse", "ack", "end_fetch")


class World:
    """The fetches of a worker with a real pool; `posted` is what its agent was told."""

    def __init__(self, num_blocks=32, cache_prefixes=True):
        self.posted, self.queued, self.failed, self.num_wakes = [], [], [], 0
        self.pool = BlockPool(num_blocks)
        self.prefixes = Scheduler(self.pool, Limits(SIZE, 64, 8, 100), "m").prefixes
        self.kv = SimpleNamespace(generation=5)
        components = SimpleNamespace(
            engine=SimpleNamespace(cache_prefixes=cache_prefixes),
            kv=self.kv,
            layout=KVLayout("m", "uint8", 2, 1, 8, SIZE),
            clock=LoopClock(),
            worker_id=ME[0],
            incarnation=ME[1],
        )
        agents = SimpleNamespace(
            receive=SimpleNamespace(**{name: name for name in CALLS}),
            post=lambda call, *args: self.posted.append((call, *args)),
        )
        scheduler = SimpleNamespace(prefixes=self.prefixes, pool=self.pool)
        self.fetches = PrefixFetches(components, scheduler, self, agents)

    def queue(self, attempt):
        self.queued.append((asyncio.get_running_loop().time(), attempt))

    def end(self, attempt, error):
        self.failed.append((attempt, error.code))

    def wake(self):
        self.num_wakes += 1

    def cache(self, num_blocks):
        """As a request of the same beginning leaves it."""
        prefix = self.prefixes.prefix(PROMPT[: num_blocks * SIZE + 1], "acme")
        self.prefixes.reserve(prefix)
        self.prefixes.attach(prefix)

    def begin(self, transfer_id=ONE, num_tokens=12, **sampling):
        """Begin a fetch; returns the attempt and whether it waits."""
        params = SamplingParams(max_tokens=1, **sampling)
        request = GenerateRequest("r", "", PROMPT, params, 1, 0.0, scope="acme")
        source = PrefixSource(transfer_id, "peer", num_tokens, 2.0)
        attempt = Attempt("router", Submit(request, 0, Task.LOCAL, ((),), prefix_source=source))
        return attempt, self.fetches.begin(attempt)

    def closed(self, transfer_id=ONE):
        """The end of every transfer; then nothing is left of it."""
        self.fetches.transfer_closed(transfer_id)
        assert transfer_id not in self.fetches
        assert self.pool.num_held == self.prefixes.num_reserved == 0


@pytest.mark.parametrize("num_here", range(4))
def test_a_prefix_is_fetched_if_a_whole_block_of_it_is_missing(num_here):
    async def main():
        world = World()
        if num_here:
            world.cache(num_here)
        attempt, is_waiting = world.begin()
        assert is_waiting is (num_here < 3) is (ONE in world.fetches)
        if is_waiting:
            assert world.posted == [("fetch", FetchOrder(ONE, "peer", *ME))]
            assert attempt.fetch == NOTHING_HERE
            world.closed()
        else:
            assert world.posted == [] and attempt.fetch == FetchReport(FetchOutcome.HELD)

    run_virtual(main())


def test_there_are_so_many_fetches_at_once(monkeypatch):
    monkeypatch.setattr(prefix_fetches, "MAX_FETCHES", 1)

    async def main():
        world = World()
        assert world.begin()[1]
        second, is_waiting = world.begin(OTHER)
        assert not is_waiting and second.fetch == FetchReport(FetchOutcome.NO_ROOM)
        assert len(world.fetches) == len(world.posted) == 1
        world.closed()
        assert world.begin(OTHER)[1]
        world.closed(OTHER)

    run_virtual(main())


@pytest.mark.parametrize("why", ["scores", "no cache"])
def test_what_would_not_be_found_in_the_cache_is_not_fetched(why):
    async def main():
        world = World(cache_prefixes=why != "no cache")
        sampling = {"prompt_logprobs": 0} if why == "scores" else {}
        attempt, is_waiting = world.begin(**sampling)
        assert not is_waiting and world.posted == [] and attempt.fetch == NOTHING_HERE

    run_virtual(main())


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (8, 2), (12, 3)])
def test_blocks_are_reserved_for_what_the_peer_has(num_tokens, num_blocks):
    async def main():
        world = World()
        world.begin()
        for _ in range(2):  # said twice, it counts once
            world.fetches.transfer_starting(ONE, num_tokens)
        [_, (call, transfer_id, reservation)] = world.posted
        assert (call, transfer_id) == ("reserved", ONE)
        table = reservation.block_ids
        generations = tuple(map(world.pool.generation, table))
        assert reservation == Reservation(table, generations, 0, 5) and len(table) == num_blocks
        assert world.pool.num_held == num_blocks and world.queued == []
        world.closed()

    run_virtual(main())


@pytest.mark.parametrize("num_tokens", [0, -1, 13])
def test_a_peer_that_has_nothing_or_more_than_it_was_asked_for_is_left(num_tokens):
    async def main():
        world = World()
        attempt, _ = world.begin()
        await asyncio.sleep(0.5)
        world.fetches.transfer_starting(ONE, num_tokens)
        assert world.posted[1:] == [("end_fetch", ONE)] and world.pool.num_held == 0
        assert world.queued == [(0.5, attempt)] and world.num_wakes == 1
        assert attempt.fetch == FetchReport(FetchOutcome.FAILED, 0, 0.5)
        world.closed()
        assert len(world.queued) == 1

    run_virtual(main())


def test_without_room_the_peer_is_refused_and_the_prompt_computed():
    async def main():
        world = World(num_blocks=8)
        taken = world.pool.allocate(6)
        attempt, _ = world.begin()
        world.fetches.transfer_starting(ONE, 12)
        refused, ended = world.posted[1:]
        assert refused[:2] == ("refuse", ONE) and isinstance(refused[2], PoolExhausted)
        assert ended == ("end_fetch", ONE) and attempt.fetch.outcome == FetchOutcome.NO_ROOM
        assert [one for _, one in world.queued] == [attempt]
        world.pool.free(taken)
        world.closed()

    run_virtual(main())


@pytest.mark.parametrize("num_here", [2, 3])
def test_what_another_request_has_computed_meanwhile_is_not_fetched_again(num_here):
    async def main():
        world = World()
        attempt, _ = world.begin()
        world.cache(num_here)
        world.fetches.transfer_starting(ONE, 12)
        if num_here == 3:
            assert world.posted[1:] == [("end_fetch", ONE)]
            assert attempt.fetch.outcome == FetchOutcome.HELD
        else:
            assert world.posted[1][2].have_blocks == 2 and world.queued == []
        world.closed()

    run_virtual(main())


@pytest.mark.parametrize("num_here", [0, 1])
def test_what_has_arrived_is_cached_before_its_prompt_is_queued(num_here):
    async def main():
        world = World()
        await asyncio.sleep(1.0)
        if num_here:
            world.cache(num_here)
        attempt, _ = world.begin()
        world.fetches.transfer_starting(ONE, 12)
        await asyncio.sleep(0.25)
        world.queue = lambda attempt: world.queued.append(world.pool.num_cached)
        world.fetches.transfer_arrived(ONE, {}, ARRIVAL)
        assert world.posted[-1] == ("ack", ONE) and world.queued == [3]
        assert attempt.fetch == FetchReport(FetchOutcome.FETCHED, 12 - num_here * SIZE, 0.25)
        await asyncio.sleep(10.0)
        world.closed()
        assert world.queued == [3] and world.posted[-1] == ("ack", ONE)
        assert world.num_wakes == 2, "queued, and blocks may be free"

    run_virtual(main())


def test_what_arrived_in_memory_that_was_replaced_is_computed():
    async def main():
        world = World()
        attempt, _ = world.begin()
        world.fetches.transfer_starting(ONE, 12)
        world.kv.generation = 6
        world.fetches.transfer_arrived(ONE, {}, ARRIVAL)
        assert world.posted[-1] == ("end_fetch", ONE) and world.pool.num_cached == 0
        assert attempt.fetch.outcome == FetchOutcome.FAILED
        world.closed()

    run_virtual(main())


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (TransferNotFound("no such transfer"), FetchOutcome.NOT_HELD),
        (KVTransferError("lost"), FetchOutcome.FAILED),
        (None, FetchOutcome.FAILED),
    ],
    ids=["unknown", "lost", "taken for a hand-over"],
)
def test_a_fetch_that_fails_costs_its_wait(error, outcome):
    async def main():
        world = World()
        await asyncio.sleep(1.0)
        attempt, _ = world.begin()
        await asyncio.sleep(0.5)
        if error is None:
            world.fetches.transfer_finished(ONE)
        else:
            world.fetches.transfer_failed(ONE, error)
        assert world.posted[1:] == [("end_fetch", ONE)] and world.queued == [(1.5, attempt)]
        assert attempt.fetch == FetchReport(outcome, 0, 0.5)
        world.closed()

    run_virtual(main())


def test_a_fetch_is_waited_for_no_longer_than_it_is_worth():
    async def main():
        world = World()
        attempt, _ = world.begin()
        world.fetches.transfer_starting(ONE, 12)
        await asyncio.sleep(10.0)
        assert world.queued == [(2.0, attempt)] and world.posted[-1] == ("end_fetch", ONE)
        assert attempt.fetch == FetchReport(FetchOutcome.LATE, 0, 2.0)
        num_posted = len(world.posted)
        world.fetches.transfer_arrived(ONE, {}, ARRIVAL)
        world.fetches.transfer_starting(ONE, 12)
        world.fetches.transfer_failed(ONE, KVTransferError("lost"))
        assert len(world.posted) == num_posted and len(world.queued) == 1
        assert world.pool.num_held == 3, "the agent may be writing"
        world.closed()

    run_virtual(main())


@pytest.mark.parametrize("how", ["attempt", "fetch"])
def test_the_deadline_of_a_fetch_that_is_over_ends_no_other_of_its_id(how):
    async def main():
        world = World()
        first, _ = world.begin()
        if how == "attempt":
            world.fetches.end(first)
        else:
            world.fetches.transfer_failed(ONE, KVTransferError("lost"))
        world.closed()
        await asyncio.sleep(1.0)
        second, _ = world.begin()
        await asyncio.sleep(10.0)
        assert world.queued[-1] == (3.0, second)
        world.closed()

    run_virtual(main())


def test_a_fetch_that_ends_without_a_word_is_computed():
    async def main():
        world = World()
        attempt, _ = world.begin()
        world.fetches.transfer_starting(ONE, 12)
        world.closed()
        assert attempt.fetch.outcome == FetchOutcome.FAILED
        assert [one for _, one in world.queued] == [attempt]
        world.fetches.transfer_closed(ONE)
        world.fetches.transfer_arrived(ONE, {}, ARRIVAL)
        assert len(world.queued) == 1

    run_virtual(main())


def test_a_prompt_that_cannot_be_queued_ends_its_attempt_and_the_fetch_all_the_same():
    async def main():
        world = World()
        attempt, _ = world.begin()
        world.fetches.transfer_starting(ONE, 12)
        world.queue = {}.pop  # raises
        world.fetches.transfer_arrived(ONE, {}, ARRIVAL)
        assert world.failed == [(attempt, "internal_error")]
        assert world.posted[-1] == ("ack", ONE) and world.num_wakes == 1
        world.closed()

    run_virtual(main())


def test_an_attempt_that_is_over_waits_no_more_and_ends_no_fetch_but_its_own():
    async def main():
        world = World()
        attempt, _ = world.begin()
        world.fetches.end(replace(attempt))  # refused, for it names the same transfer
        assert world.posted[1:] == []
        for _ in range(2):
            world.fetches.end(attempt)
        assert world.posted[1:] == [("end_fetch", ONE)] and world.num_wakes == 0
        await asyncio.sleep(10.0)
        world.closed()
        assert world.queued == [] and world.num_wakes == 1

    run_virtual(main())
