"""What a request's state says of it."""

from dataclasses import replace
from types import SimpleNamespace

from support.replies import Letters

from core.config import PlacementConfig
from core.session import TokenDelta, WorkerTiming
from core.timeline import Timeline
from core.types import GenerateRequest, Prices, SamplingParams, Usage
from router.choice_output import ChoiceOutput
from router.request_state import RequestState

REQUEST = GenerateRequest("r", "m", tuple(range(20)), SamplingParams(n=2), 1, 0.0)


def state_of(request):
    """A request with two choices of three and one tokens, and 16 cached ones of its prompt."""
    choices = [ChoiceOutput(choice, request.sampling, Letters()) for choice in range(2)]
    choices[0].accept(TokenDelta("r", 0, 0, 0, (97, 98, 99)))
    choices[1].accept(TokenDelta("r", 1, 0, 0, (97,)))
    return RequestState(
        request,
        run_id="r~1",
        emit=lambda _: None,
        clock=SimpleNamespace(now_s=lambda: 12.5),
        timeline=Timeline(10.0),
        choices=choices,
        credit=300,
        rules=PlacementConfig(),
        timings=WorkerTiming(cached_tokens=16),
    )


def test_every_token_of_every_choice_is_paid_for_and_the_prompt_once():
    assert state_of(REQUEST).usage() == Usage(20, 4, 16)
    priced = replace(REQUEST, prices=Prices(1e6, 1e3, 10e6))
    assert state_of(priced).usage() == Usage(20, 4, 16, cost=4.0 + 0.016 + 40.0)
