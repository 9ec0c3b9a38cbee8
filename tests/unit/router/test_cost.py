"""What a request would cost on each worker, and whom that chooses."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.placing import choose

from core.config import PlacementConfig
from core.session import Load, Role, WorkerDescriptor
from core.types import GenerateRequest, Path, SamplingParams
from router.candidate import RECENT_S, Candidate
from router.cost import (
    FETCH_WEIGHT,
    MAX_PREFERENCE_TOKENS,
    OCCUPANCY_WEIGHT,
    PREFERENCE,
    WORK_WEIGHT,
    Prediction,
)
from router.observe.why import why_of
from router.placement import MAX_SHOWN, PlacementConstraints
from router.prefix_sources import FetchSpeeds, PrefixSources
from router.workers.load import WorkerLoad

DESCRIPTOR = WorkerDescriptor("w", Role.PREFILL, 1, "a", "b", "m", "digest", 16, 10_000, 65_536)
PROMPT = GenerateRequest("r", "m", tuple(range(1_000)), SamplingParams(), 1, 0.0)
PD = PlacementConstraints(PlacementConfig(path="pd"))
AUTO = PlacementConstraints()
IDLE = Load(free_blocks=10_000)
DECODE = Candidate(replace(DESCRIPTOR, worker_id="d", role=Role.DECODE), IDLE)


def worker(name, **known):
    return Candidate(replace(DESCRIPTOR, worker_id=name), IDLE, **known)


def chosen(candidates, held, **more):
    return choose([*candidates, DECODE], PROMPT, PD, held, **more).prefill.worker_id


def test_a_holder_is_chosen_until_its_queue_costs_more_than_its_prefix_saves():
    """50 blocks are 800 of 1,000 tokens."""
    saved = int(WORK_WEIGHT * 800)
    for queued, name in ((0, "holder"), (saved - 1, "holder"), (saved + 1, "idle")):
        workers = [worker("holder", pending_tokens=queued), worker("idle")]
        assert chosen(workers, {"holder": 50}) == name, queued


def test_a_first_block_that_all_prompts_share_does_not_gather_them_at_its_first_holder():
    loads = [WorkerLoad(replace(DESCRIPTOR, worker_id=f"w{i}")) for i in range(8)]
    counts = dict.fromkeys((f"w{i}" for i in range(8)), 0)
    held = {"w0": 1}
    for number in range(80):
        name = chosen([load.candidate for load in loads], held)
        counts[name] += 1
        held[name] = 1
        loads[int(name[1:])].add(f"r{number}", 1_000 - 16 * held[name], 0.0)
    assert set(counts.values()) == {10}


def test_the_last_token_is_always_computed():
    prediction = Prediction([worker("w")], 32, 1, {"w": 99}, 0.0)
    cost = prediction.cost(worker("w"), "d")
    assert (cost.cached_tokens, cost.uncached_tokens) == (16, 16)
    assert Prediction([], 33, 1, {"w": 99}, 0.0).cached_tokens(worker("w")) == 32


def test_blocks_count_by_the_size_of_each_workers_own():
    large = Candidate(replace(DESCRIPTOR, worker_id="large", block_size_tokens=64), IDLE)
    assert chosen([worker("small"), large], {"small": 20, "large": 10}) == "large"


def test_what_must_be_computed_of_the_first_prompt_by_now_is_not_waited_for():
    sent = {"pending_tokens": 4_000, "head_tokens": 4_000, "prefill_tokens_per_s": 1_000.0}
    a = worker("a", head_started_s=10.0, **sent)
    b = worker("b", head_started_s=12.0, **sent)
    assert chosen([a, b], {}, now_s=13.0) == "a"
    prediction = Prediction([a, b], 1_000, 1, {}, 13.0)
    assert prediction.cost(a, "d").queued_tokens == 1_000
    late = Prediction([a, b], 1_000, 1, {}, 99.0)
    cost = late.cost(a, "d")
    assert cost.queued_tokens == 1, "it has not answered yet"
    assert cost.weighed_s == pytest.approx((1 + WORK_WEIGHT * 1_000) / 1_000, abs=1e-3)


def test_a_fast_worker_may_have_the_longer_queue():
    fast = worker("fast", prefill_tokens_per_s=9_000.0, pending_tokens=2_000)
    slow = worker("slow", prefill_tokens_per_s=1_000.0)
    assert chosen([fast, slow], {}) == "fast"
    assert chosen([replace(fast, prefill_tokens_per_s=1_000.0), slow], {}) == "slow"


def test_until_speeds_are_measured_the_settings_say_what_a_token_costs():
    rules = PlacementConfig(prefill_tokens_per_s=500.0, sequence_tokens=50)
    busy = replace(DECODE, load=Load(num_running=4, free_blocks=10_000))
    cost = Prediction([busy], 1_000, 1, {}, 0.0, rules).cost(busy)
    assert (cost.prefill_s, cost.decode_s) == (2.0, 0.4)


def test_speeds_that_hardly_differ_do_not_gather_prompts_at_the_fastest():
    a = worker("a", prefill_tokens_per_s=1_000.0, recent_work=5.0)
    b = worker("b", prefill_tokens_per_s=950.0, recent_work=3.0)
    assert chosen([a, b], {}) == "b"


def test_a_late_transfer_costs_as_much_as_a_queue_that_long():
    late = worker("late", exposed_transfer_s=0.5)
    for queued, name in ((3_999, "queued"), (4_001, "late")):
        assert chosen([late, worker("queued", pending_tokens=queued)], {}) == name, queued
    prediction = Prediction([late], 1_000, 1, {}, 0.0)
    cost = prediction.cost(late, "d")
    assert (cost.transfer_s, cost.total_s) == (0.5, 0.625)


KNOWN = {
    "pending_tokens": st.integers(0, 5_000),
    "head_tokens": st.integers(0, 5_000),
    "head_started_s": st.floats(0, 20),
    "pending_requests": st.integers(0, 9),
    "prefill_tokens_per_s": st.sampled_from([0.0, 500.0, 900.0, 1_000.0, 9_000.0]),
    "exposed_transfer_s": st.sampled_from([0.0, 0.01, 2.0]),
    "recent_work": st.floats(0, 12),
}


def known_worker(**known):
    return worker("w", **known)


@pytest.mark.parametrize("receiver", [None, "d"], ids=["local", "across"])
@given(st.data())
def test_what_orders_workers_is_made_of_what_each_is_shown_to_cost(receiver, data):
    """The weights are worked out in one flat loop, for speed; a cost has the same parts by name."""
    pool = data.draw(st.lists(st.builds(known_worker, **KNOWN), min_size=1, max_size=5))
    pool = [
        replace(c, descriptor=replace(c.descriptor, worker_id=f"w{i}", incarnation=i))
        for i, c in enumerate(pool)
    ]
    names = [c.worker_id for c in pool]
    held = data.draw(st.dictionaries(st.sampled_from(names), st.integers(0, 90)))
    preferred = frozenset(data.draw(st.sets(st.sampled_from(names))))
    sources = PrefixSources(pool, held, FetchSpeeds(), 0.0, frozenset())
    rules = PlacementConfig()
    now_s = data.draw(st.floats(0, 20))
    prediction = Prediction(pool, 1_000, 1, held, now_s, rules, preferred, sources)
    for c in pool:
        cost = prediction.cost(c, receiver)
        speed = prediction.tokens_per_s(c)
        tokens = prediction.queued_tokens(c, speed) + WORK_WEIGHT * cost.uncached_tokens
        tokens += OCCUPANCY_WEIGHT * math.exp(c.recent_work - now_s / RECENT_S)
        tokens += FETCH_WEIGHT * cost.fetched_tokens
        if c.worker_id in preferred:
            tokens -= min(PREFERENCE * cost.uncached_tokens, MAX_PREFERENCE_TOKENS)
        seconds = cost.fetch_s + (c.exposed_transfer_s if receiver else cost.decode_s)
        assert cost.weighed_s == pytest.approx(tokens / speed + seconds)
        assert prediction.uncached_tokens(c) == cost.uncached_tokens
        assert prediction.cached_tokens(c) == cost.cached_tokens


def decoders(**running):
    return [
        replace(
            DECODE,
            descriptor=replace(DECODE.descriptor, worker_id=name),
            load=replace(IDLE, num_running=number),
        )
        for name, number in running.items()
    ]


@pytest.mark.parametrize(
    ("exposed_s", "running", "name"),
    [
        ({"a": 0.300, "b": 0.010}, (0, 9), "b"),
        ({"a": 0.014, "b": 0.010}, (0, 1), "a"),
        ({"a": 0.023, "b": 0.010}, (0, 3), "b"),
        ({"a": 0.023, "b": 0.010}, (0, 5), "a"),
        ({"a": 0.300}, (0, 9), "b"),
        ({}, (1, 0), "b"),
    ],
    ids=["late", "as late", "four sequences late", "five run there", "the other unknown", "none"],
)
def test_a_receiver_is_left_for_one_that_gets_its_kv_sooner(exposed_s, running, name):
    """One sequence takes 2 ms of a step; and 5 ms are a step's noise."""
    sender = worker("p", exposed_transfer_s=0.020, exposed_by_receiver=exposed_s)
    pool = [sender, *decoders(a=running[0], b=running[1])]
    assert choose(pool, PROMPT, PD).decode.worker_id == name


