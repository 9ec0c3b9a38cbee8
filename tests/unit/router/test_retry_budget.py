"""How many attempts anew a router allows, and how many at once."""

import itertools

import pytest

from core.clocks import LoopClock
from core.config import RouterConfig
from router.attempts import Attempts
from router.peer_fetches import PeerFetches
from router.prompt_prefixes import PromptPrefixes
from router.request_state import RequestObserver
from router.retry_budget import RetryBudget

# --- retries --------------------------------------------------------------------------------------


def test_routers_share_the_retries_and_each_has_one_at_least():
    for replicas, burst in ((1, 6), (2, 3), (6, 1), (9, 1)):
        config = RouterConfig(replicas=replicas, retry_burst=6, retry_per_s=18.0)
        prefixes = PromptPrefixes(None, b"", LoopClock())
        fetches = PeerFetches(None, None, LoopClock())
        parts = (None, config, LoopClock(), None, prefixes, fetches, None, RequestObserver())
        budget = Attempts(*parts)._budget
        delays = [budget.reserve(10.0, 99.0) for _ in range(burst + 1)]
        assert delays == [0.0] * burst + [pytest.approx(replicas / 18)]


def test_a_burst_is_as_many_retries_as_it_says():
    budget = RetryBudget(burst=3, per_s=2.0)
    delays = [budget.reserve(10.0, 9.0) for _ in range(5)]
    assert delays == [0.0, 0.0, 0.0, pytest.approx(0.5), pytest.approx(1.0)]
    assert budget.reserve(10.0, 1.4) is None, "the next would wait 1.5 s"
    assert budget.reserve(10.0, 1.6) == pytest.approx(1.5), "and the refusal took nothing"
    assert list(itertools.islice((budget.reserve(99.0, 9.0) for _ in range(3)), 3)) == [0.0] * 3


def test_the_retry_budget_allows_its_burst_then_its_rate_and_refuses_beyond_patience():
    budget = RetryBudget(burst=4, per_s=2.0)
    assert [budget.reserve(10.0, 3.0) for _ in range(6)] == [0, 0, 0, 0, 0.5, 1.0]
    waits = [budget.reserve(10.0, 3.0) for _ in range(5)]
    assert waits == [1.5, 2.0, 2.5, 3.0, None]
    assert budget.reserve(10.0, 3.0) is None, "a refusal takes nothing"
    assert budget.reserve(100.0, 0.0) == 0, "rest refills it"
