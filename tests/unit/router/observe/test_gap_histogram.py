"""What gaps between tokens add to the metrics."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from core.metrics import ITL
from router.observe.gap_histogram import GapHistogram


@pytest.fixture
def histogram():
    return GapHistogram(ITL, (0.25, 0.5))


def scraped(histogram):
    """Return every sample by its suffix and its labels' values, sorted."""
    registry = CollectorRegistry()
    registry.register(histogram)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name.removeprefix(ITL.name), *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_gap_counts_in_every_bucket_from_its_own_on(histogram):
    """A bound belongs to its bucket, and what is above them all is counted."""
    histogram.record("gold", [0.125, 0.25, 0.375])
    histogram.record("gold", [0.5, 8.0])
    histogram.record("batch", [0.375])
    assert scraped(histogram) == {
        ("_bucket", "0.25", "gold"): 2,
        ("_bucket", "0.5", "gold"): 4,
        ("_bucket", "+Inf", "gold"): 5,
        ("_count", "gold"): 5,
        ("_sum", "gold"): 9.25,
        ("_bucket", "0.25", "batch"): 0,
        ("_bucket", "0.5", "batch"): 1,
        ("_bucket", "+Inf", "batch"): 1,
        ("_count", "batch"): 1,
        ("_sum", "batch"): 0.375,
    }


def test_a_label_without_a_gap_is_not_shown(histogram):
    histogram.record("gold", [])
    assert scraped(histogram) == {}
