"""What a router remembers of requests that have ended: how many, whose, and nothing they said."""

import gc
from types import FunctionType, ModuleType, SimpleNamespace

import pytest

from core.errors import Draining, NoWorker, RequestNotFound, WorkerLost
from core.session import Load, Role, WorkerDescriptor
from core.timeline import Timeline
from core.types import GenerateRequest, RequestEnded, RequestTiming, SamplingParams, Usage
from router.candidate import Candidate
from router.charging import ReplyCost
from router.observe.explanations import Explanations
from router.observe.why import why_of
from router.placement import PlacementConstraints, choose
from router.quotas.ledger import Amount
from router.request_state import RequestState

SECRET = "the prompt of a tenant"
DECODE = WorkerDescriptor("d", Role.DECODE, 1, "a", "b", "m", "digest", 16, 10_000, 65_536)


class Memory:
    """A router's memory, and requests that end there."""

    def __init__(self, max_explained=8, num_routers=1):
        self.now_s = 100.0
        self.explanations = Explanations(max_explained, "router-1", num_routers, lambda: self.now_s)

    def run(self, name="r", tenant="acme"):
        """A request that began now."""
        sampling = SamplingParams()
        request = GenerateRequest(
            name, "m", tuple(range(161)), sampling, 1, 0.0, tenant=tenant, prompt_text=SECRET
        )
        run = RequestState(
            request, "run", None, SimpleNamespace(), Timeline(self.now_s), [], 256, rules=None
        )
        run.started_at = self.now_s
        pool = [Candidate(DECODE, Load(free_blocks=1_000))]
        run.placement = choose(pool, request, PlacementConstraints(), now_s=0.0)
        return run

    def end(self, run, error=None):
        timing = RequestTiming(ttft_s=0.25, queue_s=0.125, why=why_of(run.placement))
        self.explanations.note(run, RequestEnded(Usage(161, 4), error, timing))

    def serve(self, name="r", tenant="acme"):
        self.end(self.run(name, tenant))

    def known(self, tenant=None, names="abcdefgh"):
        return [name for name in names if self.explanations.of(name, tenant)]


def test_the_newest_requests_are_kept_and_older_ones_make_room():
    memory = Memory(max_explained=2)
    for name in "abc":
        memory.serve(name)
    assert memory.known() == ["b", "c"]
    memory.serve("b")  # the same id once more is one entry, and the newest
    memory.serve("d")
    assert memory.known() == ["b", "d"]


def test_a_tenant_is_told_of_its_own_requests_and_whoever_sees_all_of_any():
    memory = Memory()
    memory.serve("a", "acme")
    memory.serve("b", "bulk")
    memory.serve("c", "acme")
    memory.serve("c", "bulk")
    assert memory.known("acme") == ["a", "c"] and memory.known("bulk") == ["b", "c"]
    assert memory.known("") == [] and memory.known() == ["a", "b", "c"]
    of = memory.explanations.of
    assert [of("c", tenant)["tenant"] for tenant in ("acme", "bulk", None)] == [
        "acme",
        "bulk",
        "bulk",
    ], "of one id that two have used, the latest"


def test_an_unknown_id_is_told_how_long_requests_are_kept():
    memory = Memory(max_explained=5)
    for name in "ab":
        memory.serve(name)
        memory.now_s += 30.0
    error = memory.explanations.not_found("x", sees_all=True)
    assert isinstance(error, RequestNotFound)
    assert "the newest 5" in error.message and "router.max_explained" in error.message
    assert "now 2, the oldest since 60 s" in error.message
    assert "x-baton-router" not in error.message
    others = memory.explanations.not_found("x", sees_all=False).message
    assert "the newest 5" in others and "60 s" not in others, "how much others do is theirs"


def test_where_several_routers_serve_an_unknown_id_is_told_whom_to_ask():
    error = Memory(num_routers=3).explanations.not_found("x" * 500, sees_all=True)
    assert "router-1 remembers" in error.message and "3 routers serve" in error.message
    assert "x-baton-router" in error.message and len(error.message) < 600


def test_attempts_moves_waits_and_the_charge_are_shown():
    memory = Memory()
    run = memory.run()
    run.timeline.admitted_at = 100.5
    run.attempt_ended(0, WorkerLost("gone"))
    run.attempt_ended(1, Draining("leaving"))
    run.attempt_ended(2, NoWorker("none"))
    run.attempt_ended(3)
    memory.now_s = 107.0
    memory.end(run)
    cost = ReplyCost(Amount(1, 177), Amount(0, 20), Amount(1, 165), num_requests=2)
    memory.explanations.note_cost([("acme", "r"), ("acme", "refused")], cost)
    memory.now_s = 112.0
    found = memory.explanations.of("r", "acme")
    assert found["attempts"] == [
        {"epoch": 0, "path": "local", "workers": ["d"], "outcome": "worker_lost", "is_move": False},
        {"epoch": 1, "path": "local", "workers": ["d"], "outcome": "draining", "is_move": True},
        {"epoch": 2, "path": "local", "workers": [], "outcome": "no_worker", "is_move": False},
        {"epoch": 3, "path": "local", "workers": ["d"], "outcome": "ok", "is_move": False},
    ]
    assert found["charge"] == {
        "charged": {"requests": 1, "tokens": 177},
        "paid": {"requests": 0, "tokens": 20},
        "used": {"requests": 1, "tokens": 165},
        "num_requests": 2,
    }
    assert (found["permit_wait_ms"], found["ttft_ms"]) == (500.0, 250.0)
    assert (found["tier"], found["router"], found["ended_s_ago"]) == ("standard", "router-1", 5.0)
    assert found["phases_ms"]["queue"] == 125.0 and found["outcome"] == "ok"
    assert found["decision"]["reason"] == "0 prefill and 1 decode workers match"
    assert [c["worker"] for c in found["candidates"]] == ["d"]


def test_one_that_waits_for_a_permit_in_vain_has_waited_until_its_end():
    memory = Memory()
    run = memory.run()
    memory.now_s = 130.0
    memory.end(run)
    found = memory.explanations.of("r")
    assert found["permit_wait_ms"] == 30_000.0 and found["charge"] is None


def reachable(root):
    """Every string and tuple of numbers that is kept alive by an object, code apart."""
    seen, found, left = set(), [], [root]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, ModuleType | FunctionType | type):
            continue
        seen.add(id(one))
        if isinstance(one, str | tuple):
            found.append(one)
        left += gc.get_referents(one)
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_prompt_is_kept_not_even_by_the_stack_of_an_error(fails):
    memory = Memory()

    def fail(run):
        raise WorkerLost("gone")

    run = memory.run()
    error = None
    try:
        if fails:
            fail(run)
    except WorkerLost as raised:
        error = raised
    memory.end(run, error)
    kept = reachable(memory.explanations._ended)
    assert "acme" in kept and ("worker_lost" in kept) == fails
    assert SECRET not in kept and run.request.token_ids not in kept
    assert SECRET in reachable(run), "it would have been found"
    assert error is None or SECRET in reachable(error.__traceback__.tb_next.tb_frame)
