"""One order for blocks, budget and places, and overtaking that is bounded both ways."""

import pytest
from support.stepping import SMALL, Engine, hand_over, lengths, request

from core.types import GenerateRequest, SamplingParams
from engine.scheduling.block_supply import MAX_OVERTAKEN
from engine.scheduling.order import ArrivalOrder
from engine.scheduling.sequence import Status
from engine.scheduling.step_budget import MIN_STEP_TOKENS
from simulation.wait_reasons import WaitReason, wait_reason_of

# --- budget ---------------------------------------------------------------------------------------


def test_small_prompts_behind_a_giant_are_in_the_next_step():
    engine = Engine(num_blocks=600, budget=64, max_len=2000, cache=False)
    engine.submit(request("giant", [1] * 1600, **SMALL))
    engine.step()
    for i in range(3):
        engine.submit(request(f"small{i}", [2 + i] * 8, **SMALL))
    engine.step()
    assert {name for name, _ in engine.tokens} == {"small0", "small1", "small2"}


def test_a_giant_has_half_of_the_budget_however_many_come_after_it():
    engine = Engine(num_blocks=600, budget=64, max_sequences=64, max_len=2000, cache=False)
    giant = engine.submit(request("giant", [1] * 1600, max_tokens=1))
    for step in range(50):
        for i in range(8):
            engine.submit(request(f"small{step}-{i}", [2] * 16, max_tokens=1))
        plan = engine.step()
        assert lengths(plan)[giant.key] >= 32
    assert ("giant", 0) in engine.tokens


def test_what_those_behind_do_not_need_is_the_giants():
    engine = Engine(num_blocks=600, budget=64, max_len=2000, cache=False)
    giant = engine.submit(request("giant", [1] * 1600, **SMALL))
    small = engine.submit(request("small", [2] * 8, **SMALL))
    assert lengths(engine.step()) == {giant.key: 56, small.key: 8}


def test_behind_a_giant_the_shortest_goes_first():
    engine = Engine(num_blocks=600, budget=64, max_len=2000, cache=False)
    giant = engine.submit(request("giant", [1] * 1600, **SMALL))
    engine.submit(request("middle", [2] * 100, **SMALL))
    small = engine.submit(request("small", [3] * 20, **SMALL))
    plan = lengths(engine.step())
    assert plan[small.key] == 20 and plan[giant.key] == 32 and sum(plan.values()) == 64


def test_running_answers_come_before_any_prompt():
    engine = Engine(num_blocks=600, budget=8, max_sequences=16, max_len=2000, cache=False)
    young = []
    engine.submit(request("giant", [1] * 1000, max_tokens=1))
    for i in range(4):
        young.append(engine.submit(request(f"y{i}", [2 + i], max_tokens=50, ignore_eos=True)))
        engine.step()
    plan = lengths(engine.step())
    assert all(plan[s.key] == 1 for s in young)


def test_a_prompt_goes_on_beside_as_many_answers_as_may_run_however_long_steps_are():
    engine = Engine(budget=512, max_sequences=32, cache=False)
    for i in range(31):
        engine.submit(request(f"a{i}", [1], max_tokens=50, ignore_eos=True))
    engine.step()
    prompt = engine.submit(request("prompt", [2] * 100, max_tokens=1))
    engine.scheduler.budget.fit(32, 600.0)
    assert lengths(engine.step())[prompt.key] >= MIN_STEP_TOKENS


# --- blocks ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_passed_a_bounded_number_of_times_and_then_blocks_are_kept_for_it():
    engine = Engine(num_blocks=20, block=4, cache=False)
    reserved = []

    def take():
        reserved.extend(e.sequence for e in engine.scheduler.take_events())

    hog = engine.arrive(request("hog", [1] * 20, max_tokens=40))
    giant = engine.arrive(request("giant", [2] * 60, max_tokens=8))
    take()
    assert reserved == [hog] and giant.status is Status.RESERVING
    for i in range(2 * MAX_OVERTAKEN):
        small = engine.arrive(request(f"small{i}", [3] * 4, max_tokens=4))
        if small.status is Status.ARRIVING:
            engine.scheduler.cancel(small)
    take()
    assert len(reserved) == 1 + MAX_OVERTAKEN and giant.num_overtaken == MAX_OVERTAKEN
    assert wait_reason_of(engine.scheduler, giant) is WaitReason.BLOCKS
    assert wait_reason_of(engine.scheduler, small) is WaitReason.ORDER
    engine.scheduler.cancel(hog)
    engine.scheduler.reserve_in_turn(0.0)
    take()
    assert reserved[1 + MAX_OVERTAKEN] is giant, "what came free went to it first"