def test_of_equal_workers_the_one_with_less_work_of_late_is_chosen():
    old, new = WorkerLoad(replace(DESCRIPTOR, worker_id="a")), WorkerLoad(DESCRIPTOR)
    old.add("r1", 5_000, 0.0)
    new.add("r2", 1_000, 600.0)
    for load, run in ((old, "r1"), (new, "r2")):
        load.remove(run, 601.0)
    prompts = [new.candidate, old.candidate]
    assert chosen(prompts, {}, now_s=601.0) == "a", "what was long ago counts little"


def test_local_below_tokens_counts_what_the_local_worker_lacks():
    busy = replace(DECODE, load=Load(num_running=500, free_blocks=10_000))
    placement = choose([worker("p"), busy], PROMPT, AUTO, {"d": 61})
    assert placement.path is Path.LOCAL and placement.uncached_tokens == 24
    assert placement.reason == "prompt of 24 tokens, without 976 cached at d, is below 32"
    assert choose([worker("p"), busy], PROMPT, AUTO, {"d": 60}).path is Path.PD
    assert choose([worker("p"), busy], PROMPT, AUTO, {"p": 61}).path is Path.PD


def test_a_conversation_goes_on_where_its_answer_was_made_unless_many_decode_there():
    placement = choose([worker("p"), DECODE], PROMPT, AUTO, {"d": 50, "p": 10})
    assert (placement.path, placement.decode.worker_id) == (Path.LOCAL, "d")
    assert placement.reason == (
        "d holds 800 tokens: 25 ms at d and 0 ms for others there, 105 ms across"
    )
    busy = replace(DECODE, load=Load(num_running=8, free_blocks=10_000))
    assert choose([worker("p"), busy], PROMPT, AUTO, {"d": 50, "p": 10}).path is Path.PD


