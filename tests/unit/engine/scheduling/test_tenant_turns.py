"""Tenants of one tier in one engine: who has few sequences passes those of who has many."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stepping import SMALL, Engine, lengths, request

from core.scopes import scope_of
from engine.scheduling.order import ArrivalOrder
from engine.scheduling.sequence import Status

PROMPT = [1] * 8
LONG = {"max_tokens": 50, "ignore_eos": True}


def of(tenant, name, tier="standard", prompt=PROMPT, **sampling):
    sampling = sampling or SMALL
    return replace(request(name, prompt, tier, **sampling), scope=scope_of(tenant, ""))


def engine_of(**sizes):
    weights = {"standard": {"heavy": 3.0, "vast": 1000.0}}
    return Engine(cache=False, order=ArrivalOrder({"low": 60.0}, weights), **sizes)


def names(engine):
    return [s.request.request_id for s in engine.scheduler.waiting.ready]


def test_a_newcomer_goes_before_anothers_second():
    engine = engine_of()
    for number in range(4):
        engine.submit(of("a", f"a{number}"))
    engine.submit(of("b", "b0"))
    engine.submit(of("c", "c0"))
    engine.submit(of("b", "b1"))
    assert names(engine) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_who_goes_before_the_same_one_keeps_the_order_of_coming():
    """Fourth and fifth come between a place and the one that moved up to it."""
    engine = engine_of()
    for name in ("a0", "a1", "a2", "b0", "b1", "c0", "d0"):
        engine.submit(of(name[0], name))
    assert names(engine) == ["a0", "b0", "c0", "d0", "a1", "b1", "a2"]


def test_what_runs_counts_so_that_one_at_a_time_is_no_way_to_more_turns():
    engine = engine_of(max_sequences=2)
    running = [engine.submit(of("b", f"b{n}", **LONG)) for n in range(2)]
    engine.run_to(lambda: all(s.status is Status.RUNNING for s in running))
    for name in ("a0", "a1", "a2", "a3", "b2"):
        engine.submit(of(name[0], name))
    assert names(engine) == ["a0", "a1", "a2", "b2", "a3"]


def test_what_has_ended_counts_no_more():
    engine = engine_of()
    engine.submit(of("b", "b0"))
    engine.submit(of("b", "b1", n=2, **SMALL))
    waiting = engine.submit(of("b", "b2"))
    engine.scheduler.cancel(waiting)
    engine.scheduler.cancel(waiting)
    engine.run()
    for name in ("a0", "a1", "b3"):
        engine.submit(of(name[0], name))
    assert names(engine) == ["a0", "b3", "a1"]


def test_what_has_ended_counts_no_more_beside_what_has_not():
    engine = engine_of(max_sequences=2)
    engine.submit(of("b", "b0", **LONG))
    ended = [engine.submit(of("b", f"b{n}")) for n in (1, 2, 3)]
    engine.run_to(lambda: all(s.is_finished for s in ended))
    for name in ("a0", "a1", "a2", "b4"):
        engine.submit(of(name[0], name))
    assert names(engine) == ["a0", "a1", "b4", "a2"]


def test_a_tenant_has_turns_by_its_weight():
    engine = engine_of()
    for number in range(3):
        engine.submit(of("a", f"a{number}"))
    for number in range(7):
        engine.submit(of("heavy", f"h{number}"))
    assert names(engine) == ["a0", "h0", "h1", "h2", "a1", "h3", "h4", "h5", "a2", "h6"]


def test_a_tier_is_passed_by_no_tenant_of_another():
    engine = engine_of()
    for name, tier in (("a0", "standard"), ("a1", "standard"), ("b0", "low"), ("b1", "low")):
        engine.submit(of(name[0], name, tier))
    engine.submit(of("c", "c0", "low"))
    assert names(engine) == ["a0", "a1", "b0", "c0", "b1"]


def test_an_answer_that_lost_its_blocks_is_passed_by_nobody():
    engine = engine_of(num_blocks=30, max_sequences=4)
    answers = [engine.submit(of("a", f"a{n}", **LONG)) for n in range(3)]
    engine.run_to(lambda: all(s.num_output_tokens for s in answers))
    engine.scheduler.preempt(answers[-1])
    engine.submit(of("b", "b0"))
    assert names(engine) == ["a2", "b0"]


def test_without_keys_who_comes_first_goes_first():
    engine = engine_of()
    for number in range(4):
        engine.submit(request(f"salted{number}", PROMPT, **SMALL))
    assert names(engine) == [f"salted{n}" for n in range(4)]


@pytest.mark.parametrize("arrives", [False, True])
def test_one_tenants_many_keep_a_newcomer_from_the_next_place_no_longer_than_one_answer(arrives):
    engine = engine_of(max_sequences=2, num_blocks=64)
    enter = engine.arrive if arrives else engine.submit
    for number in range(12):
        engine.submit(of("a", f"a{number}"))
    engine.step()
    newcomer = enter(of("b", "b0"))
    engine.run_to(lambda: newcomer.status in (Status.RUNNING, Status.ARRIVING, Status.FINISHED))
    assert len({name for name, _ in engine.finish}) <= 2, "those who ran already"


def test_a_newcomers_prompt_is_computed_before_anothers_further_ones():
    engine = engine_of(num_blocks=200, budget=32, max_len=400)
    for number in range(4):
        engine.submit(of("a", f"a{number}", prompt=[1] * 60))
    first = engine.step()
    newcomer = engine.submit(of("b", "b0"))
    assert newcomer.key not in lengths(first) and newcomer.key in lengths(engine.step())


# --- what runs ------------------------------------------------------------------------------------


def running_of(engine, tenant):
    return sum(s.tenant == tenant for s in engine.scheduler.running)


@pytest.mark.parametrize(("tenant", "num_taken"), [("b", 2), ("heavy", 5)])
def test_who_runs_much_yields_places_to_who_runs_little_and_no_more_than_a_share(tenant, num_taken):
    """Of 8 a keeps 6 beside 2, since it would not have twice as much after the next one."""
    engine = engine_of(num_blocks=200)
    many = [engine.submit(of("a", f"a{n}", **LONG)) for n in range(8)]
    engine.run_to(lambda: all(s.num_output_tokens for s in many))
    few = [engine.submit(of(tenant, f"{tenant}{n}", **LONG)) for n in range(8)]
    plan = engine.step()
    assert few[0].key in lengths(plan), "in the very next step"
    engine.run_to(lambda: running_of(engine, tenant) == num_taken)
    assert [s.status for s in many[: 8 - num_taken]] == [Status.RUNNING] * (8 - num_taken)
    num_preemptions = engine.scheduler.num_preemptions
    for _ in range(10):
        engine.step()
    assert (running_of(engine, tenant), num_preemptions) == (num_taken, num_taken)
    assert engine.scheduler.num_preemptions == num_taken, "and nothing is taken back"


def test_blocks_are_yielded_too_to_an_arrival_as_well():
    engine = engine_of(num_blocks=30)
    many = [engine.submit(of("a", f"a{n}", prompt=[1] * 36, **LONG)) for n in range(3)]
    engine.run_to(lambda: all(s.num_output_tokens for s in many))
    newcomer = engine.arrive(of("b", "b0", prompt=[2] * 36))
    assert newcomer.status is Status.RESERVING
    engine.step()
    assert newcomer.status is Status.ARRIVING and many[-1].status is Status.WAITING


def test_who_runs_alone_for_its_tenant_yields_to_nobody_of_its_tier():
    engine = engine_of(num_blocks=200, max_sequences=2)
    first = [engine.submit(of(tenant, tenant, **LONG)) for tenant in "ab"]
    engine.run_to(lambda: all(s.num_output_tokens for s in first))
    engine.submit(of("c", "c0"))
    engine.step()
    assert [s.status for s in first] == [Status.RUNNING] * 2


def test_without_keys_nobody_yields():
    engine = engine_of(num_blocks=200, max_sequences=4)
    many = [engine.submit(request(f"r{n}", PROMPT, **LONG)) for n in range(4)]
    engine.run_to(lambda: all(s.num_output_tokens for s in many))
    engine.submit(of("b", "b0"))
    engine.step()
    assert [s.status for s in many] == [Status.RUNNING] * 4


def test_what_yielded_goes_on_token_for_token():
    alone, beside = engine_of(num_blocks=200), engine_of(num_blocks=200)
    for engine in (alone, beside):
        for number in range(8):
            engine.submit(of("a", f"a{number}", prompt=[1 + number] * 8, **LONG))
        engine.run_to(lambda engine=engine: len(engine.tokens) == 8)
    beside.submit(of("b", "b0"))
    expected = alone.run()
    assert {key: out for key, out in beside.run().items() if key[0] != "b0"} == expected
    assert beside.scheduler.num_preemptions == 1


def test_a_tenant_that_keeps_coming_keeps_no_others_many_from_ending():
    """Of the flood's last ones each has a late round, and b always fewer here than that."""
    engine = engine_of(max_sequences=2)
    flood = [engine.submit(of("a", f"a{n}")) for n in range(8)]
    stream, num_came = [], 0
    while not all(s.is_finished for s in flood):
        stream = [s for s in stream if not s.is_finished]
        for _ in range(4 - len(stream)):
            stream.append(engine.submit(of("b", f"b{num_came}")))
            num_came += 1
        engine.step()
        assert engine.num_steps < 60, "they never end"
    assert num_came > 8, "b came on and on"


