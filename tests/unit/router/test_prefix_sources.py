"""Who is asked for a prefix, at what cost, and when it is better computed."""

import math
from dataclasses import replace

import pytest

from core.config import PlacementConfig
from core.session import FetchOutcome, FetchReport, Load, Role, WorkerDescriptor
from core.types import GenerateRequest, SamplingParams
from router import prefix_sources
from router.candidate import Candidate
from router.cost import FETCH_WEIGHT, MAX_FETCH_WAIT_S
from router.observe.why import why_of
from router.placement import PlacementConstraints, choose
from router.prefix_sources import (
    DEFAULT_TOKENS_PER_S,
    MAX_RESTING,
    OVERHEAD_S,
    REST_S,
    FetchSpeeds,
    PrefixSources,
)

DESCRIPTOR = WorkerDescriptor("w", Role.PREFILL, 1, "a", "b", "m", "digest", 16, 10_000, 65_536)
PROMPT = GenerateRequest("r", "m", tuple(range(1_000)), SamplingParams(), 1, 0.0)
PD = PlacementConstraints(PlacementConfig(path="pd"))
IDLE = Load(free_blocks=10_000)
SPEED = 1_000.0


def worker(name, incarnation, role=Role.PREFILL, load=IDLE, **known):
    known.setdefault("prefill_tokens_per_s", SPEED)
    descriptor = replace(DESCRIPTOR, worker_id=name, incarnation=incarnation, role=role)
    return Candidate(descriptor, load, **known)


DECODE = worker("d", 9, Role.DECODE, prefill_tokens_per_s=0.0)
HOLDER = worker("holder", 1)
IDLER = worker("idle", 2)


def placed(candidates, held, speeds=None, excluded=frozenset(), **descriptor):
    pool = [replace(c, descriptor=replace(c.descriptor, **descriptor)) for c in candidates]
    sources = PrefixSources(pool, held, speeds or FetchSpeeds(), 0.0, excluded)
    return choose([*pool, DECODE], PROMPT, PD, held, now_s=0.0, sources=sources)


def test_a_busy_holder_is_asked_and_an_idle_worker_serves():
    """50 blocks are 800 tokens: 0.8 s to compute, 26 ms to fetch."""
    busy = Candidate(HOLDER.descriptor, IDLE, 500, prefill_tokens_per_s=SPEED)
    placement = placed([busy, IDLER], {"holder": 50})
    assert placement.prefill.worker_id == "idle" and placement.uncached_tokens == 200
    fetch = placement.fetch
    assert (fetch.source.worker_id, fetch.num_tokens, fetch.num_gained) == ("holder", 800, 800)
    assert fetch.exposed_s == pytest.approx(OVERHEAD_S + 800 / DEFAULT_TOKENS_PER_S)
    assert fetch.wait_s == pytest.approx(0.8), "no longer than what it saves"
    why = why_of(placement)
    assert why["decision"]["source"] == "holder" and why["decision"]["fetched_tokens"] == 800
    row = next(c for c in why["candidates"] if c["worker"] == "idle")
    assert (row["source"], row["fetched_tokens"], row["uncached_tokens"]) == ("holder", 800, 200)
    assert row["fetch_ms"] == pytest.approx(26.0)
    assert row["total_ms"] == pytest.approx(226.0)


def test_a_prefix_stays_with_its_holder_until_that_is_busier_than_a_copy_is_dear():
    """What the holder did of late is no reason: a conversation would hop from worker to worker."""
    dear = FETCH_WEIGHT * 800 + SPEED * (OVERHEAD_S + 800 / DEFAULT_TOKENS_PER_S)
    for queued, name in ((0, "holder"), (int(dear) - 5, "holder"), (int(dear) + 5, "idle")):
        busy = Candidate(HOLDER.descriptor, IDLE, queued, prefill_tokens_per_s=SPEED)
        assert placed([busy, IDLER], {"holder": 50}).prefill.worker_id == name, queued
    worked = Candidate(
        HOLDER.descriptor, IDLE, prefill_tokens_per_s=SPEED, recent_work=math.log(5_000)
    )
    placement = placed([worked, IDLER], {"holder": 50})
    assert placement.prefill.worker_id == "holder" and placement.fetch is None


@pytest.mark.parametrize(("num_blocks", "is_fetched"), [(0, False), (1, True), (62, True)])
def test_what_is_computed_faster_than_asked_for_is_computed(num_blocks, is_fetched):
    busy = Candidate(HOLDER.descriptor, IDLE, 100_000, prefill_tokens_per_s=SPEED)
    placement = placed([busy, IDLER], {"holder": num_blocks})
    assert (placement.fetch is not None) is is_fetched
    fast = [
        Candidate(busy.descriptor, IDLE, 10**7, prefill_tokens_per_s=10**6),
        Candidate(IDLER.descriptor, IDLE, prefill_tokens_per_s=10**6),
    ]
    assert placed(fast, {"holder": num_blocks}).fetch is None


