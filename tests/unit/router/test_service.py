"""What a service counts of requests without a log of them."""

from types import SimpleNamespace

from core.types import RequestEnded, Usage
from router.observe.recorder import Recorder


def test_without_a_request_log_requests_are_still_counted():
    seen = []
    telemetry = SimpleNamespace(request_ended=lambda run, ended, server: seen.append(run))
    explanations = SimpleNamespace(note=lambda run, ended: None)
    recorder = Recorder(telemetry, shedding_log=None, explanations=explanations, log=None)
    for tier in ("standard", "canary"):
        request = SimpleNamespace(tier=tier, request_id=tier)
        run = SimpleNamespace(request=request, placement=None)
        recorder.request_ended(run, RequestEnded(Usage(1)))
    assert len(seen) == 1