def test_nobody_passes_what_its_own_tenant_sent_before():
    engine = engine_of()
    flood = [engine.submit(of("a", f"a{n}")) for n in range(6)]
    for number in range(4):
        engine.submit(of("b", f"b{number}"))
    for number in (0, 1, 2, 3, 5):
        engine.scheduler.cancel(flood[number])
    engine.submit(of("a", "a6"))
    assert names(engine) == ["b0", "b1", "b2", "b3", "a4", "a6"]


def test_who_weighs_little_keeps_its_oldest_answer():
    engine = engine_of(num_blocks=200, max_sequences=4)
    many = [engine.submit(of("b", f"b{n}", **LONG)) for n in range(4)]
    engine.run_to(lambda: all(s.num_output_tokens for s in many))
    for number in range(8):
        engine.submit(of("vast", f"v{number}", **LONG))
    engine.run_to(lambda: running_of(engine, "vast") == 3)
    for _ in range(5):
        engine.step()
    assert (many[0].status, many[0].num_preemptions) == (Status.RUNNING, 0)


def test_those_who_yielded_before_hide_no_newcomer_however_many_they_are(monkeypatch):
    monkeypatch.setattr("engine.scheduling.block_supply.LOOK_AHEAD", 2)
    engine = engine_of(num_blocks=200)
    many = [engine.submit(of("a", f"a{n}", **LONG)) for n in range(8)]
    engine.run_to(lambda: all(s.num_output_tokens for s in many))
    for number in range(2):
        engine.submit(of("b", f"b{number}", **LONG))
    engine.run_to(lambda: running_of(engine, "b") == 2)
    newcomer = engine.submit(of("c", "c0"))
    assert names(engine)[:2] == ["a6", "a7"]
    assert newcomer.key in lengths(engine.step())