def test_nothing_held_and_nothing_measured_changes_no_path():
    for size in (31, 32, 1_000):
        request = replace(PROMPT, token_ids=tuple(range(size)))
        is_local = choose([worker("p"), DECODE], request, AUTO).path is Path.LOCAL
        assert is_local == (size < 32)


@given(st.lists(st.tuples(st.integers(0, 5_000), st.integers(0, 80)), min_size=1, max_size=12))
def test_no_other_worker_would_have_been_cheaper(workers):
    candidates = [
        worker(f"w{i:02}", pending_tokens=queued) for i, (queued, _) in enumerate(workers)
    ]
    held = {f"w{i:02}": blocks for i, (_, blocks) in enumerate(workers) if blocks}
    placement = choose([*candidates, DECODE], PROMPT, PD, held)

    def weighed(queued, blocks):
        return queued + WORK_WEIGHT * (1_000 - 16 * min(blocks, 62))

    queued, blocks = workers[int(placement.prefill.worker_id[1:])]
    assert weighed(queued, blocks) == min(weighed(*each) for each in workers)
    assert placement.uncached_tokens == 1_000 - 16 * min(blocks, 62)
    assert placement.prefill_costs[0].worker_id == placement.prefill.worker_id
    assert len(placement.prefill_costs) == min(MAX_SHOWN, len(workers))


