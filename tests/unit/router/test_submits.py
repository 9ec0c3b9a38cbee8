"""What the workers of an attempt are sent to begin with."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.replies import Letters

from core.config import PlacementConfig
from core.ids import TransferId
from core.session import PrefixSource, Role, Submit, Task, TokenDelta, WorkerDescriptor
from core.timeline import Timeline
from core.types import GenerateRequest, Path, SamplingParams
from router.choice_output import ChoiceOutput
from router.placement import Placement
from router.request_state import RequestState
from router.submits import DEATHS_BEFORE_ALONE, submits_of

TRANSFER = TransferId(b"t" * 16)
SOURCE = PrefixSource(TransferId(b"s" * 16), "peer", 32, 1.0)
SAMPLING = SamplingParams(prompt_logprobs=2, max_tokens=9)
PREFILL = WorkerDescriptor("p", Role.PREFILL, 3, "s", "kv of p", "m", "digest", 16, 100, 2_048)
DECODE = WorkerDescriptor("d", Role.DECODE, 4, "s", "kv of d", "m", "digest", 16, 100, 2_048)


def run_of(**fields):
    """A request that came at 10 s, with one choice that has a token."""
    choice = ChoiceOutput(0, SAMPLING, Letters())
    choice.accept(TokenDelta("r", 0, 0, 0, (97,)))
    return RequestState(
        GenerateRequest("r", "m", tuple(range(20)), SAMPLING, 1, 0.0),
        run_id="r~1",
        emit=lambda _: None,
        clock=SimpleNamespace(now_s=lambda: 12.5),
        timeline=Timeline(10.0),
        choices=[choice],
        credit=300,
        rules=PlacementConfig(),
        **fields,
    )


def submits(run, path=Path.PD, source=SOURCE, now_s=12.5):
    prefill = DECODE if path is Path.LOCAL else PREFILL
    placement = Placement(path, prefill, DECODE, "")
    return submits_of(run, 5, placement, TRANSFER, source, now_s)


def test_each_worker_is_told_its_task_and_its_peer_and_the_one_that_computes_the_source():
    run = run_of()
    base = Submit(
        request=replace(run.request, request_id="r~1"),
        epoch=5,
        task=Task.LOCAL,
        emitted=((97,),),
        credit=300,
        age_s=2.5,
    )
    assert submits(run, Path.LOCAL) == [(DECODE, replace(base, prefix_source=SOURCE))]
    base = replace(base, transfer_id=TRANSFER)
    assert submits(run) == [
        (
            PREFILL,
            replace(
                base,
                task=Task.PREFILL,
                peer_id="d",
                peer_incarnation=4,
                peer_address="kv of d",
                prefix_source=SOURCE,
            ),
        ),
        (
            DECODE,
            replace(
                base, task=Task.DECODE, peer_id="p", peer_incarnation=3, peer_address="kv of p"
            ),
        ),
    ]


@pytest.mark.parametrize(("now_s", "age_s"), [(10.0, 0.0), (10.25, 0.25), (110.0, 100.0)])
def test_the_age_of_a_request_is_what_has_passed_since_it_was_received(now_s, age_s):
    assert [submit.age_s for _, submit in submits(run_of(), now_s=now_s)] == [age_s] * 2


@pytest.mark.parametrize("num_deaths", range(DEATHS_BEFORE_ALONE + 2))
def test_a_request_that_has_seen_two_workers_die_runs_alone(num_deaths):
    alone = [submit.run_alone for _, submit in submits(run_of(num_deaths=num_deaths))]
    assert alone == [num_deaths >= 2] * 2


@pytest.mark.parametrize("has_scores", [False, True])
def test_scores_of_the_prompt_are_asked_for_until_they_are_here(has_scores):
    for _, submit in submits(run_of(has_prompt_scores=has_scores)):
        asked = None if has_scores else 2
        assert submit.request.sampling == replace(SAMPLING, prompt_logprobs=asked)
