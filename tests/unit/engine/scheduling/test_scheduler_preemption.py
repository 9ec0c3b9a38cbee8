"""Who gives up blocks, to whom, and when they are anybody's."""

import asyncio

import pytest
from support.stepping import Engine, hand_over, request

from engine.scheduling.events import Announced, Preempted, Started
from engine.scheduling.sequence import Status
from simulation.wait_reasons import WaitReason, wait_reason_of


def test_an_answer_that_lost_its_blocks_goes_before_whoever_came_later():
    engine = Engine(num_blocks=12, block=4, cache=False, max_len=48)
    first = engine.arrive(request("first", [1] * 16, max_tokens=20, ignore_eos=True))
    drawn = engine.drawn(7, first)
    engine.scheduler.attach(first, drawn, 0.0)
    (answer,) = engine.scheduler.running
    later = engine.arrive(request("later", [2] * 24, max_tokens=8), now_s=1.0)
    assert later.status is Status.ARRIVING
    engine.scheduler.preempt(answer)
    latest = engine.arrive(request("latest", [3] * 4, max_tokens=4), now_s=2.0)
    assert latest.status is Status.RESERVING, "five blocks are kept for the answer, five are there"
    plan = engine.scheduler.plan(2.0)
    assert [i.sequence_key for i in plan.items] == [answer.key]


def test_nobody_yields_to_one_that_would_not_fit_all_the_same():
    engine = Engine(num_blocks=12, block=4, cache=False)
    parked = engine.scheduler.new_sequence(
        request("parked", [1] * 8, ignore_eos=True), 1, (0,), (), 0.0, credit=1
    )
    engine.scheduler.submit(parked)
    engine.step()
    hog = engine.arrive(request("hog", [2] * 24, max_tokens=4))
    assert hog.status is Status.ARRIVING and engine.pool.num_available == 3
    big = engine.arrive(request("big", [3] * 28, max_tokens=4))
    assert big.status is Status.RESERVING and parked.status is Status.RUNNING
    fits = engine.arrive(request("fits", [4] * 16, max_tokens=4))
    assert fits.status is Status.ARRIVING and parked.status is Status.WAITING


def test_a_block_that_the_running_step_copies_from_is_given_to_nobody():
    """Its last holder lost it in the very plan that copies: the ranks have yet to read it."""
    engine = Engine(num_blocks=8, block=4, cache=False)
    engine.submit(request("pair", [1] * 6, n=2, temperature=1.0, max_tokens=4, ignore_eos=True))
    engine.step()
    first, second = engine.scheduler.running
    assert first.block_table == second.block_table
    take = engine.scheduler.blocks.take
    make_writable = engine.scheduler.blocks.make_writable

    def loses_the_other(sequence, *rest):
        is_writable = make_writable(sequence, *rest)
        if sequence is first:
            engine.scheduler.preempt(second)
        return is_writable

    engine.scheduler.blocks.make_writable = loses_the_other
    engine.scheduler.blocks.take = lambda sequence: None
    plan = engine.scheduler.plan(0.0)
    engine.scheduler.blocks.take = take
    ((source, _),) = plan.copies
    assert engine.pool.references(source) == 0
    arrival = engine.arrive(request("arrival", [3] * 4, max_tokens=4))
    assert arrival.status is Status.RESERVING
    result = asyncio.run(engine.model.execute(plan, lambda *_: None))
    engine.scheduler.commit(plan, result, 0.0)
    engine.scheduler.reserve_in_turn(0.0)
    assert arrival.status is Status.ARRIVING


def test_blocks_given_up_by_one_that_cannot_go_on_are_handed_out_in_the_same_plan():
    """Nothing runs afterwards, so nobody would come to hand them out later."""
    engine = Engine(num_blocks=10, block=4, cache=False, max_len=40)
    first = engine.arrive(request("first", [1] * 16, max_tokens=20, ignore_eos=True))
    engine.scheduler.attach(first, engine.drawn(7, first), 0.0)
    engine.arrive(request("later", [2] * 12, max_tokens=8))
    small = engine.arrive(request("small", [3] * 8, max_tokens=4))
    assert small.status is Status.RESERVING and engine.pool.num_available == 1
    while (plan := engine.scheduler.plan(0.0)).items:
        result = asyncio.run(engine.model.execute(plan, lambda *_: None))
        engine.scheduler.commit(plan, result, 0.0)
    assert not engine.scheduler.running and engine.scheduler.num_preemptions == 1
    assert small.status is Status.ARRIVING