def test_an_arrival_has_its_place_from_its_reservation_on():
    engine = Engine(block=4, max_sequences=3, cache=False)
    running = engine.submit(request("running", [1] * 4, **SMALL))
    engine.step()
    arriving = [engine.arrive(request(f"a{i}", [2 + i] * 4, **SMALL)) for i in range(3)]
    prompt = engine.submit(request("prompt", [9] * 4, **SMALL))
    assert [s.status for s in arriving] == [Status.ARRIVING, Status.ARRIVING, Status.RESERVING]
    assert wait_reason_of(engine.scheduler, arriving[2]) is WaitReason.PLACE
    assert wait_reason_of(engine.scheduler, prompt) is WaitReason.PLACE
    engine.step()
    assert running.is_finished and prompt.status is Status.WAITING
    engine.scheduler.plan(0.0)
    assert arriving[2].status is Status.ARRIVING, "the first of the line has what came free"
    assert prompt.status is Status.WAITING


def test_room_beside_what_is_kept_is_not_held_back():
    engine = Engine(num_blocks=40, block=4, cache=False, max_len=200)
    engine.arrive(request("hog", [1] * 60, max_tokens=40))
    giant = engine.arrive(request("giant", [2] * 100, max_tokens=8))
    giant.num_overtaken = MAX_OVERTAKEN
    assert engine.pool.num_available == 24 and giant.status is Status.RESERVING
    small = engine.arrive(request("small", [3] * 4, max_tokens=4))
    assert small.status is Status.RESERVING, "the giant needs 26 of the 24"
    giant.num_overtaken = MAX_OVERTAKEN - 1
    engine.scheduler.reserve_in_turn(0.0)
    assert small.status is Status.ARRIVING and giant.num_overtaken == MAX_OVERTAKEN


# --- places ---------------------------------------------------------------------------------------


def test_age_travels_so_a_request_tried_again_keeps_its_place():
    engine = Engine(budget=4, cache=False)
    for name, age_s in (("young", 1.0), ("old", 9.0), ("new", 0.0)):
        sequence = engine.scheduler.new_sequence(
            request(name, [1] * 4, max_tokens=1), 1, (0,), (), 100.0, age_s=age_s
        )
        engine.scheduler.submit(sequence)
    order = []
    while engine.scheduler.has_work:
        engine.step()
        order += [name for name, _ in engine.tokens if name not in order]
    assert order == ["old", "young", "new"]


def test_a_tier_that_stands_back_ages():
    order = ArrivalOrder({"batch": 60.0})

    def due_at(tier, arrived_at):
        wish = GenerateRequest("r", "m", (1,), SamplingParams(), 5, 0.0, tier=tier)
        return order.due_at(wish, arrived_at)

    assert due_at("batch", 0.0) > due_at("standard", 59.0)
    assert due_at("batch", 0.0) < due_at("standard", 61.0)


@pytest.mark.parametrize("max_sequences", [2, 8])
def test_a_prompt_behind_a_giant_is_passed_by_shorter_ones_a_bounded_number_of_times(
    max_sequences,
):
    engine = Engine(
        num_blocks=900, budget=32, max_sequences=max_sequences, max_len=4000, cache=False
    )
    giant = engine.submit(request("giant", [1] * 3000, max_tokens=1))
    engine.step()
    engine.submit(request("next", [2] * 16, max_tokens=1))
    for i in range(2 * MAX_OVERTAKEN):
        engine.submit(request(f"short{i}", [3] * 8, max_tokens=1))
        if i % 2:
            engine.step()
    while len(engine.tokens) <= MAX_OVERTAKEN:
        engine.step()
    names = [name for name, _ in engine.tokens]
    assert names.index("next") == MAX_OVERTAKEN and giant.status is Status.RUNNING


def test_a_prompt_under_way_behind_a_giant_is_passed_a_bounded_number_of_times_for_each_part():
    engine = Engine(num_blocks=900, budget=32, max_sequences=64, max_len=3400, cache=False)
    giant = engine.submit(request("giant", [1] * 3000, max_tokens=1))
    engine.step()
    engine.submit(request("next", [2] * 64, max_tokens=1))
    while ("next", 0) not in engine.tokens:
        for i in range(3):
            engine.submit(request(f"short{engine.num_steps}-{i}", [3] * 8, max_tokens=1))
        engine.step()
    assert giant.status is Status.RUNNING
    num_short = len(engine.tokens) - 1
    assert 3 * MAX_OVERTAKEN < num_short <= 4 * MAX_OVERTAKEN, "sixteen tokens at a time"