def test_a_fetch_behind_a_queue_costs_nothing():
    busy = Candidate(HOLDER.descriptor, IDLE, 100_000, prefill_tokens_per_s=SPEED)
    queued = Candidate(IDLER.descriptor, IDLE, 5_000, prefill_tokens_per_s=SPEED)
    fetch = placed([busy, queued], {"holder": 50}).fetch
    assert fetch.exposed_s == 0.0 and fetch.wait_s == MAX_FETCH_WAIT_S


def test_the_last_token_is_never_fetched_and_blocks_go_by_the_receivers_size():
    busy = Candidate(HOLDER.descriptor, IDLE, 100_000, prefill_tokens_per_s=SPEED)
    assert placed([busy, IDLER], {"holder": 99}).fetch.num_tokens == 992
    large = replace(IDLER, descriptor=replace(IDLER.descriptor, block_size_tokens=64))
    sources = PrefixSources([busy], {"holder": 50}, FetchSpeeds(), 0.0)
    placement = choose(
        [busy, large, DECODE], PROMPT, PD, {"holder": 50}, now_s=0.0, sources=sources
    )
    assert placement.prefill.worker_id == "idle" and placement.fetch.num_tokens == 768


@pytest.mark.parametrize(
    "differs", [{"content_digest": "another"}, {"block_size_tokens": 24}], ids=["content", "blocks"]
)
def test_workers_that_cannot_exchange_kv_do_not(differs):
    sources = PrefixSources([HOLDER], {"holder": 50}, FetchSpeeds(), 0.0)
    assert sources.best_for(IDLER.descriptor) is not None
    assert sources.best_for(replace(IDLER.descriptor, **differs)) is None
    assert sources.best_for(HOLDER.descriptor) is None, "nobody fetches from itself"


def test_of_equal_holders_the_least_busy_is_asked_and_no_excluded_one():
    other = worker("other", 3, load=Load(num_running=3, free_blocks=10_000))
    held = {"holder": 50, "other": 50}
    sources = PrefixSources([other, HOLDER], held, FetchSpeeds(), 0.0)
    assert sources.best_for(IDLER.descriptor)[1].worker_id == "holder"
    sources = PrefixSources([other, HOLDER], held, FetchSpeeds(), 0.0, frozenset({"holder"}))
    assert sources.best_for(IDLER.descriptor)[1].worker_id == "other"
    sources = PrefixSources([other, HOLDER], held | {"other": 51}, FetchSpeeds(), 0.0)
    assert sources.best_for(IDLER.descriptor)[1].worker_id == "other", "more is better"


def test_speeds_are_learned_apart_within_a_node_and_between_nodes():
    speeds = FetchSpeeds()
    near = replace(DESCRIPTOR, node="n")
    far = replace(near, node="m")
    report = FetchReport(FetchOutcome.FETCHED, 1_000, OVERHEAD_S + 0.1)
    speeds.note(near, near, report, 0.0)
    assert speeds.seconds(near, near, 1_000) == pytest.approx(OVERHEAD_S + 0.1)
    assert speeds.seconds(near, far, 1_000) == OVERHEAD_S + 1_000 / DEFAULT_TOKENS_PER_S
    speeds.note(near, near, replace(report, took_s=OVERHEAD_S + 0.2), 0.0)
    assert 0.1 < speeds.seconds(near, near, 1_000) - OVERHEAD_S < 0.2


def test_a_fetch_moves_the_known_speed_by_a_fifth_of_the_difference():
    speeds = FetchSpeeds()
    for num_tokens, took_s, tokens_per_s in (
        (1_000, OVERHEAD_S + 0.1, 10_000.0),
        (500, OVERHEAD_S + 0.1, 9_000.0),
        (0, 9.0, 9_000.0),
        (9, 0.0, 9_000.0),  # faster than can be measured: as in a tenth of the overhead
        (109, OVERHEAD_S + OVERHEAD_S / 10, 29_000.0),
    ):
        report = FetchReport(FetchOutcome.FETCHED, num_tokens, took_s)
        speeds.note(DESCRIPTOR, DESCRIPTOR, report, 0.0)
        found = speeds.seconds(DESCRIPTOR, DESCRIPTOR, 1_000)
        assert found == pytest.approx(OVERHEAD_S + 1_000 / tokens_per_s)


