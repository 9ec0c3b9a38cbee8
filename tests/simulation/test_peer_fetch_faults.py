"""Everything that can go wrong with a fetch from a peer, on virtual time.

Each fault is checked to have happened; whatever happens, the answer is exact and no attempt is
lost.
"""

import asyncio
from dataclasses import replace

import pytest
from support.prefixes import (
    ENGINE,
    GREEDY,
    LOCAL,
    LONG,
    SHARED,
    TAIL,
    by_id,
    fetching,
    held_elsewhere,
    ids,
    is_between_prefill,
    is_frame,
    plain,
)
from support.virtual import ask

from core.config import TransferConfig
from core.errors import InvalidRequest
from core.session import OfferPrefix, PrefixSource, Role, Task
from kv_transfer import codec
from kv_transfer.transitions import Transition
from worker.prefix_fetches import PrefixFetches
from worker.prefix_offers import PrefixOffers


def computed(ended, outcome, tokens, prompt=TAIL):
    """The fetch ended so, and the prompt was computed, in the same attempt."""
    assert ended.error is None and ended.timing.attempts == ("0:pd:ok",)
    assert (ended.timing.fetch_outcome, ended.timing.fetched_tokens) == (outcome, 0)
    assert tokens == plain(prompt)


def test_a_holder_that_has_evicted_it_refuses_at_once():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        pool = by_id(cluster, holder).pool
        pool.free(pool.allocate(pool.num_available))  # all that was cached makes room
        view.claims = {holder: SHARED // 4} | dict.fromkeys(ids(cluster, Role.DECODE), 0)
        tokens, ended = await ask(cluster, "second", TAIL)
        return tokens, ended, by_id(cluster, holder).transfers.offers.num_declined

    tokens, ended, num_declined = fetching(scenario)
    computed(ended, "not_held", tokens)
    assert num_declined == 1 and ended.timing.fetch_s < 0.02


def test_a_device_that_keeps_its_kv_to_itself_declines_whatever_it_is_asked():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        by_id(cluster, holder).transfers.offers._exports_kv = False
        return await ask(cluster, "second", TAIL)

    tokens, ended = fetching(scenario)
    computed(ended, "not_held", tokens)


def test_a_prompt_of_another_scope_is_not_sent_whatever_an_index_says():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = {holder: SHARED // 4} | dict.fromkeys(ids(cluster, Role.DECODE), 0)
        request = cluster.request("second", TAIL, GREEDY, scope="another tenant")
        events = await cluster.generate(request)
        return events[-1]

    ended = fetching(scenario)
    assert ended.error is None and ended.timing.fetch_outcome == "not_held"
    assert ended.usage.cached_tokens == 0


def test_a_holder_that_dies_in_the_middle_costs_no_attempt():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        seen = []

        def watch(stream, message):
            if is_frame(message) and not seen:
                seen.append(stream.node)
                cluster.loop.create_task(cluster.kill(holder))
                return None
            return message

        cluster.hub.tamper = watch
        tokens, ended = await ask(cluster, "second", TAIL)
        return holder, seen, tokens, ended

    holder, seen, tokens, ended = fetching(scenario)
    assert seen == [holder]
    computed(ended, "failed", tokens)


def test_wrong_bytes_are_asked_for_again_and_then_computed():
    async def scenario(cluster):
        _, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        flips = []

        def flip(stream, message):
            if is_between_prefill(stream) and is_frame(message):
                flips.append(stream)
                return message[:-5] + bytes([message[-5] ^ 4]) + message[-4:]
            return message

        cluster.hub.tamper = flip
        tokens, ended = await ask(cluster, "second", TAIL)
        return len(flips), tokens, ended

    flips, tokens, ended = fetching(scenario)
    assert flips >= 2
    computed(ended, "failed", tokens)


def test_a_slow_holder_is_waited_for_no_longer_than_computing_takes():
    async def scenario(cluster):
        _, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        cluster.hub.extra_delay_s = lambda stream: 3.0 * is_between_prefill(stream)
        tokens, ended = await ask(cluster, "second", TAIL)
        return cluster.transitions[Transition.RECEIVER_FETCHING], tokens, ended

    num_fetches, tokens, ended = fetching(scenario)
    assert num_fetches == 3, "two hand-overs, and the fetch that came to nothing"
    computed(ended, "late", tokens)
    assert 0.05 < ended.timing.fetch_s < 0.25


def test_an_offer_that_is_lost_on_its_way_costs_a_short_wait():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        commands = by_id(cluster, holder).attempts
        lost = []
        commands.offer_prefix = lost.append
        tokens, ended = await ask(cluster, "second", TAIL)
        return lost, tokens, ended

    lost, tokens, ended = fetching(scenario)
    assert [type(message) for message in lost] == [OfferPrefix]
    computed(ended, "late", tokens)


def test_a_receiver_without_room_computes():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        [other] = [name for name in ids(cluster, Role.PREFILL) if name != holder]
        unit_ = by_id(cluster, other)
        unit_.scheduler.prefixes.num_reserved = 1_000  # as many others are fetched
        tokens, ended = await ask(cluster, "second", TAIL)
        unit_.scheduler.prefixes.num_reserved -= 1_000
        return tokens, ended

    tokens, ended = fetching(scenario)
    computed(ended, "no_room", tokens)


def test_peers_read_a_bounded_part_of_a_pool():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        prefixes = by_id(cluster, holder).scheduler.prefixes
        prefixes.num_read = ENGINE.num_blocks // 2 - SHARED // 4 + 1
        tokens, ended = await ask(cluster, "second", TAIL)
        prefixes.num_read = 0
        return tokens, ended

    tokens, ended = fetching(scenario)
    computed(ended, "not_held", tokens)


def test_an_offer_that_nobody_comes_for_is_over_with_its_lease():
    async def scenario(cluster):
        holder, _ = await held_elsewhere(cluster)
        unit_ = by_id(cluster, holder)
        transfer_id = cluster.ids.transfer()
        unit_.attempts.offer_prefix(OfferPrefix(transfer_id, LONG, "", "prefill2", 7))
        num_pinned = unit_.pool.num_held
        await asyncio.sleep(3.0)
        return num_pinned, unit_.pool.num_held, len(unit_.transfers.offers)

    transfer = TransferConfig(lease_s=1.0, frame_bytes=4096)
    assert fetching(scenario, transfer=transfer) == (len(LONG) // 4, 0, 0)


def test_a_request_that_leaves_while_its_prefix_comes_leaves_nothing_behind():
    async def scenario(cluster):
        _, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        started = asyncio.Event()

        def watch(stream, message):
            if is_between_prefill(stream) and is_frame(message):
                started.set()
                cluster.hub.extra_delay_s = lambda stream: 3.0 * is_between_prefill(stream)
            return message

        cluster.hub.tamper = watch
        asking = asyncio.ensure_future(ask(cluster, "second", TAIL))
        await started.wait()
        prefixes = [u.scheduler.prefixes for u in cluster.units.values()]
        before = [one.num_reserved for one in prefixes]
        asking.cancel()
        await asyncio.sleep(0.02)  # less than the fetch may take
        after = [one.num_reserved for one in prefixes]
        cluster.hub.extra_delay_s = lambda stream: 0.0
        await asyncio.sleep(5.0)
        return before, after, [one.num_read for one in prefixes]

    before, after, num_read = fetching(scenario)
    assert any(before) and not any(after) and not any(num_read)


@pytest.mark.parametrize("side", ["receiver", "source"])
def test_a_pool_that_is_replaced_in_mid_fetch_is_neither_read_nor_attached(side):
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        [other] = [name for name in ids(cluster, Role.PREFILL) if name != holder]
        target = by_id(cluster, holder if side == "source" else other)
        replaced = []

        def replace(stream, message):
            is_frame = isinstance(message, bytes) and codec.decode(message)
            kind = type(is_frame[1]).__name__ if is_frame else ""
            if kind == ("Reserved" if side == "source" else "Commit") and not replaced:
                if stream.peer.node.startswith("prefill"):
                    replaced.append(kind)
                    target.components.kv.generation += 1
            return message

        cluster.hub.tamper = replace
        tokens, ended = await ask(cluster, "second", TAIL)
        return replaced, tokens, ended

    replaced, tokens, ended = fetching(scenario)
    assert len(replaced) == 1 and ended.error is None
    assert ended.timing.fetched_tokens == 0 and tokens == plain(TAIL)


def test_a_holder_that_failed_is_asked_for_nothing_for_a_while():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        by_id(cluster, holder).attempts.offer_prefix = lambda message: None
        outcomes = []
        for number in range(3):
            prompt = (*LONG[:140], *(number + 10,) * 10)
            [other] = [name for name in ids(cluster, Role.PREFILL) if name != holder]
            pool = by_id(cluster, other).pool
            pool.free(pool.allocate(pool.num_available))
            _, ended = await ask(cluster, f"r{number}", prompt)
            outcomes.append(ended.timing.fetch_outcome)
            await asyncio.sleep(0.1 if not number else 6.0)
        return outcomes

    assert fetching(scenario) == ["late", "", "late"]


def test_kv_that_arrived_before_the_pool_was_replaced_is_not_cached(monkeypatch):
    """Between the agent's word and the worker's loop there is time for a restart."""
    arrived, replaced = PrefixFetches.transfer_arrived, []

    def late(self, *told):
        if not replaced:
            replaced.append(self._kv.generation)
            self._kv.replace()
        arrived(self, *told)

    monkeypatch.setattr(PrefixFetches, "transfer_arrived", late)

    async def scenario(cluster):
        await held_elsewhere(cluster, Role.DECODE)
        tokens, ended = await ask(cluster, "second", TAIL)
        return tokens, ended.error, ended.timing

    tokens, error, timing = fetching(scenario, prefill=0, decode=2, placement=LOCAL)
    assert replaced and error is None and timing.fetch_outcome == "failed"
    assert tokens == plain(TAIL)


def test_a_bug_in_a_step_of_a_fetch_costs_the_fetch(monkeypatch, caplog):
    def breaks(self, *told):
        raise ValueError("a bug")

    async def scenario(cluster):
        _, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        return await ask(cluster, "second", TAIL)

    for owner, step in (
        (PrefixFetches, "transfer_starting"),
        (PrefixFetches, "transfer_arrived"),
        (PrefixOffers, "transfer_reserved"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, breaks)
            tokens, ended = fetching(scenario)
        assert "ValueError: a bug" in caplog.text, step
        caplog.clear()
        computed(ended, "failed", tokens)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_transfer_has_one_id_whatever_it_carries(is_first):
    """Another router, or one in wrong hands, names the id of a transfer that is here."""

    async def scenario(cluster):
        await ask(cluster, "first", LONG)
        worker = next(u for u in cluster.units.values() if u.descriptor.role is Role.PREFILL)
        seen = []
        inner = worker.attempts.submit

        def submit(router_id, message):
            seen.append(message)
            offer = OfferPrefix(message.transfer_id, LONG, "", "decode9", 1)
            if is_first:
                worker.attempts.offer_prefix(offer)
            inner(router_id, message)
            with pytest.raises(InvalidRequest, match="transfer_id.* is here already"):
                worker.attempts.offer_prefix(offer)

        worker.attempts.submit = submit
        _, ended = await ask(cluster, "second", TAIL)
        del worker.attempts.submit
        await asyncio.sleep(6.0)
        return seen, ended

    seen, ended = fetching(scenario, prefill=1)
    assert seen
    if is_first:
        assert "invalid" in ended.error.code
    else:
        assert ended.error is None and ended.timing.attempts == ("0:pd:ok",)


def test_a_fetch_under_the_id_of_a_hand_over_leaves_it_alone():
    """Both come in through one agent: what it reports of the one is never the other's."""

    async def scenario(cluster):
        await ask(cluster, "first", LONG)
        decode = next(u for u in cluster.units.values() if u.descriptor.role is Role.DECODE)
        prefill = next(u for u in cluster.units.values() if u.descriptor.role is Role.PREFILL)
        seen = []
        inner = decode.attempts.submit

        def submit(router_id, message):
            inner(router_id, message)
            source = PrefixSource(
                message.transfer_id, prefill.descriptor.transfer_address, SHARED, 2.0
            )
            request = replace(message.request, request_id="x" * 16, token_ids=LONG[::-1])
            other = replace(
                message, request=request, task=Task.LOCAL, prefix_source=source, emitted=((),)
            )
            inner("another router", other)
            seen.append(decode.attempts.by_run[other.run_id])

        decode.attempts.submit = submit
        tokens, ended = await ask(cluster, "second", TAIL)
        del decode.attempts.submit
        await asyncio.sleep(3.0)
        [attempt] = seen
        answered = attempt.ended, len(attempt.logs[0].tokens)
        decode.attempts.cancel(attempt.run_id, attempt.epoch)
        return tokens, ended, answered

    tokens, ended, (other, num_tokens) = fetching(scenario, prefill=1)
    assert ended.error is None and ended.timing.attempts == ("0:pd:ok",)
    assert tokens == plain(TAIL)
    assert other.error is None and num_tokens > 0, "it is computed"