def test_nobody_is_called_in_before_one_that_waits_to_run_alone():
    engine = engine_of(num_blocks=200, max_sequences=4)
    many = [engine.submit(of("a", f"a{n}", **LONG)) for n in range(4)]
    engine.run_to(lambda: all(s.num_output_tokens for s in many))
    lone = engine.scheduler.new_sequence(of("c", "c0"), 1, (0,), (), 0.0)
    lone.run_alone = True
    engine.scheduler.submit(lone)
    engine.submit(of("b", "b0"))
    engine.step()
    assert (names(engine), running_of(engine, "a")) == (["c0", "b0"], 4)


def with_parked(engine, active, parked, last):
    """Let all run, those parked out of credit, the last beside them."""
    many = [engine.submit(of("a", f"a{n}", **LONG)) for n in range(active + parked)]
    engine.run_to(lambda: all(s.num_output_tokens for s in many))
    for one in many[active:]:
        one.credit = one.num_output_tokens
    others = [engine.submit(of("b", f"b{n}", **LONG)) for n in range(last)]
    engine.run_to(lambda: all(s.num_output_tokens for s in others))
    return many


def test_what_is_parked_yields_no_place_since_it_takes_none():
    engine = engine_of(num_blocks=200, max_sequences=4)
    many = with_parked(engine, active=3, parked=1, last=1)
    newcomer = engine.submit(of("c", "c0"))
    assert newcomer.key in lengths(engine.step())
    assert [s.num_preemptions for s in many] == [0, 0, 1, 0]


def test_nobody_yields_where_the_places_of_all_would_not_do():
    engine = engine_of(num_blocks=30, max_sequences=3)
    many = with_parked(engine, active=2, parked=1, last=1)
    engine.submit(of("c", "c0", prompt=[2] * 4 * (engine.pool.num_available + 1)))
    engine.step()
    assert names(engine) == ["c0"] and [s.status for s in many] == [Status.RUNNING] * 3


@settings(deadline=None)
@given(st.lists(st.sampled_from("aaaabc"), max_size=60))
def test_those_who_wait_are_served_in_rounds(arrivals):
    engine, counts = engine_of(), Counter()
    for tenant in arrivals:
        engine.submit(of(tenant, f"{tenant}{counts[tenant]}"))
        counts[tenant] += 1
    rounds = [int(name[1:]) for name in names(engine)]
    assert rounds == sorted(rounds)
    assert all(
        [n for n in names(engine) if n[0] == t] == [f"{t}{i}" for i in range(counts[t])]
        for t in counts
    )
