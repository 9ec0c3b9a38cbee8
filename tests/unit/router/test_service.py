"""What a service counts of requests without a log of them."""

from types import SimpleNamespace

from router.observe.explanations import Explanations
from router.observe.recorder import Recorder


def test_without_a_request_log_requests_are_still_counted():
    seen = []
    telemetry = SimpleNamespace(request_ended=lambda run, ended, door: seen.append(run))
    recorder = Recorder(telemetry, shedding=None, explanations=Explanations(), log=None)
    for tier in ("standard", "canary"):
        request = SimpleNamespace(tier=tier, request_id=tier)
        recorder.request_ended(SimpleNamespace(request=request, placement=None), None)
    assert len(seen) == 1