def test_an_arrival_does_not_take_the_place_that_an_older_prompt_gets_with_the_next_step():
    engine = Engine(num_blocks=90, max_sequences=2)
    engine.submit(request("running", [1] * 4, max_tokens=50, ignore_eos=True))
    engine.step()
    older = engine.submit(request("older", [2] * 4, max_tokens=50, ignore_eos=True))
    arrival = engine.arrive(request("arrival", [3] * 4, max_tokens=4))
    assert arrival.status is Status.RESERVING
    engine.step()
    assert older.status is Status.RUNNING and arrival.status is Status.RESERVING


@pytest.mark.parametrize(("num_blocks", "max_sequences"), [(90, 16), (900, 3)])
def test_room_kept_for_one_that_has_no_budget_yet_is_lent_to_smaller_ones(
    num_blocks, max_sequences
):
    sizes = {"num_blocks": num_blocks, "max_sequences": max_sequences, "max_len": 400, "block": 8}
    engine = Engine(budget=16, cache=False, **sizes)
    engine.submit(request("oldest", [1] * 200, max_tokens=1))
    engine.submit(request("second", [2] * 200, max_tokens=1))
    engine.step()
    third = engine.submit(request("third", [3] * 300, max_tokens=1))
    for i in range(5):
        engine.submit(request(f"small{i}", [4] * 8, max_tokens=1))
    for _ in range(5):
        engine.step()
    assert [name for name, _ in engine.tokens] == [f"small{i}" for i in range(5)]
    assert third.status is Status.WAITING and third.num_overtaken == 5


def test_room_kept_for_one_that_has_no_budget_yet_is_lent_to_arrivals():
    engine = Engine(num_blocks=900, budget=16, max_sequences=3, max_len=400, cache=False)
    engine.submit(request("oldest", [1] * 200, max_tokens=1))
    engine.submit(request("second", [2] * 200, max_tokens=1))
    engine.step()
    third = engine.submit(request("third", [3] * 300, max_tokens=1))
    arrival = engine.arrive(request("arrival", [4] * 8, max_tokens=1))
    assert arrival.status is Status.RESERVING, "the third may be part of the next step"
    engine.step()
    assert arrival.status is Status.ARRIVING
    assert third.status is Status.WAITING and third.num_overtaken == 1


def test_nobody_runs_beside_one_that_must_run_alone_once_it_was_passed_often_enough():
    engine = Engine(num_blocks=60, block=4, cache=False)
    engine.submit(request("running", [1] * 4, max_tokens=50, ignore_eos=True))
    engine.step()
    lonely = engine.scheduler.new_sequence(request("lonely", [2] * 4), 1, (0,), (), 0.0)
    lonely.run_alone = True
    engine.scheduler.submit(lonely)
    for i in range(MAX_OVERTAKEN):
        arrival = engine.arrive(request(f"a{i}", [3] * 4, max_tokens=4))
        assert arrival.status is Status.ARRIVING
        engine.scheduler.cancel(arrival)
    late = engine.arrive(request("late", [3] * 4, max_tokens=4))
    assert late.status is Status.RESERVING and engine.pool.num_available > 50
    engine.step()
    assert late.status is Status.RESERVING and lonely.status is Status.WAITING


def test_an_arrival_does_not_go_before_an_older_one_that_can_run_alone_with_the_next_step():
    """Each arrival would be counted by nobody, and the next one stands in line before it ends."""
    engine = Engine(num_blocks=60, block=4, cache=False)
    lonely = engine.scheduler.new_sequence(request("lonely", [2] * 4), 1, (0,), (), 0.0)
    lonely.run_alone = True
    engine.scheduler.submit(lonely)
    late = engine.arrive(request("late", [3] * 4, max_tokens=4), now_s=1.0)
    assert late.status is Status.RESERVING and engine.pool.num_available == 60
    assert lengths(engine.step()) == {lonely.key: 4}
    engine.scheduler.cancel(lonely)
    engine.step()
    assert late.status is Status.ARRIVING


# --- hand-overs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_waiting", [10, 2000])
def test_a_plan_looks_only_at_those_it_can_move(num_waiting, monkeypatch):
    """The number of sequences that a step asks about its blocks does not grow with the queue."""
    engine = Engine(num_blocks=40, budget=16, max_sequences=4, cache=False)
    for i in range(num_waiting):
        hand_over(engine, f"h{i}", f"partner{i % 2}")
        engine.submit(request(f"l{i}", [1] * 40, **SMALL))
    asked = []
    num_needed = engine.scheduler.blocks.num_needed
    monkeypatch.setattr(
        engine.scheduler.blocks,
        "num_needed",
        lambda s, num_kept=0: (asked.append(s), num_needed(s, num_kept))[1],
    )
    engine.scheduler.plan(0.0)
    assert 0 < len(asked) <= 80
