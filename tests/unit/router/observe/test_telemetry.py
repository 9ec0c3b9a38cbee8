"""What requests and refusals add to the metrics."""

from types import SimpleNamespace

import pytest

from core import metrics
from core.config import TierConfig
from core.config.transfer import TRANSPORTS
from core.errors import Cancelled, DuplicateRequest, InternalError, TooLate
from core.prefix_changes import StorageTier
from core.timeline import Timeline
from core.types import RequestEnded, RequestTiming, Usage
from router.observe.telemetry import Telemetry
from router.prefix_outcome import PromptOutcome, TokenOutcome

SLO = "baton_slo_requests_total"
HITS = "baton_prefix_storage_hit_tokens_total"
HAND_OVERS = "baton_kv_transfers_total"
NOTHING_TIMED = RequestTiming()


@pytest.fixture
def telemetry():
    made = Telemetry({metrics.PREFIX_AGE: lambda: {"": 0.25}})
    yield made
    made.close()


def line(telemetry, name):
    [found] = [x for x in telemetry.text().decode().splitlines() if x.startswith(name)]
    return float(found.split()[-1])


def test_outcomes_of_prompts_are_counted_and_each_begins_at_zero(telemetry):
    for outcome in TokenOutcome:
        assert line(telemetry, f'baton_prefix_tokens_total{{outcome="{outcome.value}"}}') == 0
    for tier in (*StorageTier.__members__, "unpublished"):
        assert line(telemetry, f'{HITS}{{storage="{tier.lower()}"}}') == 0
    tokens = {TokenOutcome.HIT: 32, TokenOutcome.EVICTED: 16, TokenOutcome.NOT_CACHED: 5}
    outcome = PromptOutcome(tokens, {"disk": 32, "unpublished": 0}, TokenOutcome.EVICTED)
    for _ in range(2):
        telemetry.prompt_computed(outcome)
    assert line(telemetry, 'baton_prefix_tokens_total{outcome="hit"}') == 64
    assert line(telemetry, 'baton_prefix_tokens_total{outcome="evicted"}') == 32
    assert line(telemetry, f'{HITS}{{storage="disk"}}') == 64
    assert line(telemetry, 'baton_prefix_stale_placements_total{cause="evicted"}') == 2
    assert line(telemetry, 'baton_prefix_stale_placements_total{cause="stale"}') == 0


def ended(telemetry, tier, ttft_s, error=None, timing=NOTHING_TIMED, cost=None):
    """A request of four prompt tokens, two of them cached, with two output tokens."""
    timeline = Timeline(10.0)
    timeline.delivered(10.0 + ttft_s, 1)
    timeline.delivered(10.0 + ttft_s + 0.25, 1)
    run = SimpleNamespace(timeline=timeline, request=SimpleNamespace(tier=tier))
    usage = Usage(prompt_tokens=4, completion_tokens=2, cached_tokens=2, cost=cost)
    telemetry.request_ended(run, RequestEnded(usage, error, timing), "http")


def test_what_requests_cost_is_counted_for_tiers_with_prices():
    tiers = {"gold": TierConfig(output_price_per_mtok=3.0), "batch": TierConfig()}
    telemetry = Telemetry({}, tiers)
    try:
        assert line(telemetry, 'baton_cost_total{tier="gold"}') == 0
        ended(telemetry, "gold", 0.5, cost=1.5)
        ended(telemetry, "gold", 0.5, TooLate("full"), cost=0.25)
        ended(telemetry, "batch", 0.5)
        assert line(telemetry, 'baton_cost_total{tier="gold"}') == 1.75
        assert line(telemetry, 'baton_cost_total{tier="batch"}') == 0
    finally:
        telemetry.close()


