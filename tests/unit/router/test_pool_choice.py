"""Whose pools serve a request, case by case: own ones, shared ones, and those spilled to."""

from dataclasses import replace

import pytest
from support.placing import choose

from core.config import TierConfig
from core.errors import NoWorker
from core.session import Load, Role, WorkerDescriptor
from core.types import CANARY_TIER, GenerateRequest, SamplingParams
from router.candidate import Candidate
from router.placement import PlacementConstraints
from router.pool_choice import PoolChoice

SIZE = 16
REQUEST = GenerateRequest("r", "m", tuple(range(100)), SamplingParams(), 1, 0.0)
POOL = {"replicas": 1}


def worker(name, tier="", waiting=0, free=100):
    """One whose name begins with p prefills; so many tokens wait there, at 1000 a second."""
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    d = WorkerDescriptor(name, role, 1, "a", "b", "m", "digest", SIZE, 100, 2048, tier)
    load = Load(waiting_tokens=waiting, free_blocks=free)
    return Candidate(d, load, prefill_tokens_per_s=1000.0)


def tiers(**settings):
    return {name: TierConfig.model_validate(tree) for name, tree in settings.items()}


def place(settings, workers, tier, excluded=()):
    constraints = PlacementConstraints(excluded=frozenset(excluded))
    pools = PoolChoice(tiers(**settings))
    request = replace(REQUEST, tier=tier)
    usable = pools.usable(tier, workers)
    return pools.place(
        request,
        usable,
        constraints.excluded,
        lambda some: choose(some, request, constraints),
    )


def decoder(*args, **more):
    return place(*args, **more).decode.worker_id


OWN = {"batch": {"pools": {"decode": POOL}}, "standard": {}}
SPILLING = {"batch": {"pools": {"decode": POOL}, "spill_to": ["shared"]}, "standard": {}}
SOAKING = {
    "batch": {"spill_to": ["interactive"]},
    "interactive": {"pools": {"prefill": POOL, "decode": POOL}},
}
SHARED = [worker("p"), worker("d")]
BATCH = worker("d-batch", "batch")


def test_without_pools_of_their_own_all_tiers_place_as_if_there_were_none():
    pools = PoolChoice(tiers(standard={}, batch={"spill_to": ["shared"]}))
    assert not pools.is_divided
    assert pools.usable("batch", SHARED) is SHARED, "nothing is looked at"
    placement = pools.place(REQUEST, SHARED, frozenset(), lambda some: choose(some, REQUEST, plain))
    assert placement == choose(SHARED, REQUEST, plain)


plain = PlacementConstraints()


@pytest.mark.parametrize(
    ("settings", "tier", "names"),
    [
        (OWN, "batch", {"p", "d-batch"}),
        (OWN, "standard", {"p", "d"}),
        (SPILLING, "batch", {"p", "d", "d-batch"}),
        (OWN, CANARY_TIER, {"p", "d", "d-batch"}),
    ],
)
def test_a_tier_may_use_its_own_pools_and_those_it_spills_to(settings, tier, names):
    usable = PoolChoice(tiers(**settings)).usable(tier, [*SHARED, BATCH])
    assert {c.worker_id for c in usable} == names


@pytest.mark.parametrize(
    ("case", "settings", "workers", "tier", "excluded", "expected"),
    [
        ("own before shared", SPILLING, [*SHARED, BATCH], "batch", (), "d-batch"),
        ("others before nobody's", SPILLING, [*SHARED, BATCH], "standard", (), "d"),
        ("own is dead", SPILLING, SHARED, "batch", (), "d"),
        ("own failed it", SPILLING, [*SHARED, BATCH], "batch", ("d-batch",), "d"),
        ("all failed it", SPILLING, [*SHARED, BATCH], "batch", ("d-batch", "d"), "d-batch"),
        ("own is full", SPILLING, [*SHARED, worker("d-b", "batch", free=2)], "batch", (), "d"),
        (
            "all are full",
            SPILLING,
            [worker("p"), worker("d", free=2), worker("d-b", "batch", free=2)],
            "batch",
            (),
            "d-b",
        ),
        ("no decode worker at all", SPILLING, [worker("p")], "batch", (), "p"),
        ("canaries prove the shared pools", OWN, [*SHARED, BATCH], CANARY_TIER, (), "d"),
        ("or what there is", OWN, [worker("p"), BATCH], CANARY_TIER, (), "d-batch"),
        (
            "batch soaks another's idle pools",
            SOAKING,
            [worker("p-i", "interactive"), worker("d-i", "interactive")],
            "batch",
            (),
            "d-i",
        ),
    ],
)
def test_the_first_pools_that_have_a_worker_for_it_serve_a_request(
    case, settings, workers, tier, excluded, expected
):
    assert decoder(settings, workers, tier, excluded=excluded) == expected, case


def test_a_tier_that_does_not_spill_waits_for_its_own_pools():
    with pytest.raises(NoWorker, match="in the pools of batch: no worker for path auto"):
        place(OWN, [worker("d")], "batch")
    with pytest.raises(NoWorker, match="in the pools of shared"):
        place(OWN, [BATCH], "standard")


def late(settings, own_tokens, other_tokens):
    """Place a batch request where so many tokens wait in its own pool, and in the shared one."""
    own = {"pools": {"prefill": POOL, "decode": POOL}, "spill_to": ["shared"]}
    workers = [
        worker("p", waiting=other_tokens),
        worker("d", waiting=other_tokens),
        worker("p-b", "batch", waiting=own_tokens),
        worker("d-b", "batch", waiting=own_tokens),
    ]
    return place({"batch": {**own, **settings}, "standard": {}}, workers, "batch")


@pytest.mark.parametrize(
    ("case", "settings", "own_tokens", "other_tokens", "expected"),
    [
        ("no limit: any wait will do", {}, 9_000, 0, "d-b"),
        ("in time", {"max_ttft_s": 2.0}, 1_000, 0, "d-b"),
        ("late, and the other is not", {"max_ttft_s": 2.0}, 3_000, 0, "d"),
        ("the SLO where nothing else is said", {"slo_ttft_s": 2.0}, 3_000, 0, "d"),
        ("what is refused, before the SLO", {"max_ttft_s": 9, "slo_ttft_s": 1}, 3_000, 0, "d-b"),
        ("both late, the other less", {"max_ttft_s": 2.0}, 5_000, 3_000, "d"),
        ("both late, the other more", {"max_ttft_s": 2.0}, 3_000, 5_000, "d-b"),
    ],
)
def test_a_request_that_would_be_late_spills_to_where_it_is_earlier(
    case, settings, own_tokens, other_tokens, expected
):
    placement = late(settings, own_tokens, other_tokens)
    assert placement.decode.worker_id == expected, case
    assert placement.prefill.worker_id == expected.replace("d", "p"), "of the same pools"


def test_the_reason_says_whose_pools_and_why():
    assert place(SPILLING, [*SHARED, BATCH], "batch").reason.startswith("pools of batch; ")
    assert place(SPILLING, SHARED, "batch").reason.startswith(
        "spilled from batch to shared: no worker of batch can take it; "
    )
    assert late({"max_ttft_s": 2.0}, 3_000, 0).reason.startswith(
        "spilled from batch to shared: 3100 ms expected there, 2000 ms allowed; "
    )
    assert place(OWN, [*SHARED, BATCH], "standard").reason.startswith("shared pools; ")
