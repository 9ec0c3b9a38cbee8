"""What is refused by a prediction, what never is, and when clients should come again."""

import random
from dataclasses import replace
from math import inf, nan

import pytest

from core.config import PlacementConfig, TierConfig
from core.ids import Ids
from core.session import Load, Role, WorkerDescriptor
from router.candidate import Candidate
from router.expected_wait import MIN_INTERVALS, MIN_PATIENCE_S, Ahead
from router.load_shedding import JITTER_SHARE, WORK_FRESH_S, LoadShedding
from router.refusals import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S

DESCRIPTOR = WorkerDescriptor("w", Role.PREFILL, 1, "a", "b", "m", "digest", 16, 10_000, 65_536)
FULL = Ahead(num_running=4, num_requests=9, num_tokens=0, is_free=False)
FREE = Ahead(num_running=3, num_requests=0, num_tokens=0, is_free=True)
TIER = "standard"
LONG = 1_000
SHORT = 8
INTERVAL_S = 0.5


class Router:
    """Shedding on a clock that the test sets, before workers that it makes."""

    def __init__(
        self,
        queue_wait_s=60.0,
        max_ttft_s=0.0,
        path="auto",
        seed=1,
        min_local_saving=0.25,
        **others,
    ):
        self.now = 1_000.0
        self.workers = []
        self.num_reads = 0
        ids = Ids(random.Random(seed))
        rules = PlacementConfig(path=path, min_local_saving=min_local_saving)
        tiers = {TIER: TierConfig(max_ttft_s=max_ttft_s), **others}
        self.shedding = LoadShedding(self, ids, tiers, queue_wait_s, rules, self.read)

    def now_s(self):
        return self.now

    def read(self, tier):
        self.num_reads += 1
        return self.workers

    def measure(self, interval_s=INTERVAL_S):
        """Release permits at a rate until it is known."""
        for _ in range(MIN_INTERVALS + 1):
            self.now += interval_s
            self.shedding.released(TIER, is_awaited=True)

    def refusal(self, ahead=FULL, num_tokens=None, deadline_at=None, tier=TIER):
        """The error with which a newcomer is refused; None: it is let in."""
        shortage = self.shedding.too_late(tier, ahead, num_tokens, deadline_at)
        return None if shortage is None else self.shedding.refusal(shortage)


def worker(tokens, tokens_per_s, role=Role.PREFILL, num_running=0):
    load = Load(waiting_tokens=tokens, num_running=num_running)
    descriptor = replace(DESCRIPTOR, role=role)
    return Candidate(descriptor, load, prefill_tokens_per_s=tokens_per_s)


def test_who_would_wait_longer_for_a_permit_than_anybody_may_is_refused_at_once():
    router = Router(queue_wait_s=5.0)
    assert router.refusal() is None, "nothing is known"
    router.measure()
    assert router.refusal() is None, "ten releases take just as long as it may wait"
    one_more = replace(FULL, num_requests=10)
    error = router.refusal(one_more)
    assert "5.50 s for a permit, router.queue_wait_s is 5.00 s" in error.message
    assert (error.code, error.http_status, error.grpc_status) == ("too_late", 503, "UNAVAILABLE")
    assert router.refusal(FREE) is None


def test_a_limit_on_the_first_token_counts_permits_and_workers_and_is_off_by_default():
    for max_ttft_s, is_refused in ((0.0, False), (4.9, True), (5.1, False)):
        router = Router(max_ttft_s=max_ttft_s)
        router.measure()
        assert bool(router.refusal()) == is_refused, max_ttft_s
    for max_ttft_s, is_refused in ((0.0, False), (1.9, True), (2.1, False)):
        router = Router(max_ttft_s=max_ttft_s)
        router.workers = [worker(2_000, 1_000.0)]
        assert bool(router.refusal(FREE, LONG)) == is_refused, max_ttft_s


def test_a_deadline_that_cannot_be_met_is_refused_at_once():
    router = Router()
    router.measure()
    assert router.refusal(deadline_at=router.now + 5.1) is None
    error = router.refusal(deadline_at=router.now + 4.0)
    assert "5.00 s for a permit, the time left to it is 4.00 s" in error.message
    assert "the time left to it is 0.00 s" in router.refusal(deadline_at=router.now - 9).message


def test_a_worker_that_seems_slow_makes_no_deadline_impossible():
    """It may have stood still for a while; the fault search found the refusals."""
    router = Router()
    router.measure()
    router.workers = [worker(2_000, 0.1)]
    assert router.refusal(FREE, LONG, router.now + 1.0) is None


def test_prompts_wait_for_the_workers_that_would_compute_them():
    busy = worker(2_000, 1_000.0)
    idle = worker(0, 1_000.0, Role.DECODE)
    decodes = worker(0, 1_000.0, Role.DECODE, num_running=1)
    for path, decode, num_tokens, is_refused in (
        ("auto", decodes, LONG, True),
        ("auto", decodes, SHORT, False),
        ("auto", decodes, None, False),
        ("auto", idle, LONG, False),
        ("pd", idle, LONG, True),
        ("local", decodes, LONG, False),
    ):
        router = Router(max_ttft_s=1.0, path=path)
        router.workers = [busy, decode]
        assert bool(router.refusal(FREE, num_tokens)) == is_refused, (path, num_tokens)
    router = Router(max_ttft_s=1.0, min_local_saving=1.0)
    router.workers = [busy, idle]
    assert router.refusal(FREE, LONG), "only short prompts are computed there"
    router = Router(max_ttft_s=1.0)
    router.workers = [worker(2_000, 1_000.0, Role.DECODE)]
    assert router.refusal(FREE, LONG), "there is no other"


