"""What requests and refusals add to the metrics."""

import re
from types import SimpleNamespace

import pytest

from core import metrics
from core.config import TierConfig
from core.config.tiers import MAX_TIERS
from core.config.transfer import TRANSPORTS
from core.errors import Cancelled, DuplicateRequest, InternalError, TooLate
from core.prefix_changes import StorageTier
from core.tenant_classes import MAX_CLASSES, TenantClasses
from core.timeline import Timeline
from core.types import RequestEnded, RequestTiming, Usage
from router.access.identities import Identity
from router.calls import Call
from router.observe.telemetry import SHORTAGE_CODES, Telemetry
from router.prefix_outcome import PromptOutcome, TokenOutcome
from router.refusals import CODES

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


def asked(tier, tenant_class="default"):
    """As much of a request as is counted."""
    return SimpleNamespace(tier=tier, tenant_class=tenant_class)


def ended(
    telemetry,
    tier,
    ttft_s,
    error=None,
    timing=NOTHING_TIMED,
    cost=None,
    tenant_class="default",
):
    """A request of four prompt tokens, two of them cached, with two output tokens."""
    timeline = Timeline(10.0)
    timeline.delivered(10.0 + ttft_s, 1)
    timeline.delivered(10.0 + ttft_s + 0.25, 1)
    run = SimpleNamespace(timeline=timeline, request=asked(tier, tenant_class))
    usage = Usage(prompt_tokens=4, completion_tokens=2, cached_tokens=2, cost=cost)
    telemetry.request_ended(run, RequestEnded(usage, error, timing), "http")


def test_what_requests_cost_is_counted_for_tiers_with_prices():
    tiers = {"gold": TierConfig(output_price_per_mtok=3.0), "batch": TierConfig()}
    telemetry = Telemetry({}, tiers)
    try:
        assert line(telemetry, 'baton_cost_total{tenant_class="default",tier="gold"}') == 0
        ended(telemetry, "gold", 0.5, cost=1.5)
        ended(telemetry, "gold", 0.5, TooLate("full"), cost=0.25)
        ended(telemetry, "batch", 0.5)
        assert line(telemetry, 'baton_cost_total{tenant_class="default",tier="gold"}') == 1.75
        assert line(telemetry, 'baton_cost_total{tenant_class="default",tier="batch"}') == 0
    finally:
        telemetry.close()


def test_tokens_latencies_and_the_slo_are_counted_by_tier():
    telemetry = Telemetry({}, {"gold": TierConfig(slo_ttft_s=1.0), "batch": TierConfig()})
    try:
        for result in ("met", "missed"):
            assert (
                line(telemetry, f'{SLO}{{result="{result}",tenant_class="default",tier="gold"}}')
                == 0
            )
        assert (
            line(telemetry, 'baton_prompt_tokens_total{tenant_class="default",tier="batch"}') == 0
        )
        ended(telemetry, "gold", 0.5)
        ended(telemetry, "gold", 2.0)
        ended(telemetry, "gold", 0.5, TooLate("full"))
        ended(telemetry, "gold", 0.5, Cancelled("left"))
        ended(telemetry, "batch", 50.0)
        assert line(telemetry, f'{SLO}{{result="met",tenant_class="default",tier="gold"}}') == 1
        assert line(telemetry, f'{SLO}{{result="missed",tenant_class="default",tier="gold"}}') == 2
        assert line(telemetry, f'{SLO}{{result="met",tenant_class="default",tier="batch"}}') == 1
        assert (
            line(telemetry, 'baton_prompt_tokens_total{tenant_class="default",tier="gold"}') == 16
        )
        assert (
            line(telemetry, 'baton_generation_tokens_total{tenant_class="default",tier="gold"}')
            == 8
        )
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
            telemetry.request_refused(asked("gold"), error, "http")
        assert line(telemetry, f'{SLO}{{result="missed",tenant_class="default",tier="gold"}}') == 1
        assert line(telemetry, f'{SLO}{{result="met",tenant_class="default",tier="gold"}}') == 0
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
    assert len(labels) == 3 and set(labels.values()) == {("storage",)}


