"""Rates, attainment and occupancy from what a router said twice."""

from dataclasses import replace

import pytest
from support.top_snapshots import FIRST, LINKS, RESTARTED, SECOND

from cli.top_figures import WINDOW_S, Window, totals_of


def figures(*snapshots):
    window = Window()
    for one in snapshots:
        window.add(one)
    return window.figures()


def test_rates_are_what_counters_grew_by_in_the_time_between():
    found = figures(FIRST, SECOND)
    assert found["window_s"] == 10.0
    assert found["requests_per_s"] == 4.0
    assert found["prompt_tokens_per_s"] == 100.0
    assert found["output_tokens_per_s"] == 80.0
    assert found["kv_bytes_per_s"] == 3e6
    assert found["links"] == LINKS and found["models"] == ["m"]


def test_a_tier_has_its_queue_and_the_attainment_of_this_window():
    tiers = figures(FIRST, SECOND)["tiers"]
    assert tiers["interactive"] == {
        "running": 2,
        "queued": 0,
        "refused": 0,
        "attainment": 0.9,
        "requests_per_s": 4.0,
        "output_tokens_per_s": 80.0,
    }
    assert tiers["batch"]["queued"] == 7 and tiers["batch"]["attainment"] is None


def test_a_worker_has_its_queue_its_blocks_and_its_preemptions():
    by_name = {worker["worker_id"]: worker for worker in figures(FIRST, SECOND)["workers"]}
    decode = by_name["decode-0"]
    assert (decode["used_blocks"], decode["cached_blocks"]) == (104, 20)
    assert decode["preemptions_per_s"] == 0.5
    assert (by_name["prefill-0"]["waiting"], by_name["prefill-0"]["waiting_tokens"]) == (2, 900)
    assert by_name["decode-1"]["used_blocks"] == 0, "it has reported nothing yet"


def test_one_look_tells_no_rate():
    found = figures(FIRST)
    rates = [name for name in found if name.endswith("_per_s")]
    assert len(rates) == 4 and all(found[name] is None for name in rates)
    assert found["tiers"]["interactive"]["attainment"] is None
    assert found["workers"][1]["used_blocks"] == 104


def test_a_router_that_restarts_begins_a_new_window():
    assert figures(FIRST, SECOND, RESTARTED)["requests_per_s"] is None
    later = replace(SECOND, at_s=RESTARTED.at_s + 4.0)
    assert figures(FIRST, SECOND, RESTARTED, later)["requests_per_s"] == 12.0


def test_another_router_begins_a_new_window_however_much_it_has_counted():
    """Routers behind one address answer in turn: what one has counted is no growth of another."""
    other = replace(SECOND, router="router-2")
    found = figures(FIRST, other)
    assert (found["router"], found["requests_per_s"]) == ("router-2", None)


def test_the_window_is_the_last_minute():
    idle = [replace(SECOND, at_s=SECOND.at_s + n) for n in range(1, int(WINDOW_S) + 1)]
    assert figures(FIRST, SECOND, *idle[:-1])["requests_per_s"] > 0
    assert figures(FIRST, SECOND, *idle)["requests_per_s"] == 0.0


def test_what_is_no_exposition_is_refused():
    with pytest.raises(ValueError, match="."):
        totals_of("<html>hello</html>")