def test_the_youngest_by_arrival_gives_its_blocks_also_after_it_came_back():
    engine = Engine(num_blocks=8, block=4, cache=False, max_len=40)
    old, young = (
        engine.submit(request(name, [i + 1] * 14, max_tokens=8, ignore_eos=True))
        for i, name in enumerate(("old", "young"))
    )
    engine.step()
    engine.scheduler.preempt(old)
    engine.step()
    assert set(engine.scheduler.running) == {old, young}
    while not engine.scheduler.num_preemptions > 1:
        engine.step()
    assert young.status is Status.WAITING and old.status is Status.RUNNING


@pytest.mark.parametrize("is_read", [True, False])
def test_blocks_that_a_transfer_may_read_stay_pinned_when_their_sequence_loses_them(is_read):
    engine = Engine(num_blocks=40, cache=False)
    sequence = hand_over(engine, "a", "partner", size=10)
    engine.step()
    assert engine.scheduler.take_events() == [Announced(sequence), Started(sequence)]
    sequence.handover.is_read = is_read
    table = tuple(sequence.block_table)
    engine.scheduler.preempt(sequence)
    [event] = engine.scheduler.take_events()
    assert event == Preempted(sequence, table if is_read else ())
    assert engine.pool.num_held == len(event.pins) and sequence.block_table == []
    engine.scheduler.tables.unpin(list(event.pins))
    assert engine.pool.num_held == 0
    sequence.handover.ran_ahead = False
    engine.scheduler.plan(0.0)
    engine.scheduler.preempt(sequence)
    assert engine.scheduler.take_events() == [], "nobody has heard of that start"


def test_only_hand_overs_and_arrivals_make_events():
    engine = Engine(cache=False)
    sequence = engine.submit(request("a", [1] * 10))
    engine.step()
    engine.scheduler.preempt(sequence)
    engine.step()
    assert engine.scheduler.take_events() == []


def test_blocks_of_one_cancelled_in_a_step_are_nobody_elses_before_its_end():
    """A running step may still copy from them, also where the cancelled one is not in it."""
    engine = Engine(num_blocks=12, block=4, cache=False)
    parked = engine.scheduler.new_sequence(request("parked", [1] * 8), 1, (0,), (), 0.0, credit=1)
    engine.scheduler.submit(parked)
    engine.submit(request("busy", [2] * 8, max_tokens=20))
    engine.step()
    plan = engine.scheduler.plan(0.0)
    assert parked.key not in {i.sequence_key for i in plan.items}
    engine.scheduler.cancel(parked)
    held = engine.pool.num_held
    arrival = engine.arrive(request("arrival", [3] * 32, max_tokens=8))
    assert arrival.status is Status.RESERVING and engine.pool.num_held == held
    engine.scheduler.commit(plan, asyncio.run(engine.model.execute(plan, lambda *_: None)), 0.0)
    engine.scheduler.reserve_in_turn(0.0)
    assert arrival.status is Status.ARRIVING


def test_a_parked_answer_yields_its_blocks_to_an_arrival_but_not_in_the_midst_of_a_step():
    engine = Engine(num_blocks=8, block=4, cache=False)
    parked = engine.scheduler.new_sequence(
        request("parked", [1] * 16, ignore_eos=True), 1, (0,), (), 0.0, credit=1
    )
    engine.scheduler.submit(parked)
    engine.step()
    arrival = engine.arrive(request("arrival", [3] * 20, max_tokens=4))
    assert arrival.status is Status.ARRIVING and parked.status is Status.WAITING
    assert wait_reason_of(engine.scheduler, parked) is WaitReason.CREDIT
    engine.scheduler.cancel(arrival)
    assert engine.scheduler.plan(0.0).items == ()
    engine.scheduler.credit(parked, 3)
    engine.step()
    engine.step()
    assert len(engine.tokens["parked", 0]) == 3
    assert wait_reason_of(engine.scheduler, parked) is WaitReason.CREDIT


# --- hand-overs -----------------------------------------------------------------------------------
