"""Whether a prompt crosses or stays, by price; and when prices are not believed."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.placing import choose

from core.config import PlacementConfig
from core.session import Load, Role, WorkerDescriptor
from core.types import GenerateRequest, Path, SamplingParams
from router.cost import Cost
from router.observe.why import why_of
from router.path_choice import MAX_SPEED_RATIO, choose_path
from router.placement import PlacementConstraints
from router.regret import MeasuredCost, regret_of
from router.workers.load import WorkerLoad

DESCRIPTOR = WorkerDescriptor("p", Role.PREFILL, 1, "a", "b", "m", "digest", 16, 10_000, 65_536)
PROMPT = GenerateRequest("r", "m", tuple(range(1_000)), SamplingParams(), 1, 0.0)
AUTO = PlacementConstraints()
RULES = PlacementConfig()


def worker(name, role, *, queued=0, decoding=0, seconds=1.0):
    """A worker that took `seconds` for 1,000 tokens, as its router knows it."""
    load = WorkerLoad(replace(DESCRIPTOR, worker_id=name, role=role))
    load.measured(1_000, seconds, 0.0)
    load.report(Load(num_running=decoding, waiting_tokens=queued, free_blocks=10_000), 0.0)
    return load


def prefill(**known):
    return worker("p", Role.PREFILL, **known)


def decode(**known):
    return worker("d", Role.DECODE, **known)


def placed(*loads, rules=RULES):
    return choose([load.candidate for load in loads], PROMPT, PlacementConstraints(rules))


def test_a_prompt_stays_at_an_idle_decode_worker_while_the_prefill_pool_is_busy():
    placement = placed(prefill(queued=4_000), decode())
    assert (placement.path, placement.decode.worker_id) == (Path.LOCAL, "d")
    assert placement.reason == (
        "prompt is not worth a transfer: 1000 ms at d and 0 ms for others there, 5000 ms across"
    )


def test_a_prompt_crosses_to_a_busy_decode_worker():
    for queued in (0, 4_000):
        placement = placed(prefill(queued=queued), decode(decoding=8))
        assert placement.path is Path.PD
        assert placement.reason == (
            "prompt is worth a transfer: 1128 ms at d and 8000 ms for others there, "
            f"{1_000 + queued} ms across"
        )
    shown = why_of(placement)["candidates"]
    assert [(c["path"], c["total_ms"], c["delay_ms"]) for c in shown] == [
        ("pd", 5_000.0, 0.0),
        ("local", 1_128.0, 8_000.0),
    ]


def test_a_prompt_crosses_where_both_are_idle():
    assert placed(prefill(), decode()).path is Path.PD


def test_requests_that_still_wait_for_their_prompt_elsewhere_are_not_delayed():
    expecting = decode()
    for number in range(8):
        expecting.add(f"r{number}", 0, 0.0)
    busy = prefill(queued=4_000)
    assert placed(busy, expecting).path is Path.LOCAL
    for number in range(8):
        expecting.answered(f"r{number}", 0.0)
    assert placed(busy, expecting).path is Path.PD


@pytest.mark.parametrize(("late_s", "path"), [(0.2, Path.PD), (0.5, Path.LOCAL)])
def test_the_transfer_counts_by_the_route_to_the_receiver(late_s, path):
    sender = prefill()
    sender.handed_over("another", 5.0, 0.0)
    sender.handed_over("d", late_s, 0.0)
    placement = placed(sender, decode())
    assert placement.path is path
    assert placement.prefill_costs[0].transfer_s == late_s


@pytest.mark.parametrize("saving", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("queued", [0, 500, 2_000, 4_000, 100_000])
def test_a_long_prompt_stays_only_if_it_saves_the_configured_share(saving, queued):
    placement = placed(
        prefill(queued=queued), decode(), rules=PlacementConfig(min_local_saving=saving)
    )
    saves = queued / (queued + 1_000)
    assert placement.path is (Path.LOCAL if saves > saving else Path.PD)


def test_a_short_prompt_stays_at_whatever_price():
    rules = PlacementConfig(local_below_tokens=1_001)
    placement = placed(prefill(), decode(decoding=50), rules=rules)
    assert placement.path is Path.LOCAL
    assert placement.reason == "prompt of 1000 tokens is below 1001"


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_without_a_speed_the_threshold_decides(seconds):
    silent = prefill(queued=4_000, seconds=seconds)
    placement = placed(silent, decode())
    assert placement.path is Path.PD
    assert placement.reason == "prompt is worth a transfer: the speed of p is not measured"
    short = PlacementConfig(local_below_tokens=1_001)
    assert placed(silent, decode(), rules=short).path is Path.LOCAL


def test_a_stale_speed_is_none():
    busy = prefill(queued=4_000)
    assert placed(busy, decode()).path is Path.LOCAL
    busy.report(busy.reported, 600.0)
    placement = placed(busy, decode())
    assert placement.path is Path.PD and placement.reason.endswith("is not measured")


def test_a_decode_worker_that_computed_no_prompt_yet_counts_like_the_others():
    assert placed(prefill(queued=4_000), decode(seconds=0.0)).path is Path.LOCAL


@pytest.mark.parametrize("spike", [1e-3, 1e3])
def test_speeds_that_are_too_far_apart_are_not_believed(spike):
    placement = placed(prefill(queued=4_000), decode(seconds=spike))
    assert placement.path is Path.PD
    assert placement.reason == (
        f"prompt is worth a transfer: 1000 tokens/s at p and {1_000 / spike:.0f} at d are too far "
        "apart"
    )
    fast = placed(prefill(queued=4_000), decode(seconds=1.0 / MAX_SPEED_RATIO))
    assert fast.path is Path.LOCAL


def test_a_prediction_that_is_no_number_is_not_compared():
    cost = Cost("d", 0, 1_000, 0, 1.0, 0.0, 0.0, 1.0, measured_tokens_per_s=1_000.0)
    for bad in (math.nan, math.inf):
        for across, local in (
            (replace(cost, transfer_s=bad), cost),
            (cost, replace(cost, delay_s=bad)),
        ):
            found = choose_path(across, (local,), RULES)
            assert found.local is None and found.reason.endswith("a prediction is no number")


PRICES = st.floats(0, 100)


@given(PRICES, st.lists(st.tuples(PRICES, PRICES), min_size=1, max_size=5), st.floats(0, 1))
def test_what_is_chosen_is_never_dearer_by_more_than_the_saving(across_s, local_s, saving):
    across = Cost("p", 0, 1_000, 0, across_s, 0.0, 0.0, 0.0, measured_tokens_per_s=1_000.0)
    local = [
        Cost(f"d{i}", 0, 1_000, 0, own_s, 0.0, 0.0, 0.0, delay_s=others_s)
        for i, (own_s, others_s) in enumerate(local_s)
    ]
    found = choose_path(across, local, PlacementConfig(min_local_saving=saving))
    least_s = min(own_s + others_s for own_s, others_s in local_s)
    if found.local is None:
        assert least_s >= (1 - saving) * across_s - 1e-9
    else:
        assert found.local.price_s == least_s < across_s


def test_of_a_holder_and_an_idle_receiver_the_cheaper_one_computes():
    holder = worker("h", Role.DECODE, decoding=6)
    pool = [load.candidate for load in (prefill(queued=4_000), holder, decode())]
    for blocks, name in ((20, "d"), (60, "h")):
        placement = choose(pool, PROMPT, AUTO, {"h": blocks})
        assert (placement.path, placement.decode.worker_id) == (Path.LOCAL, name)
        assert placement.local_costs[0].worker_id == name, "the chosen one is shown first"


def test_who_has_no_room_does_not_compute_while_another_has():
    full = worker("h", Role.DECODE)
    full.report(Load(free_blocks=3), 0.0)
    pool = [load.candidate for load in (prefill(queued=4_000), full, decode())]
    assert choose(pool, PROMPT, AUTO, {"h": 60}).decode.worker_id == "d"


def test_the_other_path_is_regretted_by_what_it_would_have_cost_everybody():
    """To wait for a queue of 4 s is no mistake where eight sequences would have lost 1 s each."""
    placement = placed(prefill(queued=4_000), decode(decoding=8))
    found = regret_of(placement, MeasuredCost(queue_s=4.0, prefill_s=1.0))
    path, other = found.best_other
    assert (path, other.worker_id) == (Path.LOCAL, "d")
    assert found.regret_s == pytest.approx(5.0 - 1.128 - 8.0)