def test_why_says_what_each_candidate_would_have_cost():
    one = worker("p1", pending_tokens=200, prefill_tokens_per_s=1_000.0)
    why = why_of(choose([one, worker("p2"), DECODE], PROMPT, AUTO, {"p1": 50}))
    assert why["decision"] == {
        "path": "pd",
        "prefill_worker": "p1",
        "decode_worker": "d",
        "reason": "prompt is worth a transfer: 1000 ms at d and 0 ms for others there, "
        "400 ms across",
        "uncached_tokens": 200,
    }
    assert [(c["path"], c["worker"], c["total_ms"]) for c in why["candidates"]] == [
        ("pd", "p1", 400.0),
        ("pd", "p2", 1_000.0),
        ("local", "d", 1_000.0),
    ]
    assert [c["weighed_ms"] for c in why["candidates"]] == pytest.approx(
        [500, 1_500, 1_500], abs=0.1
    )
    local = why_of(choose([DECODE], PROMPT, AUTO))
    assert [(c["path"], c["worker"]) for c in local["candidates"]] == [("local", "d")]
    assert local["decision"]["reason"] == "0 prefill and 1 decode workers match"


def test_a_key_decides_among_equals_and_excuses_a_queue_of_half_the_prompt():
    for queued, name in ((0, "z"), (499, "z"), (501, "a")):
        keyed = replace(PD, preferred=frozenset({"z"}))
        workers = [worker("a"), worker("z", pending_tokens=queued), DECODE]
        assert choose(workers, PROMPT, keyed).prefill.worker_id == name, queued
        assert choose(workers, PROMPT, PD).prefill.worker_id == "a"


def test_a_key_excuses_less_where_much_is_cached_and_no_more_for_a_long_prompt():
    keyed = replace(PD, preferred=frozenset({"z"}))
    held = {"a": 50, "z": 50}
    for queued, name in ((99, "z"), (101, "a")):
        workers = [worker("a"), worker("z", pending_tokens=queued), DECODE]
        assert choose(workers, PROMPT, keyed, held).prefill.worker_id == name
    long = replace(PROMPT, token_ids=tuple(range(60_000)))
    for queued, name in ((1_023, "z"), (1_025, "a")):
        workers = [worker("a"), worker("z", pending_tokens=queued), DECODE]
        assert choose(workers, long, keyed).prefill.worker_id == name
    assert (PREFERENCE, MAX_PREFERENCE_TOKENS) == (0.5, 1_024)


def test_many_requests_with_one_key_do_not_stay_at_one_worker():
    loads = [WorkerLoad(replace(DESCRIPTOR, worker_id=f"w{i}")) for i in range(4)]
    counts = dict.fromkeys((f"w{i}" for i in range(4)), 0)
    keyed = replace(PD, preferred=frozenset({"w0"}))
    for number in range(40):
        candidates = [load.candidate for load in loads]
        name = choose([*candidates, DECODE], PROMPT, keyed).prefill.worker_id
        counts[name] += 1
        loads[int(name[1:])].add(f"r{number}", 1_000, 0.0)
    assert max(counts.values()) <= 11, counts


def test_a_receiver_is_the_keys_or_a_holder_among_equals():
    busy = Load(num_running=1, free_blocks=10_000)
    busier = Load(num_running=2, free_blocks=10_000)
    d1, d2 = (Candidate(replace(DESCRIPTOR, worker_id=n, role=Role.DECODE), IDLE) for n in "de")
    keyed = replace(PD, preferred=frozenset({"e"}))

    def receiver(second, constraints, held=None):
        workers = [worker("p"), d1, replace(d2, load=second)]
        return choose(workers, PROMPT, constraints, held or {}).decode.worker_id

    assert receiver(IDLE, PD) == "d"
    assert receiver(IDLE, PD, {"e": 10}) == "e" and receiver(busy, PD, {"e": 10}) == "d"
    assert receiver(IDLE, keyed) == "e"
    assert receiver(busier, keyed) == "d", "a key is worth one sequence"


def test_a_short_prompt_stays_at_its_keys_worker():
    decode = [
        Candidate(replace(DESCRIPTOR, worker_id=name, role=Role.DECODE), IDLE) for name in "de"
    ]
    short = replace(PROMPT, token_ids=tuple(range(20)))
    keyed = replace(AUTO, preferred=frozenset({"e"}))
    assert choose([worker("p"), *decode], short, AUTO).decode.worker_id == "d"
    placement = choose([worker("p"), *decode], short, keyed)
    assert (placement.path, placement.decode.worker_id) == (Path.LOCAL, "e")
    flags = [c.get("is_preferred", False) for c in why_of(placement)["candidates"]]
    assert flags == [False, True, False], "p, then e before d"
