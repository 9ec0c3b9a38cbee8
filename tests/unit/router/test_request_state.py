"""What is refused at borders that real clients seldom touch."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.models import TINY

from core.config import PlacementConfig
from core.errors import (
    PoolExhausted,
    Unavailable,
    WorkerLost,
)
from core.session import (
    Load,
    Role,
    Submit,
    Task,
    TokenDelta,
    WorkerDescriptor,
    WorkerTiming,
)
from core.timeline import Timeline
from core.types import (
    GenerateRequest,
    Logprob,
    Path,
    PromptScored,
    SamplingParams,
    TextDelta,
)
from router.choice_output import ChoiceOutput
from router.cost import Candidate
from router.placement import Placement
from router.request_state import AttemptState, RequestState
from router.text.detokenizing import TextModel
from worker.attempt import (
    Attempt,
)


class Letters:
    def push(self, token_id):
        return chr(token_id)

    def flush(self):
        return ""


def letters(position, text, finish=None, **more):
    return TokenDelta("r", 0, 0, position, tuple(map(ord, text)), finish=finish, **more)


def worker(name, role, waiting=0, running=0, **more):
    d = WorkerDescriptor(name, role, 1, "a", "b", "m", "digest", 16, 100, 2048)
    return Candidate(
        replace(d, **more), Load(num_running=running, waiting_tokens=waiting, free_blocks=100)
    )


TOP = tuple((2**32 - 1 - i, -1.5) for i in range(20))


TIMINGS = WorkerTiming(1.5, 2.5, 3.5, 2**31, 2**62, 2**31, "a transport's name", 2**31)


def attempt(name, num_scores=0, num_tokens=1, n=1, logprobs=20):
    sampling = SamplingParams(n=n, logprobs=logprobs, prompt_logprobs=20, max_tokens=4096)
    request = GenerateRequest(name, "m", tuple(range(num_scores + 1)), sampling, 1, 0.0)
    made = Attempt("router", Submit(request, 2**32 - 1, Task.LOCAL, ((),) * n))
    made.prompt_logprobs = tuple(Logprob(2**32 - 1, -float(i), TOP) for i in range(num_scores))
    made.timings = TIMINGS
    for choice in range(n):
        for position in range(num_tokens):
            made.append(choice, position, Logprob(2**32 - 1 - position, -2.5, TOP))
    return made


# --- the router's end -----------------------------------------------------------------------------


def part(start, count, tokens=()):
    scores = tuple(Logprob(i, -float(i)) for i in range(start, start + count))
    return TokenDelta("r", 0, 0, 0, tokens, prompt_logprobs=scores, prompt_start=start)


async def attempt_run(path=Path.LOCAL):
    told = []
    sampling = SamplingParams(prompt_logprobs=0)
    run = SimpleNamespace(
        request=SimpleNamespace(sampling=sampling), num_scores=10, has_prompt_scores=False,
        emit=told.append, deliver=lambda delta, *, is_decode: told.append(delta.token_ids),
        is_whole=False, finished_choices=(), choices=[], run_id="r", credit=0, excluded=set(),
    )  # fmt: skip
    pair = SimpleNamespace(
        prefill=SimpleNamespace(worker_id="p"), decode=SimpleNamespace(worker_id="d"), path=path
    )
    finished = asyncio.get_running_loop().create_future()
    return AttemptState(run, 0, pair, finished, 0.0, *[lambda _: None] * 3), told


def choice(**sampling):
    return ChoiceOutput(0, SamplingParams(**sampling), TextModel(TINY).decoder((97,)))


def delta(position, text, finish=None):
    return TokenDelta("r", 0, 0, position, tuple(text.encode()), finish=finish)


async def test_an_attempt_fails_once_and_on_what_it_cannot_deliver():
    def deliver(message, *, is_decode):
        raise WorkerLost("positions are missing")

    pair = SimpleNamespace(decode=SimpleNamespace(worker_id="d"), path=Path.PD)
    request = SimpleNamespace(sampling=SamplingParams())
    run = SimpleNamespace(
        deliver=deliver, excluded=set(), request=request, has_prompt_scores=False,
        finished_choices=(),
    )  # fmt: skip
    attempt = AttemptState(
        run,
        0,
        pair,
        asyncio.get_running_loop().create_future(),
        0.0,
        *[lambda _: None] * 3,
    )
    attempt.on_delta("d", delta(5, "x"))
    with pytest.raises(WorkerLost, match="missing"):
        attempt.finished.result()
    attempt.fail(Unavailable("too late"))
    attempt.on_delta("d", delta(6, "x"))
    with pytest.raises(WorkerLost):
        attempt.finished.result()


@pytest.mark.parametrize(
    ("prompt_logprobs", "expected"), [(None, ["d1", "p1", "d2"]), (0, ["p1", "d1", "d2"])]
)
async def test_decode_does_not_overtake_the_scores_of_the_prompt(prompt_logprobs, expected):
    """Its announcement of the first token may come before the prefill worker's,
    which alone has the scores."""
    told = []
    said = {"d1": delta(0, "a"), "p1": delta(0, "a"), "d2": delta(1, "b")}
    pair = SimpleNamespace(
        prefill=SimpleNamespace(worker_id="p"), decode=SimpleNamespace(worker_id="d"), path=Path.PD
    )
    run = SimpleNamespace(
        deliver=lambda message, *, is_decode: told.append(
            next(name for name, one in said.items() if one is message)
        ),
        excluded=set(), is_whole=False, has_prompt_scores=False, finished_choices=(),
        request=SimpleNamespace(sampling=SamplingParams(prompt_logprobs=prompt_logprobs)),
    )  # fmt: skip
    attempt = AttemptState(
        run,
        0,
        pair,
        asyncio.get_running_loop().create_future(),
        0.0,
        *[lambda _: None] * 3,
    )
    for worker_id, message in (("d", "d1"), ("p", "p1"), ("d", "d2")):
        attempt.on_delta(worker_id, said[message])
    assert told == expected and attempt.decode_spoke
    # The prefill worker is lost before it spoke: the attempt fails, and the next one computes the
    # scores.
    alone = AttemptState(
        run,
        1,
        pair,
        asyncio.get_running_loop().create_future(),
        0.0,
        *[lambda _: None] * 3,
    )
    alone.on_delta("d", said["d1"])
    alone.on_lost("p", WorkerLost("gone"))
    assert alone.finished.done() == (prompt_logprobs is not None)
    assert prompt_logprobs is None or isinstance(alone.finished.exception(), WorkerLost)


@pytest.mark.parametrize("reporter", ["p", "d"])
async def test_want_of_room_is_decodes_whoever_reports_it(reporter):
    """The next attempt avoids the full worker, not the prefill worker that was refused."""
    pair = SimpleNamespace(
        prefill=SimpleNamespace(worker_id="p"), decode=SimpleNamespace(worker_id="d"), path=Path.PD
    )
    run = SimpleNamespace(excluded=set(), note_timings=lambda timings: None)
    attempt = AttemptState(
        run,
        0,
        pair,
        asyncio.get_running_loop().create_future(),
        0.0,
        *[lambda _: None] * 3,
    )
    attempt.on_ended(
        reporter, SimpleNamespace(timings=None, error=PoolExhausted("no 20 free blocks"))
    )
    assert isinstance(attempt.finished.exception(), PoolExhausted) and run.excluded == {"d"}


@pytest.mark.parametrize(("order", "exposed_s"), [("pd", 1.0), ("dpd", 0.0)])
def test_nothing_is_exposed_when_decode_speaks_first(order, exposed_s):
    """Each word comes a second after the one before;
    without this rule a whole decode step would be counted."""
    now_s = iter(range(10))
    run = RequestState.__new__(RequestState)
    run.clock, run.choices = (
        SimpleNamespace(now_s=lambda: float(next(now_s))),
        [SimpleNamespace(accept=lambda _: ())],
    )
    run.prefill_spoke_at, run.exposed_transfer_s, run.has_prompt_scores = None, 0.0, False
    run.current = SimpleNamespace(decode_spoke=False)
    for who in order:
        run.deliver(delta(0, "x"), is_decode=who == "d")
        run.current.decode_spoke = run.current.decode_spoke or who == "d"
    assert run.exposed_transfer_s == exposed_s


@pytest.mark.parametrize(
    ("path", "order", "told"),
    [
        (Path.PD, "pdd", [1.0]),
        (Path.PD, "dpd", [0.0]),
        (Path.PD, "p", []),
        (Path.LOCAL, "dd", []),
    ],
)
async def test_a_hand_over_is_told_once_with_what_was_exposed_of_it(path, order, told):
    """A word a second; the attempt before had left 9 s."""
    heard = []
    attempt, _ = await attempt_run(path)
    run = attempt.run
    run.request.sampling, run.exposed_transfer_s = SamplingParams(), 9.0
    spoken = []

    def deliver(_, *, is_decode):
        if is_decode and spoken == ["p"]:
            run.exposed_transfer_s = 1.0
        spoken.append("d" if is_decode else "p")

    run.deliver = deliver
    attempt.on_handed_over = lambda attempt: heard.append(attempt.exposed_transfer_s)
    for position, who in enumerate(order):
        attempt.on_delta(who, TokenDelta("r", 0, 0, position, (8,)))
    assert heard == told


@pytest.mark.parametrize(("path", "worker"), [(Path.LOCAL, "d"), (Path.PD, "p")])
async def test_scores_are_told_once_and_whole_before_any_token(path, worker):
    run, told = await attempt_run(path)
    if path is Path.PD:
        run.on_delta("d", TokenDelta("r", 0, 0, 0, (8,)))
    run.on_delta(worker, part(0, 4))
    assert run.wanted().num_scores == 4
    run.on_delta(worker, part(2, 5))  # again from what a cut stream had lost
    assert told == [] and run.wanted().num_scores == 7
    run.on_delta(worker, part(7, 3, (8,)))
    run.on_delta(worker, part(0, 10))
    scored = PromptScored(tuple(Logprob(i, -float(i)) for i in range(10)))
    assert told == [scored, *([(8,)] * (2 if path is Path.PD else 1))]
    assert run.wanted().num_scores == 10 and not run.finished.done()


async def test_scores_are_whole_with_that_of_the_last_token_of_the_prompt():
    told, sampling = [], SamplingParams(prompt_logprobs=0)
    run = RequestState(
        request=GenerateRequest("r", "m", tuple(range(5)), sampling, 1, 0.0), run_id="r",
        emit=told.append, clock=None, timeline=None, choices=[], credit=0, rules=PlacementConfig(),
    )  # fmt: skip
    pair = SimpleNamespace(decode=SimpleNamespace(worker_id="d"), path=Path.LOCAL)
    attempt = AttemptState(
        run,
        0,
        pair,
        asyncio.get_running_loop().create_future(),
        0.0,
        *[lambda _: None] * 3,
    )
    found = []
    for start in range(4):
        attempt.on_delta("d", part(start, 1))
        found.append(len(told))
    assert run.num_scores == 4 and found == [0, 0, 0, 1]


async def test_a_missing_part_ends_the_attempt():
    run, told = await attempt_run()
    run.on_delta("d", part(0, 4))
    run.on_delta("d", part(5, 5, (8,)))
    with pytest.raises(WorkerLost, match="prompt scores 4 to 4 are missing"):
        run.finished.result()
    assert told == []


async def test_after_its_end_an_attempt_takes_nothing_more():
    run, told = await attempt_run()
    run.run.has_prompt_scores = True
    run.on_delta("d", TokenDelta("r", 0, 0, 0, (8,)))
    run.fail(WorkerLost("gone"))
    run.on_delta("d", TokenDelta("r", 0, 0, 1, (9,)))
    assert told == [(8,)] and isinstance(run.finished.exception(), WorkerLost)


async def test_a_delta_that_cannot_be_taken_ends_the_attempt_and_says_nothing_of_choices():
    run, _ = await attempt_run()
    heard = []
    run.on_choice_finished = lambda _: heard.append("finished")

    def refuse(delta, *, is_decode):
        run.run.finished_choices = (0,)
        raise WorkerLost("positions 0 to 4 are missing")

    run.run.has_prompt_scores, run.run.deliver = True, refuse
    run.on_delta("d", TokenDelta("r", 0, 0, 5, (8,)))
    assert isinstance(run.finished.exception(), WorkerLost)
    assert heard == [] and not run.decode_spoke


async def test_what_decode_said_early_goes_before_what_it_says_after_the_prompts_scores():
    """The scores may fill the prefill worker's frame, so that its token comes in the next one."""
    events = []
    request = GenerateRequest("r", "m", (1, 2), SamplingParams(prompt_logprobs=0), 1, 0.0)
    run = RequestState(
        request,
        run_id=request.request_id,
        emit=events.append,
        clock=SimpleNamespace(now_s=lambda: 0.0),
        timeline=Timeline(0.0),
        choices=[ChoiceOutput(0, request.sampling, Letters())],
        credit=256,
        rules=PlacementConfig(path="pd"),
    )
    prefill = worker("prefill", Role.PREFILL).descriptor
    decode = worker("decode", Role.DECODE).descriptor
    placement = Placement(Path.PD, prefill, decode, "")
    finished = asyncio.get_running_loop().create_future()
    attempt = AttemptState(run, 0, placement, finished, 0.0, *[lambda _: None] * 3)
    scores = (Logprob(2, -1.0),)
    attempt.on_delta("decode", letters(0, "ab"))
    attempt.on_delta("prefill", letters(0, "", prompt_logprobs=scores))
    attempt.on_delta("decode", letters(2, "c"))
    attempt.on_delta("prefill", letters(0, "a"))
    assert events == [
        PromptScored(scores),
        TextDelta(0, 0, (97, 98), "ab"),
        TextDelta(0, 2, (99,), "c"),
    ]
    assert not finished.done()