REQUEST_LEVEL = {
    "baton_requests_total": 4 * 16,
    "baton_slo_requests_total": 2 * 16 * 16,
    "baton_prompt_tokens_total": 16 * 16,
    "baton_generation_tokens_total": 16 * 16,
    "baton_cost_total": 16 * 16,
}
"""Most series of each family: outcomes or results, tiers, classes."""


def test_what_tenants_ask_for_is_counted_by_their_class():
    telemetry = Telemetry({}, {"gold": TierConfig(slo_ttft_s=1.0)}, TenantClasses(["vip", "trial"]))
    try:
        ended(telemetry, "gold", 0.5, cost=2.5, tenant_class="vip")
        ended(telemetry, "gold", 5.0, cost=1.5, tenant_class="trial")
        telemetry.request_refused(asked("gold", "trial"), TooLate("full"), "http")
        of = {name: f'tenant_class="{name}",tier="gold"' for name in ("vip", "trial", "default")}
        assert [line(telemetry, f"baton_cost_total{{{of[name]}}}") for name in of] == [2.5, 1.5, 0]
        tokens = [line(telemetry, f"baton_prompt_tokens_total{{{of[name]}}}") for name in of]
        assert tokens == [4, 4, 0]
        output = [line(telemetry, f"baton_generation_tokens_total{{{of[name]}}}") for name in of]
        assert output == [2, 2, 0]
        met = [line(telemetry, f'{SLO}{{result="met",{of[name]}}}') for name in of]
        missed = [line(telemetry, f'{SLO}{{result="missed",{of[name]}}}') for name in of]
        assert (met, missed) == ([1, 0, 0], [0, 2, 0])
        for name, code, num in (("trial", "too_late", 1), ("vip", "rate_limit_exceeded", 0)):
            refused = f'{{code="{code}",server="http",tenant_class="{name}"}}'
            assert line(telemetry, f"baton_refusals_total{refused}") == num
        requests = 'baton_requests_total{outcome="finished",tenant_class="vip"}'
        assert line(telemetry, requests) == 1
    finally:
        telemetry.close()


def test_no_more_series_than_listed_classes_whatever_keys_and_callers_say():
    """A router may hold requests whose keys are of a class that its config does not list."""
    tiers = {f"t{n}": TierConfig() for n in range(MAX_TIERS)}
    telemetry = Telemetry({}, tiers, TenantClasses([f"c{n}" for n in range(MAX_CLASSES - 1)]))
    try:
        for n in range(40):
            tier = f"t{n % MAX_TIERS}"
            ended(telemetry, tier, 0.5, cost=1.0, tenant_class=f"c{n}")
            telemetry.request_refused(asked(tier, f"tenant{n}"), TooLate("full"), "http")
            who = Identity(tier=tier, tenant_class=f"tenant{n}")
            telemetry.call_refused(Call("grpc", identity=who, code="too_late", outcome="rejected"))
        text = telemetry.text().decode()
        for family, most in REQUEST_LEVEL.items():
            assert text.count(f"\n{family}{{") == most, family
        # Of every code the default class, of those of a shortage the others.
        most = 2 * (len(CODES) + len(SHORTAGE_CODES) * (MAX_CLASSES - 1))
        assert text.count("\nbaton_refusals_total{") == most < 400
        assert not re.search("tenant[0-9]|c15", text)
    finally:
        telemetry.close()


def test_a_caller_without_a_key_is_of_no_class(telemetry):
    telemetry.call_refused(Call("http", code="invalid_api_key"))
    refused = 'baton_refusals_total{code="invalid_api_key",server="http",tenant_class='
    assert line(telemetry, f'{refused}"none"}}') == 1
    assert line(telemetry, f'{refused}"default"}}') == 0
