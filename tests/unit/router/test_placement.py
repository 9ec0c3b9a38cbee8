"""Placement against brute force over all pairs, and what it looks at."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.placing import choose

from core.config import PlacementConfig
from core.errors import (
    NoWorker,
)
from core.session import Load, Role, WorkerDescriptor
from core.types import (
    GenerateRequest,
    Path,
    SamplingParams,
)
from router.candidate import Candidate
from router.placement import MAX_SHOWN, PlacementConstraints


def loaded(name, role, waiting=0, running=0, **more):
    d = WorkerDescriptor(name, role, 1, "a", "b", "m", "digest", 16, 100, 2048)
    return Candidate(
        replace(d, **more), Load(num_running=running, waiting_tokens=waiting, free_blocks=100)
    )


LONG_REQUEST = GenerateRequest("r", "m", tuple(range(100)), SamplingParams(), 1, 0.0)


AUTO = PlacementConstraints()


REQUEST = GenerateRequest("r", "m", tuple(range(40)), SamplingParams(), 1, 0.0)


DESCRIPTOR = WorkerDescriptor("w", Role.DECODE, 1, "a", "b", "m", "digest", 16, 100, 2048)


PD = PlacementConstraints(PlacementConfig(path="pd"))


def prefill_cost(c):
    return c.load.waiting_tokens + c.pending_tokens, c.pending_requests, c.descriptor.worker_id


def decode_cost(c, request):
    available = c.load.free_blocks + c.load.cached_blocks
    blocks = -(-len(request.token_ids) // c.descriptor.block_size_tokens) + request.sampling.n
    running = c.load.num_running + c.load.num_waiting + c.pending_requests
    return (
        blocks > available,
        running,
        c.descriptor.num_blocks - available,
        c.descriptor.worker_id,
    )


def brute_force(candidates, request, constraints):
    """Every fitting pair is looked at; the least in (prefill cost, decode cost) wins."""

    def of(role):
        mine = [
            c
            for c in candidates
            if c.descriptor.role is role and request.model in ("", c.descriptor.model)
        ]
        return [c for c in mine if c.descriptor.worker_id not in constraints.excluded] or mine

    def fits(p, d):
        a, b = p.descriptor, d.descriptor
        small, large = sorted((a.block_size_tokens, b.block_size_tokens))
        is_alike = a.content_digest == b.content_digest and large % small == 0
        return is_alike and (a.incarnation, b.incarnation) not in constraints.incompatible_pairs

    pairs = [(p, d) for p, d in itertools.product(of(Role.PREFILL), of(Role.DECODE)) if fits(p, d)]
    if not pairs:
        return None
    p, d = min(pairs, key=lambda pair: (prefill_cost(pair[0]), decode_cost(pair[1], request)))
    return p.descriptor, d.descriptor


SMALL = st.integers(0, 3)


@st.composite
def clusters(draw):
    candidates = []
    for index in range(draw(st.integers(0, 9))):
        descriptor = replace(
            DESCRIPTOR,
            worker_id=f"w{draw(st.integers(0, 99))}-{index}",
            role=draw(st.sampled_from(list(Role))),
            incarnation=index,
            model=draw(st.sampled_from("mmmn")),
            content_digest=draw(st.sampled_from("aab")),
            block_size_tokens=draw(st.sampled_from((4, 6, 16))),
            num_blocks=12,
        )
        load = Load(draw(SMALL), draw(SMALL), draw(SMALL), draw(st.integers(0, 12)), 0)
        candidates.append(Candidate(descriptor, load, draw(SMALL), draw(SMALL)))
    incarnations = st.integers(0, 9)
    constraints = replace(
        PD,
        excluded=frozenset(
            c.descriptor.worker_id for c in candidates if draw(st.integers(0, 4)) == 0
        ),
        incompatible_pairs=draw(st.frozensets(st.tuples(incarnations, incarnations), max_size=25)),
    )
    return candidates, constraints


@settings(max_examples=500, deadline=None)
@given(clusters())
def test_the_pair_is_the_one_that_brute_force_over_all_pairs_finds(cluster):
    candidates, constraints = cluster
    expected = brute_force(candidates, REQUEST, constraints)
    try:
        placement = choose(candidates, REQUEST, constraints)
    except NoWorker:
        assert expected is None
    else:
        assert (placement.prefill, placement.decode) == expected


def worker(name, role=Role.DECODE, pending=0, pending_requests=0, **load):
    descriptor = replace(DESCRIPTOR, worker_id=name, role=role, incarnation=hash(name))
    return Candidate(descriptor, Load(**{"free_blocks": 100, **load}), pending, pending_requests)


P = worker("p", Role.PREFILL)


def test_tokens_that_were_sent_and_not_answered_count_as_prefill_load():
    busy = worker("p1", Role.PREFILL, pending=500)
    quiet = worker("p2", Role.PREFILL, waiting_tokens=400)
    assert choose([busy, quiet, worker("d")], REQUEST, PD).prefill.worker_id == "p2"


def test_of_equally_busy_decode_workers_the_one_with_more_room_is_chosen():
    tight, roomy = worker("d1", free_blocks=20), worker("d2", free_blocks=50)
    assert choose([P, tight, roomy], REQUEST, PD).decode.worker_id == "d2"
    cached = worker("d0", free_blocks=20, cached_blocks=60)
    assert choose([P, tight, roomy, cached], REQUEST, PD).decode.worker_id == "d0"


def test_room_for_the_prompt_comes_before_few_sequences():
    """40 tokens and the first of the answer need 4 blocks."""
    full = worker("d1", free_blocks=3, num_running=1)
    busy = worker("d2", free_blocks=4, num_running=9)
    assert choose([P, full, busy], REQUEST, PD).decode.worker_id == "d2"
    local = PlacementConstraints(PlacementConfig(path="local"))
    assert choose([full, busy], REQUEST, local).decode.worker_id == "d2"
    four = replace(REQUEST, sampling=SamplingParams(n=4))
    assert choose([P, full, busy], four, PD).decode.worker_id == "d1", "neither has room"


def test_the_prompt_alone_decides_what_stays_local_whatever_is_cached():
    """How many blocks a worker has cached does not say whose prompts they are."""
    auto, below = (
        PlacementConstraints(PlacementConfig(local_below_tokens=len(REQUEST.token_ids) + more))
        for more in (0, 1)
    )
    for d in (worker("d"), worker("d", free_blocks=0, cached_blocks=100)):
        assert choose([P, d], REQUEST, auto).path is Path.PD
        placement = choose([P, d], REQUEST, below)
        assert placement.path is Path.LOCAL
        assert placement.reason == "prompt of 40 tokens is below 41"


def test_a_misfit_pair_is_left_out_and_others_go_on():
    p2 = worker("p2", Role.PREFILL, waiting_tokens=9)
    d = worker("d")
    constraints = replace(
        PD, incompatible_pairs=frozenset({(P.descriptor.incarnation, d.descriptor.incarnation)})
    )
    assert choose([P, p2, d], REQUEST, constraints).prefill.worker_id == "p2"
    assert choose([P, d], REQUEST, replace(constraints, rules=PlacementConfig())).path is Path.LOCAL


def test_placement_takes_the_least_loaded_pair_whatever_the_order():
    pool = [
        loaded("p1", Role.PREFILL, waiting=500), loaded("p2", Role.PREFILL, waiting=5),
        loaded("d1", Role.DECODE, running=1), loaded("d2", Role.DECODE, running=9),
    ]  # fmt: skip
    for candidates in (pool, pool[::-1]):
        placement = choose(candidates, LONG_REQUEST, AUTO)
        assert (placement.path, placement.prefill.worker_id, placement.decode.worker_id) == (
            Path.PD,
            "p2",
            "d1",
        )


def test_placement_paths():
    p, d = loaded("p", Role.PREFILL), loaded("d", Role.DECODE)
    short = replace(LONG_REQUEST, token_ids=(1, 2, 3))
    assert choose([p, d], short, AUTO).path is Path.LOCAL
    assert choose([p, d], short, PlacementConstraints(PlacementConfig(path="pd"))).path is Path.PD
    assert (
        choose(
            [p, d], LONG_REQUEST, PlacementConstraints(PlacementConfig(path="local"))
        ).decode.worker_id
        == "d"
    )
    assert choose([p], LONG_REQUEST, AUTO).decode.worker_id == "p", (
        "a prefill loaded decodes when nobody else lives"
    )
    assert choose([d], LONG_REQUEST, AUTO).path is Path.LOCAL
    assert (
        choose(
            [p, d],
            LONG_REQUEST,
            PlacementConstraints(PlacementConfig(path="pd"), must_be_local=True),
        ).path
        is Path.LOCAL
    )
    assert (
        choose([p, loaded("x", Role.DECODE, content_digest="other")], LONG_REQUEST, AUTO).path
        is Path.LOCAL
    )
    for candidates, wish in (
        ([], AUTO),
        ([p], PlacementConstraints(PlacementConfig(path="pd"))),
        ([d], PlacementConstraints(PlacementConfig(path="pd"))),
    ):
        with pytest.raises(NoWorker, match="raise pools"):
            choose(candidates, LONG_REQUEST, wish)


def test_a_single_token_is_not_handed_over_whatever_the_path():
    single = replace(LONG_REQUEST, sampling=SamplingParams(max_tokens=1))
    pool = [loaded("p", Role.PREFILL), loaded("d", Role.DECODE)]
    for constraints in (AUTO, PD):
        placement = choose(pool, single, constraints)
        assert (placement.path, placement.decode.worker_id) == (Path.LOCAL, "d")
        assert placement.reason == "a single token is not handed over"
    assert choose(pool, LONG_REQUEST, AUTO).path is Path.PD


def test_a_suspect_is_avoided_while_another_is_left():
    p, d1, d2 = (
        loaded("p", Role.PREFILL),
        loaded("d1", Role.DECODE),
        loaded("d2", Role.DECODE, running=5),
    )
    wish = PlacementConstraints(PlacementConfig(path="pd"), excluded=frozenset({"d1"}))
    assert choose([p, d1, d2], LONG_REQUEST, wish).decode.worker_id == "d2"
    assert choose([p, d1], LONG_REQUEST, wish).decode.worker_id == "d1"


def test_the_cheapest_with_a_partner_serves_however_many_cheaper_ones_have_none():
    alone = [loaded(f"a{i}", Role.PREFILL, content_digest="other") for i in range(MAX_SHOWN + 3)]
    far, near = (loaded(name, Role.PREFILL, waiting=w) for name, w in (("b", 900), ("c", 800)))
    placement = choose([*alone, far, near, loaded("d", Role.DECODE)], LONG_REQUEST, AUTO)
    assert (placement.path, placement.prefill.worker_id) == (Path.PD, "c")


def test_kv_goes_to_blocks_of_a_multiple_and_to_no_others():
    """The best receiver has blocks that neither fit into the sender's nor hold them."""
    receivers = [
        loaded(f"d{size}", Role.DECODE, running=n, block_size_tokens=size)
        for n, size in enumerate((24, 64, 16, 8))
    ]
    sender = loaded("p", Role.PREFILL)
    left = list(receivers)
    for name in ("d64", "d16", "d8"):
        assert choose([sender, *left], LONG_REQUEST, PD).decode.worker_id == name
        left = [c for c in left if c.worker_id != name]
    with pytest.raises(NoWorker, match="layouts differ"):
        choose([sender, *left], LONG_REQUEST, PD)


def test_who_serves_both_phases_is_found_by_room_then_sequences_then_blocks_in_use():
    """More workers than are shown, of which few have room."""
    full = [worker(f"f{i}", free_blocks=1) for i in range(MAX_SHOWN + 2)]
    busy, roomy = worker("busy", num_running=2), worker("roomy", num_running=1)
    used = worker("a", num_running=1, free_blocks=60)
    pool = [*full, busy, used, roomy]
    local = PlacementConstraints(PlacementConfig(path="local"))
    placement = choose(pool, REQUEST, local)
    order = [cost.worker_id for cost in placement.local_costs]
    assert placement.decode.worker_id == "roomy"
    assert order == ["roomy", "a", "busy", *(f"f{i}" for i in range(MAX_SHOWN - 3))]
