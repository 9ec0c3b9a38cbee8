"""Every admitted sequence ends, with the same tokens, whatever the budget,
the pool and the order."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stepping import Engine, request

from core.errors import InvariantViolation, PromptTooLong
from core.plan import StepResult
from core.types import FinishReason, GenerateRequest, SamplingParams
from engine.scheduling.events import Announced, BlocksReserved, Started
from engine.scheduling.sequence import Handover, Status

requests = st.lists(
    st.builds(
        dict, size=st.integers(1, 30), max_tokens=st.integers(1, 20), n=st.integers(1, 3),
        temperature=st.sampled_from([0.0, 1.0]), shared=st.booleans(),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    wishes=requests,
    budget=st.integers(1, 40),
    num_blocks=st.integers(18, 40),
    block=st.sampled_from([2, 4, 8]),
    cache=st.booleans(),
)
def test_tokens_do_not_depend_on_budget_pool_block_size_or_cache(
    wishes, budget, num_blocks, block, cache
):
    rng = random.Random(1)
    load = []
    for i, w in enumerate(wishes):
        prompt = [rng.randrange(50) for _ in range(w["size"])]
        if w["shared"]:
            prompt = [7] * 10 + prompt
        load.append(
            request(
                f"r{i}", prompt, max_tokens=w["max_tokens"], n=w["n"], temperature=w["temperature"]
            )
        )
    oracle = {}
    for r in load:
        engine = Engine(num_blocks=400, budget=400)
        engine.submit(r)
        oracle |= engine.run()
    engine = Engine(num_blocks * 8 // block, budget, block, cache=cache)
    for r in load:
        engine.submit(r)
    assert engine.run() == oracle


def test_a_small_pool_preempts_and_everything_still_ends_exactly():
    load = [request(f"r{i}", [i + 1] * 9, max_tokens=24) for i in range(6)]
    roomy, tight = Engine(num_blocks=400), Engine(num_blocks=12)
    for engine in (roomy, tight):
        for r in load:
            engine.submit(r)
        engine.run()
    assert roomy.scheduler.num_preemptions == 0
    assert tight.scheduler.num_preemptions > 0
    assert tight.tokens == roomy.tokens


def test_decode_goes_first_and_prompts_fill_the_budget():
    engine = Engine(budget=10)
    engine.submit(request("a", [1] * 5, max_tokens=20))
    engine.step()
    engine.submit(request("b", [2] * 30, max_tokens=2))
    plan = engine.step()
    assert [len(i.token_ids) for i in plan.items] == [1, 9]


def test_a_second_request_hits_the_prefix_of_the_first_but_recomputes_the_last_token():
    engine = Engine()
    engine.submit(request("a", range(16), max_tokens=2))
    engine.run()
    again = engine.submit(request("b", range(16), max_tokens=2))
    plan = engine.step()
    assert again.num_prefix_hit_tokens == 12
    assert [len(i.token_ids) for i in plan.items] == [4]
    engine.run()
    assert engine.tokens["a", 0] == engine.tokens["b", 0]


def test_without_a_cache_nothing_is_kept_and_nothing_is_found():
    engine = Engine(cache=False)
    engine.submit(request("a", range(16), max_tokens=2))
    engine.run()
    assert (engine.pool.num_cached, engine.pool.num_free) == (0, engine.pool.num_blocks)
    again = engine.submit(request("b", range(16), max_tokens=2))
    assert [len(i.token_ids) for i in engine.step().items] == [16]
    assert again.num_prefix_hit_tokens == 0


def test_forks_share_blocks_and_copy_on_write():
    engine = Engine()
    engine.submit(request("a", [1] * 10, n=3, temperature=1.0, max_tokens=6))
    engine.step()
    assert engine.pool.num_held == 3, "three choices share the prompt's three blocks"
    plan = engine.step()
    assert len(plan.copies) == 2, "the last owner writes in place"
    engine.run()
    assert len({tuple(t) for t in engine.tokens.values()}) > 1


def test_cancel_during_a_step_frees_blocks_at_its_commit():
    engine = Engine()
    sequence = engine.submit(request("a", [1] * 10))
    plan = engine.scheduler.plan(0.0)
    engine.scheduler.cancel(sequence)
    assert engine.pool.num_held == 3, "the executing plan still writes there"
    assert (
        engine.scheduler.commit(plan, asyncio.run(engine.model.execute(plan, lambda *_: None)), 0.0)
        == []
    )
    assert engine.pool.num_held == 0
    engine.scheduler.cancel(sequence)


@pytest.mark.parametrize("steps", range(6))
def test_cancel_at_any_step_leaves_nothing(steps):
    engine = Engine(budget=4)
    sequence = engine.submit(request("a", [1] * 10, max_tokens=5, n=2))
    for _ in range(steps):
        engine.step()
    engine.scheduler.cancel(sequence)
    for other in list(engine.scheduler.running):
        engine.scheduler.cancel(other)
    assert engine.pool.num_held == 0 and not engine.scheduler.has_work


def test_a_failed_sequence_ends_alone():
    engine = Engine()
    bad = engine.submit(request("bad", [1] * 5))
    engine.submit(request("good", [2] * 5))

    def fail(plan, result):
        tokens = {k: v for k, v in result.tokens.items() if k[0] != bad.key}
        return StepResult(result.step_id, tokens, {bad.key: "nan"})

    engine.step(fail)
    engine.run()
    assert engine.failed == ["bad"] and list(engine.tokens) == [("good", 0)]


def test_what_can_never_fit_is_refused_with_numbers_before_anything_is_held():
    engine = Engine(num_blocks=10, max_len=100)
    with pytest.raises(PromptTooLong, match="is 108, the context window is 100"):
        engine.submit(request("a", [1] * 100))
    with pytest.raises(PromptTooLong, match="needs 13 blocks, the pool holds 10"):
        engine.submit(request("a", [1] * 40))
    assert engine.pool.num_held == 0


def test_reserve_is_all_or_nothing_and_pins_what_is_cached():
    engine = Engine(num_blocks=10)
    engine.submit(request("a", range(16), max_tokens=1))
    engine.run()
    wish = request("b", [*range(16), 1, 2], max_tokens=8)
    sequence = engine.arrive(wish)
    assert engine.scheduler.take_events() == [BlocksReserved(sequence, 4)]
    assert engine.pool.num_held == 6, "five for the prompt, one to grow"
    other = engine.arrive(request("c", [9] * 24, max_tokens=8))
    assert other.status is Status.RESERVING and engine.pool.num_held == 6
    engine.scheduler.cancel(sequence)
    assert engine.pool.num_held == 0
    engine.scheduler.reserve_in_turn(0.0)
    assert engine.scheduler.take_events() == [BlocksReserved(other, 0)]
    with pytest.raises(InvariantViolation, match="arriving and enters once more"):
        engine.scheduler.submit_arrival(other)
    assert engine.pool.num_held == 7


def test_a_hand_over_waits_for_its_partner_unless_the_pool_is_roomy():
    engine = Engine(num_blocks=20)
    small = engine.scheduler.new_sequence(
        request("small", [1] * 8), 1, (0,), (), 0.0, handover=Handover()
    )
    large = engine.scheduler.new_sequence(
        request("large", [2] * 48), 1, (0,), (), 0.0, handover=Handover()
    )
    for sequence in (small, large):
        engine.scheduler.submit(sequence)
    plan = engine.scheduler.plan(0.0)
    assert engine.scheduler.take_events() == [Announced(small), Announced(large), Started(small)]
    assert [i.sequence_key for i in plan.items] == [small.key]
    engine.scheduler.partnered(large, 0)
    engine.scheduler.commit(plan, asyncio.run(engine.model.execute(plan, lambda *_: None)), 0.0)
    assert [i.sequence_key for i in engine.scheduler.plan(0.0).items] == [large.key]


def test_what_arrived_in_memory_that_is_gone_is_not_taken_in_by_new_ranks():
    engine = Engine()
    first = engine.arrive(request("first", [1] * 8))
    engine.scheduler.attach(first, engine.drawn(7, first), 0.0)
    engine.scheduler.fail_all()
    engine.submit(request("second", [2] * 8))
    plan = engine.scheduler.plan(0.0)
    assert plan.items and plan.arrived == () and plan.released == ()


def test_a_result_of_another_step_is_an_invariant_violation():
    engine = Engine()
    engine.submit(request("a", [1]))
    plan = engine.scheduler.plan(0.0)
    with pytest.raises(InvariantViolation, match="result of step 99"):
        engine.scheduler.commit(plan, StepResult(99), 0.0)


def test_run_alone_runs_alone():
    engine = Engine()
    engine.submit(request("a", [1] * 4, max_tokens=3))
    lonely = engine.scheduler.new_sequence(request("b", [2] * 4, max_tokens=2), 1, (0,), (), 0.0)
    lonely.run_alone = True
    engine.scheduler.submit(lonely)
    engine.submit(request("c", [3] * 4, max_tokens=3))
    while engine.scheduler.has_work:
        plan = engine.step()
        keys = {i.sequence_key for i in plan.items}
        assert len(keys) == 1 or lonely.key not in keys
    assert len(engine.tokens) == 3


def test_length_and_stop_finish_reasons():
    engine = Engine()
    engine.submit(request("a", [1] * 4, max_tokens=3, ignore_eos=True))
    engine.run()
    assert engine.finish["a", 0] is FinishReason.LENGTH
    token = engine.tokens["a", 0][1]
    engine.submit(request("b", [1] * 4, max_tokens=3, ignore_eos=True, stop_token_ids=(token,)))
    engine.run()
    assert engine.finish["b", 0] is FinishReason.STOP
    assert engine.tokens["b", 0] == engine.tokens["a", 0][: engine.tokens["a", 0].index(token) + 1]


def test_long_steps_shrink_the_budget_and_short_full_ones_grow_it_back():
    engine = Engine(budget=512)
    scheduler = engine.scheduler
    scheduler.budget.fit(512, 1.6)
    assert scheduler.budget.num_tokens == 128
    scheduler.budget.fit(100, 0.1)
    assert scheduler.budget.num_tokens == 128, "a step that was not full proves nothing"
    scheduler.budget.fit(128, 0.1)
    scheduler.budget.fit(256, 0.1)
    scheduler.budget.fit(512, 0.1)
    assert scheduler.budget.num_tokens == 512
    scheduler.budget.fit(4, 60.0)
    assert scheduler.budget.num_tokens == 24, "eight places and sixteen tokens of a prompt"
    engine.submit(request("a", [1] * 40, max_tokens=1))
    assert [len(i.token_ids) for i in engine.step().items] == [24]


def test_prompt_scores_that_a_preemption_interrupts_are_there_once():
    def scores(interrupts):
        engine = Engine(budget=8)
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
        sequence = engine.submit(GenerateRequest("r", "m", tuple(range(1, 21)), sampling, 1, 0.0))
        engine.step()
        assert len(sequence.prompt_logprobs) == 8
        if interrupts:
            engine.scheduler.preempt(sequence)
        engine.run()
        return sequence.prompt_logprobs

    assert scores(interrupts=True) == scores(interrupts=False)
    assert [s.token_id for s in scores(interrupts=True)] == list(range(2, 21))


def test_who_was_due_before_has_overtaken_nobody():
    engine = Engine(num_blocks=900, budget=8, max_len=3400, cache=False)

    def submit(name, size, due_s):
        sequence = engine.scheduler.new_sequence(
            request(name, [1] * size, max_tokens=1), 1, (0,), (), due_s
        )
        engine.scheduler.submit(sequence)
        return sequence

    submit("giant", 3000, 0.0)
    long = submit("long", 60, 10.0)
    engine.step()
    found = []
    for name, due_s in (("older", 5.0), ("younger", 20.0)):
        passing = submit(name, 4, due_s)
        assert passing.key in {item.sequence_key for item in engine.step().items}
        found.append((long.status, long.num_overtaken))
    assert found == [(Status.RUNNING, 0), (Status.RUNNING, 1)]
