"""Why requests that have ended went where they did."""

from dataclasses import replace

from core.session import Load, Role, WorkerDescriptor
from core.types import GenerateRequest, RequestEnded, RequestTiming, SamplingParams, Usage
from router.candidate import Candidate
from router.observe.explanations import Explanations
from router.placement import PlacementConstraints, choose

DESCRIPTOR = WorkerDescriptor("p", Role.PREFILL, 1, "a", "b", "m", "digest", 16, 10_000, 65_536)
REQUEST = GenerateRequest("r", "m", tuple(range(161)), SamplingParams(), 1, 0.0, scope="acme")


class Run:
    def __init__(self, name, placement=None):
        self.request = replace(REQUEST, request_id=name)
        self.placement = placement


def test_the_latest_requests_can_be_explained_and_older_ones_make_room():
    explanations = Explanations(max_explained=2)
    pool = [Candidate(replace(DESCRIPTOR, role=Role.DECODE), Load(free_blocks=1_000))]
    placement = choose(pool, REQUEST, PlacementConstraints())
    ended = RequestEnded(Usage(161, 4), timing=RequestTiming(ttft_s=0.25, attempts=("0:local:ok",)))
    for name in ("one", "two", "three"):
        explanations.note(Run(name, placement), ended)
    assert explanations.of("one") is None
    found = explanations.of("three")
    assert found["decision"]["reason"] == "0 prefill and 1 decode workers match"
    assert [c["worker"] for c in found["candidates"]] == ["p"]
    assert (found["outcome"], found["ttft_ms"], found["prompt_tokens"]) == ("ok", 250.0, 161)