def test_tokens_latencies_and_the_slo_are_counted_by_tier():
    telemetry = Telemetry({}, {"gold": TierConfig(slo_ttft_s=1.0), "batch": TierConfig()})
    try:
        for result in ("met", "missed"):
            assert line(telemetry, f'{SLO}{{result="{result}",tier="gold"}}') == 0
        assert line(telemetry, 'baton_prompt_tokens_total{tier="batch"}') == 0
        ended(telemetry, "gold", 0.5)
        ended(telemetry, "gold", 2.0)
        ended(telemetry, "gold", 0.5, TooLate("full"))
        ended(telemetry, "gold", 0.5, Cancelled("left"))
        ended(telemetry, "batch", 50.0)
        assert line(telemetry, f'{SLO}{{result="met",tier="gold"}}') == 1
        assert line(telemetry, f'{SLO}{{result="missed",tier="gold"}}') == 2
        assert line(telemetry, f'{SLO}{{result="met",tier="batch"}}') == 1
        assert line(telemetry, 'baton_prompt_tokens_total{tier="gold"}') == 16
        assert line(telemetry, 'baton_generation_tokens_total{tier="gold"}') == 8
        assert line(telemetry, 'baton_prefix_hit_tokens_total{tier="batch"}') == 2
        assert line(telemetry, 'baton_ttft_seconds_sum{tier="batch"}') == 50
        assert line(telemetry, 'baton_itl_seconds_count{tier="gold"}') == 4
    finally:
        telemetry.close()


def test_hand_overs_are_counted_by_transport_and_a_workers_word_is_no_label():
    telemetry = Telemetry({}, {"gold": TierConfig()})
    try:
        for transport in TRANSPORTS:
            assert line(telemetry, f'{HAND_OVERS}{{transport="{transport}"}}') == 0
        for word in ("gloo", "gloo", "carrier pigeon", "smoke"):
            ended(telemetry, "gold", 0.5, timing=RequestTiming(kv_transport=word))
        assert line(telemetry, f'{HAND_OVERS}{{transport="gloo"}}') == 2
        assert line(telemetry, f'{HAND_OVERS}{{transport="other"}}') == 2
        assert b"pigeon" not in telemetry.text()
    finally:
        telemetry.close()


def test_a_request_that_a_fault_kept_from_running_misses_the_slo_and_a_duplicate_does_not():
    telemetry = Telemetry({}, {"gold": TierConfig()})
    try:
        for error in (InternalError("a bug"), DuplicateRequest("runs already")):
            telemetry.request_refused("gold", error, "http")
        assert line(telemetry, f'{SLO}{{result="missed",tier="gold"}}') == 1
        assert line(telemetry, f'{SLO}{{result="met",tier="gold"}}') == 0
    finally:
        telemetry.close()


def test_a_retry_has_a_series_before_the_first_one(telemetry):
    for reason in ("worker_lost", "kv_transfer_failed", "pool_exhausted", "step_failed"):
        assert line(telemetry, f'baton_retries_total{{reason="{reason}"}}') == 0


def test_how_far_predictions_were_off_is_counted_by_path_and_never_below_zero(telemetry):
    """Two that came 0.5 s late and 2 s early, one not measured, one without any other candidate."""
    for error_s, regret_s in ((0.5, 0.25), (-2.0, -1.0), (None, None), (0.25, None)):
        telemetry._note_placement(
            RequestTiming(path="pd", placement_error_s=error_s, placement_regret_s=regret_s)
        )
    error = "baton_placement_error_seconds"
    assert line(telemetry, f'{error}_sum{{direction="late",path="pd"}}') == 0.75
    assert line(telemetry, f'{error}_count{{direction="late",path="pd"}}') == 2
    assert line(telemetry, f'{error}_sum{{direction="early",path="pd"}}') == 2.0
    assert line(telemetry, 'baton_placement_regret_seconds_count{path="pd"}') == 2
    assert line(telemetry, 'baton_placement_regret_seconds_sum{path="pd"}') == 0.25


def test_a_gauge_without_labels_is_one_number(telemetry):
    assert line(telemetry, "baton_prefix_index_age_seconds") == 0.25


def test_a_storage_tier_has_one_label_and_a_keys_tier_another():
    """A dashboard joins metrics by their labels."""
    by_tier = [m for m in metrics.ALL if "storage tier" in m.description and m.labels]
    labels = {m.name: m.labels for m in by_tier if m is not metrics.STORAGE_FAULTS}
    assert len(labels) == 5 and set(labels.values()) == {("storage",)}