def test_of_holders_that_rest_the_one_that_failed_longest_ago_is_forgotten(monkeypatch):
    monkeypatch.setattr(prefix_sources, "MAX_RESTING", 2)
    speeds = FetchSpeeds()
    failed = FetchReport(FetchOutcome.FAILED)
    holders = [replace(DESCRIPTOR, incarnation=number) for number in (1, 2, 3)]
    for number in (0, 1, 0):
        speeds.note(holders[number], DESCRIPTOR, failed, 100.0)
    assert [speeds.is_resting(one, 101.0) for one in holders] == [True, True, False]
    speeds.note(holders[2], DESCRIPTOR, failed, 100.0)
    assert [speeds.is_resting(one, 101.0) for one in holders] == [True, False, True]


def test_what_holders_have_is_compared_in_tokens_for_each_content_apart():
    large = replace(HOLDER, descriptor=replace(DESCRIPTOR, worker_id="large", block_size_tokens=64))
    other = replace(HOLDER.descriptor, worker_id="other", content_digest="another")
    held = {"holder": 30, "large": 10, "other": 35}
    for pool in ([HOLDER, large], [large, HOLDER]):
        pool = [*pool, replace(HOLDER, descriptor=other)]
        sources = PrefixSources(pool, held, FetchSpeeds(), 0.0)
        num_tokens, best = sources.best_for(IDLER.descriptor)
        assert (num_tokens, best.worker_id, sources.most_tokens) == (640, "large", 640)
    for nobody in ({}, {"holder": 0}):
        assert PrefixSources([HOLDER], nobody, FetchSpeeds(), 0.0).most_tokens == 0


def test_who_cannot_be_asked_is_passed_over_and_those_behind_are_looked_at():
    speeds = FetchSpeeds()
    speeds.note(IDLER.descriptor, DESCRIPTOR, FetchReport(FetchOutcome.FAILED), 0.0)
    empty = worker("empty", 5)
    held = {"idle": 60, "bad": 60, "holder": 50}
    for first in (IDLER, worker("bad", 6), empty):
        sources = PrefixSources([first, HOLDER], held, speeds, 1.0, frozenset({"bad"}))
        assert sources.best_for(worker("new", 7).descriptor) == (800, HOLDER.descriptor)
    sources = PrefixSources([empty], held, speeds, 1.0)
    assert sources.best_for(worker("new", 7).descriptor) is None, "it has published nothing"


def test_who_keeps_its_kv_to_itself_is_no_source():
    closed = replace(HOLDER, descriptor=replace(HOLDER.descriptor, exports_kv=False))
    sources = PrefixSources([closed], {"holder": 50}, FetchSpeeds(), 0.0)
    assert sources.best_for(IDLER.descriptor) is None and sources.most_tokens == 0


@pytest.mark.parametrize("outcome", list(FetchOutcome))
def test_a_holder_at_which_fetches_fail_rests(outcome):
    speeds = FetchSpeeds()
    speeds.note(DESCRIPTOR, DESCRIPTOR, FetchReport(outcome, 10, 1.0), 100.0)
    rests = outcome in (FetchOutcome.LATE, FetchOutcome.FAILED)
    assert speeds.is_resting(DESCRIPTOR, 100.0 + REST_S - 0.1) is rests
    assert not speeds.is_resting(DESCRIPTOR, 100.0 + REST_S)
    seconds = speeds.seconds(DESCRIPTOR, DESCRIPTOR, 1_000)
    is_known = seconds != OVERHEAD_S + 1_000 / DEFAULT_TOKENS_PER_S
    assert is_known is (outcome is FetchOutcome.FETCHED), "only what came has a speed"
    sources = PrefixSources([HOLDER], {"holder": 50}, speeds, 101.0)
    assert (sources.best_for(IDLER.descriptor) is None) is rests


def test_of_holders_at_rest_the_oldest_is_forgotten():
    """Workers come and go for as long as a router runs."""
    speeds = FetchSpeeds()
    failed = FetchReport(FetchOutcome.FAILED, 10, 1.0)
    holders = [replace(DESCRIPTOR, incarnation=number) for number in range(MAX_RESTING + 1)]
    for holder in holders[:-1]:
        speeds.note(holder, DESCRIPTOR, failed, 0.0)
    speeds.note(holders[0], DESCRIPTOR, failed, 0.0)  # the newest again
    speeds.note(holders[-1], DESCRIPTOR, failed, 0.0)
    resting = [speeds.is_resting(holder, 1.0) for holder in holders]
    assert resting == [True, False, *[True] * (MAX_RESTING - 1)]
