"""What a service counts of requests without a log of them."""

from types import SimpleNamespace

from router.service import GenerationService


def test_without_a_request_log_requests_are_still_counted():
    service, seen = GenerationService.__new__(GenerationService), []
    service._log, service.telemetry = (
        None,
        SimpleNamespace(request_ended=lambda run, ended, door: seen.append(run)),
    )
    for tier in ("standard", "canary"):
        service._ended(SimpleNamespace(request=SimpleNamespace(tier=tier)), None)
    assert len(seen) == 1
