"""What of a prompt's cached beginning is counted."""

import pytest

from core import metrics
from core.prefix_changes import StorageTier
from router.observe.telemetry import Telemetry
from router.prefix_outcome import PromptOutcome, TokenOutcome

HITS = "baton_prefix_storage_hit_tokens_total"


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


def test_a_gauge_without_labels_is_one_number(telemetry):
    assert line(telemetry, "baton_prefix_index_age_seconds") == 0.25


def test_a_storage_tier_has_one_label_and_a_keys_tier_another():
    """A dashboard joins metrics by their labels."""
    by_tier = [m for m in metrics.ALL if "storage tier" in m.description and m.labels]
    labels = {m.name: m.labels for m in by_tier if m is not metrics.STORAGE_FAULTS}
    assert len(labels) == 3 and set(labels.values()) == {("storage",)}
