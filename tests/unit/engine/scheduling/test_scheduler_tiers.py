"""Tiers in one engine: who gives way to whom, within a step, and for how long."""

import pytest
from support.stepping import Engine, request

from engine.scheduling.block_supply import MAX_OVERTAKEN
from engine.scheduling.order import ArrivalOrder
from engine.scheduling.queues import MAX_READY, MAX_UNANSWERED
from engine.scheduling.sequence import Handover, Status

DELAY_S = 60.0
LONG = {"max_tokens": 50, "ignore_eos": True}


def engine_of(**sizes):
    return Engine(cache=False, order=ArrivalOrder({"low": DELAY_S}), **sizes)


def lengths(plan):
    return {i.sequence_key: len(i.token_ids) for i in plan.items}


# --- budget ---------------------------------------------------------------------------------------


def test_a_prompt_under_way_holds_nothing_of_the_next_step_from_a_higher_tier():
    engine = engine_of(num_blocks=900, budget=64, max_len=3000)
    low = engine.submit(request("low", [1] * 1600, "low"))
    assert lengths(engine.step()) == {low.key: 64}
    high = engine.submit(request("high", [2] * 100, "high"))
    assert lengths(engine.step()) == {high.key: 64}
    assert lengths(engine.step()) == {high.key: 36, low.key: 28}, "and has what the other leaves"


def test_a_long_prompt_shares_with_its_own_tier_before_a_lower_one():
    engine = engine_of(num_blocks=900, budget=64, max_len=3000)
    low = engine.submit(request("low", [1] * 8, "low"))
    giant = engine.submit(request("giant", [2] * 1600, "high"))
    small = engine.submit(request("small", [3] * 8, "high"))
    assert lengths(engine.step()) == {giant.key: 56, small.key: 8}
    assert low.status is Status.WAITING


def test_who_has_waited_its_delay_stands_level():
    engine = engine_of(num_blocks=900, budget=64, max_len=3000)
    old = engine.submit(request("old", [1] * 1600, "low"), age_s=DELAY_S + 1)
    level = engine.submit(request("level", [2] * 8, "low"), age_s=DELAY_S)
    high = engine.submit(request("high", [3] * 1600, "high"))
    assert lengths(engine.step()) == {old.key: 32, level.key: 8, high.key: 24}


def test_who_has_waited_its_delay_shares_with_a_long_prompt_of_a_higher_tier():
    engine = engine_of(num_blocks=900, budget=64, max_len=3000)
    giant = engine.submit(request("giant", [1] * 1600, "high"), age_s=5.0)
    level = engine.submit(request("level", [2] * 8, "low"), age_s=DELAY_S)
    young = engine.submit(request("young", [3] * 8, "low"), age_s=DELAY_S - 1)
    assert lengths(engine.step()) == {giant.key: 56, level.key: 8}
    assert young.status is Status.WAITING


def test_prompts_of_a_lower_tier_end_though_higher_ones_keep_coming():
    engine = engine_of(num_blocks=900, budget=32, max_len=3000)
    engine.submit(request("low", [1] * 200, "low", max_tokens=1), age_s=DELAY_S)
    for number in range(20):
        engine.submit(request(f"high{number}", [2] * 64, "high", max_tokens=1))
        engine.step()
    assert ("low", 0) in engine.tokens


# --- blocks and places ----------------------------------------------------------------------------


def test_running_answers_of_a_lower_tier_give_their_blocks_the_youngest_first():
    engine = engine_of(num_blocks=30, block=4)
    low = [engine.submit(request(f"low{i}", [1] * 36, "low", **LONG)) for i in range(3)]
    engine.run_to(lambda: all(s.num_output_tokens for s in low))
    high = engine.submit(request("high", [2] * 40, "high", max_tokens=2))
    plan = engine.step()
    assert high.key in lengths(plan)
    assert [s.status for s in low] == [Status.RUNNING, Status.RUNNING, Status.WAITING]
    tokens = engine.run()
    assert all(len(tokens[f"low{i}", 0]) == 50 for i in range(3)), "they go on where they were"


@pytest.mark.parametrize("arrives", [False, True])
def test_a_place_is_given_up_within_a_step(arrives):
    engine = engine_of(num_blocks=90, max_sequences=2)
    low = [engine.submit(request(f"low{i}", [1] * 4, "low", **LONG)) for i in range(2)]
    engine.step()
    if arrives:
        high = engine.arrive(request("high", [2] * 4, "high"))
        assert high.status is Status.RESERVING
    else:
        high = engine.submit(request("high", [2] * 4, "high"))
    engine.step()
    assert high.status is (Status.ARRIVING if arrives else Status.RUNNING)
    assert [s.status for s in low] == [Status.RUNNING, Status.WAITING]


def test_nothing_is_taken_from_the_own_tier_from_those_that_are_due_or_in_vain():
    engine = engine_of(num_blocks=30, block=4)
    engine.submit(request("old", [1] * 36, "low", **LONG), age_s=DELAY_S + 1)
    engine.submit(request("same", [1] * 36, "high", **LONG))
    engine.submit(request("young", [1] * 12, "low", **LONG))
    engine.step()
    engine.submit(request("high", [2] * 80, "high", max_tokens=2))
    engine.step()
    assert engine.scheduler.num_preemptions == 0, "without old and same, 80 tokens do not fit"
    fits = engine.submit(request("fits", [2] * 36, "high", max_tokens=2))
    engine.step()
    assert engine.scheduler.num_preemptions == 1 and fits.status is Status.RUNNING


def test_who_gave_way_is_passed_only_by_those_that_are_due_before_it():
    engine = engine_of(num_blocks=30, block=4, max_sequences=8)
    low = engine.submit(request("low", [1] * 60, "low", max_tokens=40, ignore_eos=True))
    engine.run_to(lambda: low.num_output_tokens > 2)
    engine.submit(request("high", [2] * 60, "high", max_tokens=30, ignore_eos=True))
    engine.step()
    assert low.status is Status.WAITING
    while ("high", 0) not in engine.finish:
        engine.submit(request(f"later{engine.num_steps}", [3] * 4, "low", max_tokens=1))
        engine.step()
    assert low.status is Status.WAITING
    assert sum(name.startswith("later") for name, _ in engine.tokens) == MAX_OVERTAKEN
    engine.step()
    assert low.status is Status.RUNNING
    engine.run()


# --- hand-overs -----------------------------------------------------------------------------------


def hand_over(engine, name, tier):
    made = request(name, [1] * 40, tier, max_tokens=2)
    sequence = engine.scheduler.new_sequence(made, 1, (0,), (), 0.0, handover=Handover("partner"))
    engine.scheduler.submit(sequence)
    return sequence


def test_unanswered_announcements_of_a_lower_tier_hold_up_no_higher_one():
    engine = engine_of(num_blocks=90)
    low = [hand_over(engine, f"low{i}", "low") for i in range(2 * MAX_UNANSWERED)]
    high = [hand_over(engine, f"high{i}", "high") for i in range(2 * MAX_UNANSWERED)]
    for line in (low, high):
        announced = [s.handover.is_announced for s in line]
        assert announced == [True] * MAX_UNANSWERED + [False] * MAX_UNANSWERED


def test_many_of_a_lower_tier_that_are_ready_hold_up_no_higher_one():
    engine = engine_of(num_blocks=18, max_sequences=1)
    for number in range(2 * MAX_READY):
        low = hand_over(engine, f"low{number}", "low")
        engine.scheduler.partnered(low, 0)
    high = hand_over(engine, "high", "high")
    assert len(engine.scheduler.waiting.ready) >= MAX_READY
    assert high.handover.is_announced