SENSELESS = [nan, inf, -inf, -1.0, 0.0, 1e300]


@pytest.mark.parametrize("value", SENSELESS)
@pytest.mark.parametrize("field", ["prefill_tokens_per_s", "queued_tokens", "head_started_s"])
def test_figures_without_sense_refuse_nobody_who_comes_to_an_idle_router(field, value):
    router = Router(max_ttft_s=1.0)
    made = replace(worker(2_000, 1_000.0), head_tokens=1_000)
    assert router.refusal(FREE, LONG) is None
    object.__setattr__(made, field, value)
    router.workers = [made]
    idle = Ahead(num_running=0, num_requests=0, num_tokens=0, is_free=True)
    assert router.refusal(idle, LONG, router.now + 1.0) is None
    if not 0 < value < inf:
        assert field == "head_started_s" or router.refusal(FREE, LONG) is None


def test_one_request_always_runs_whatever_is_predicted():
    router = Router(queue_wait_s=0.1, max_ttft_s=0.1)
    router.measure()
    router.workers = [worker(10**9, 1.0)]
    assert router.refusal(FREE, LONG) and router.refusal(FULL)
    alone = replace(FREE, num_running=0)
    assert router.refusal(alone, LONG, router.now) is None


@pytest.mark.parametrize("jump_s", [MIN_PATIENCE_S + 0.1, 1e9, -1e9])
def test_after_a_stretch_without_releases_and_a_jump_of_the_clock_everybody_is_let_in(jump_s):
    router = Router(queue_wait_s=1.0, max_ttft_s=1.0)
    router.measure()
    router.workers = [worker(2_000, 1_000.0)]
    assert router.refusal() and router.refusal(FREE, LONG)
    router.now += jump_s
    router.workers = []
    assert router.refusal() is None and router.refusal(FREE, LONG) is None


def test_workers_are_asked_once_in_a_while_not_for_every_request():
    router = Router()
    for _ in range(100):
        router.shedding.too_late(TIER, FREE, LONG)
    assert router.num_reads == 1
    router.now += WORK_FRESH_S
    router.shedding.too_late(TIER, FREE, LONG)
    assert router.num_reads == 2


def waits_s(router, ahead):
    room_in_s = router.shedding.room_in_s(TIER, ahead)
    return [router.shedding.retry_after_s(room_in_s) for _ in range(500)]


def test_who_found_no_place_comes_again_when_those_before_it_will_be_gone():
    router = Router()
    unknown = waits_s(router, FULL)
    assert min(unknown) == MIN_RETRY_AFTER_S and max(unknown) < 1 + JITTER_SHARE
    router.measure()
    for num_ahead, expected_s in ((0, MIN_RETRY_AFTER_S), (9, 5.0), (39, 20.0)):
        found = waits_s(router, replace(FULL, num_requests=num_ahead))
        least_s = max(MIN_RETRY_AFTER_S, expected_s * (1 - JITTER_SHARE))
        assert least_s <= min(found) < least_s + 0.02 * expected_s
        most_s = expected_s * (1 + JITTER_SHARE)
        assert most_s - 0.02 * expected_s < max(found) <= most_s
    found = waits_s(router, replace(FULL, num_requests=10**6))
    assert max(found) == MAX_RETRY_AFTER_S
    assert min(found) < 0.76 * MAX_RETRY_AFTER_S, "they do not come back together either"


def test_who_would_come_too_late_comes_again_when_the_wait_will_be_short_enough():
    router = Router(queue_wait_s=2.0)
    router.measure()
    ahead = replace(FULL, num_requests=43)  # 22 s, of which it may wait 2
    found = [router.refusal(ahead).retry_after_s for _ in range(200)]
    assert 15.0 <= min(found) < 16.0 and 24.0 < max(found) <= 25.0


def test_equal_seeds_give_equal_waits():
    assert waits_s(Router(seed=7), FULL) == waits_s(Router(seed=7), FULL)
    assert waits_s(Router(seed=7), FULL) != waits_s(Router(seed=8), FULL)


def test_each_tier_has_its_own_limits():
    router = Router(max_ttft_s=4.9, low=TierConfig(), short=TierConfig(queue_wait_s=2.0))
    router.measure()
    assert "tiers.standard.max_ttft_s is 4.90 s" in router.refusal().message
    assert router.refusal(tier="low") is None
    error = router.refusal(tier="short")
    assert "5.00 s for a permit, tiers.short.queue_wait_s is 2.00 s" in error.message


def test_a_tier_that_has_its_share_waits_for_its_own_releases():
    router = Router(queue_wait_s=20.0, low=TierConfig(max_running_share=0.5))
    for n in range(3 * MIN_INTERVALS + 1):
        router.now += 1.0
        # Two of another tier between two of its own, which nobody waits for.
        tier = TIER if n % 3 else "low"
        router.shedding.released(tier, is_awaited=False, is_share_awaited=tier == "low")
    held = replace(FULL, num_own_releases=7)
    error = router.refusal(held, tier="low")
    assert "21.00 s for a permit, router.queue_wait_s is 20.00 s" in error.message
    assert router.refusal(replace(held, num_own_releases=6), tier="low") is None
    assert router.refusal(held) is None
