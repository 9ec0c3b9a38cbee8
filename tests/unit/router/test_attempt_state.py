"""How an attempt delivers what its two workers say, and how it ends by what they report."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.replies import Letters

from core.config import PlacementConfig
from core.errors import PoolExhausted, Unavailable, WorkerLost
from core.session import (
    AttemptEnded,
    FetchReport,
    Role,
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
    RequestEvent,
    SamplingParams,
    TextDelta,
)
from router.attempt_state import AttemptState
from router.choice_output import ChoiceOutput
from router.placement import Placement
from router.regret import MeasuredCost
from router.request_state import RequestState

NUM_SCORES = 10
SCORES = tuple(Logprob(i, -float(i)) for i in range(NUM_SCORES))


def worker(role):
    """A worker named as its role."""
    return WorkerDescriptor(role.value, role, 1, "a", "b", "m", "digest", 16, 100, 2048)


def letters(position, text):
    return TokenDelta("r", 0, 0, position, tuple(map(ord, text)))


def scores(start, count, text=""):
    """A part of the prompt's scores, and the first tokens with it."""
    return TokenDelta(
        "r",
        0,
        0,
        0,
        tuple(map(ord, text)),
        prompt_logprobs=SCORES[start : start + count],
        prompt_start=start,
    )


@pytest.fixture
async def new_attempt():
    """Makes attempts, each of a request of its own; `events` of it are what its client gets."""

    def make(path=Path.PD, prompt_logprobs=None, now_s=lambda: 0.0):
        sampling = SamplingParams(prompt_logprobs=prompt_logprobs)
        request = GenerateRequest("r", "m", tuple(range(NUM_SCORES + 1)), sampling, 1, 0.0)
        events: list[RequestEvent] = []
        run = RequestState(
            request,
            run_id="r",
            emit=events.append,
            clock=SimpleNamespace(now_s=now_s),
            timeline=Timeline(0.0),
            choices=[ChoiceOutput(0, sampling, Letters())],
            credit=256,
            rules=PlacementConfig(),
        )
        decode = worker(Role.DECODE)
        prefill = worker(Role.PREFILL) if path is Path.PD else decode
        attempt = AttemptState(
            run=run,
            epoch=0,
            placement=Placement(path, prefill, decode, ""),
            finished=asyncio.get_running_loop().create_future(),
            started_at=0.0,
            on_choice_finished=lambda _: None,
            on_answered=lambda _: None,
            on_handed_over=lambda _: None,
        )
        return attempt, events

    return make


def texts(events):
    return [e.text for e in events if isinstance(e, TextDelta)]


async def test_an_attempt_fails_once_and_on_what_it_cannot_deliver(new_attempt):
    attempt, events = new_attempt()
    attempt.on_delta("decode", letters(5, "x"))
    with pytest.raises(WorkerLost, match="missing"):
        attempt.finished.result()
    attempt.fail(Unavailable("too late"))
    attempt.on_delta("decode", letters(0, "x"))
    with pytest.raises(WorkerLost):
        attempt.finished.result()
    assert events == []


@pytest.mark.parametrize(
    ("prompt_logprobs", "expected"), [(None, ["a", "b", "c"]), (0, [SCORES, "a", "b", "c"])]
)
async def test_decode_does_not_overtake_the_scores_of_the_prompt(
    new_attempt, prompt_logprobs, expected
):
    """Its announcement of the first token may come before the prefill worker's,
    which alone has the scores."""
    attempt, events = new_attempt(prompt_logprobs=prompt_logprobs)
    attempt.on_delta("decode", letters(0, "a"))
    assert texts(events) == ([] if expected[0] == SCORES else ["a"])
    prefill_says = letters(0, "a") if prompt_logprobs is None else scores(0, NUM_SCORES, "a")
    attempt.on_delta("prefill", prefill_says)
    attempt.on_delta("decode", letters(1, "b"))
    attempt.on_delta("decode", letters(2, "c"))
    said = [e.logprobs if isinstance(e, PromptScored) else e.text for e in events]
    assert said == expected and attempt.decode_spoke


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
async def test_prefill_is_missed_only_if_it_alone_has_the_scores(new_attempt, prompt_logprobs):
    """The attempt fails, and the next one computes them."""
    attempt, _ = new_attempt(prompt_logprobs=prompt_logprobs)
    attempt.on_delta("decode", letters(0, "a"))
    attempt.on_lost("prefill", WorkerLost("gone"))
    assert attempt.finished.done() == (prompt_logprobs is not None)
    assert prompt_logprobs is None or isinstance(attempt.finished.exception(), WorkerLost)


@pytest.mark.parametrize("reporter", ["prefill", "decode"])
async def test_want_of_room_is_decodes_whoever_reports_it(new_attempt, reporter):
    """The next attempt avoids the full worker, not the prefill worker that was refused."""
    attempt, _ = new_attempt()
    error = PoolExhausted("no 20 free blocks")
    attempt.on_ended(reporter, AttemptEnded("r", 0, Task.PREFILL, WorkerTiming(), error))
    assert attempt.finished.exception() is error and attempt.run.excluded == {"decode"}


@pytest.mark.parametrize(("found", "reported"), [(4, 4), (99, NUM_SCORES + 1)])
async def test_no_more_is_reported_as_cached_than_the_prompt_has(new_attempt, found, reported):
    """A client may resume with output, which a worker finds with the prompt."""
    attempt, _ = new_attempt()
    timing = WorkerTiming(prefill_s=1.0, cached_tokens=found)
    attempt.on_ended("prefill", AttemptEnded("r", 0, Task.PREFILL, timing))
    assert attempt.run.usage().cached_tokens == reported


@pytest.mark.parametrize(
    ("order", "exposed_s"),
    [
        (("prefill", "decode"), 1.0),
        (("prefill", "prefill", "decode", "decode"), 2.0),
        (("decode", "prefill", "decode"), 0.0),
    ],
)
async def test_nothing_is_exposed_when_decode_speaks_first(new_attempt, order, exposed_s):
    """Each word comes a second after the one before;
    without this rule a whole decode step would be counted."""
    now_s = 0.0
    attempt, _ = new_attempt(now_s=lambda: now_s)
    for who in order:
        now_s += 1.0
        attempt.on_delta(who, letters(0, "x"))
    assert attempt.run.exposed_transfer_s == exposed_s


@pytest.mark.parametrize(
    ("path", "order", "told"),
    [
        (Path.PD, ("prefill", "decode", "decode"), [1.0]),
        (Path.PD, ("decode", "prefill", "decode"), [0.0]),
        (Path.PD, ("prefill",), []),
        (Path.LOCAL, ("decode", "decode"), []),
    ],
)
async def test_a_hand_over_is_told_once_with_what_was_exposed_of_it(new_attempt, path, order, told):
    """A word a second; the attempt before had left 9 s."""
    now_s = 0.0
    heard = []
    attempt, _ = new_attempt(path, now_s=lambda: now_s)
    attempt.run.exposed_transfer_s = 9.0
    attempt.on_handed_over = lambda attempt: heard.append(attempt.exposed_transfer_s)
    for who in order:
        now_s += 1.0
        attempt.on_delta(who, letters(0, "x"))
    assert heard == told


@pytest.mark.parametrize(("path", "who"), [(Path.LOCAL, "decode"), (Path.PD, "prefill")])
async def test_scores_are_told_once_and_whole_before_any_token(new_attempt, path, who):
    attempt, events = new_attempt(path, prompt_logprobs=0)
    if path is Path.PD:
        attempt.on_delta("decode", letters(0, "a"))
    attempt.on_delta(who, scores(0, 4))
    assert attempt.wanted().num_scores == 4
    attempt.on_delta(who, scores(2, 5))  # again from what a cut stream had lost
    assert events == [] and attempt.wanted().num_scores == 7
    attempt.on_delta(who, scores(7, 3, "a"))
    attempt.on_delta(who, scores(0, 10))
    assert events == [PromptScored(SCORES), TextDelta(0, 0, (97,), "a")]
    assert attempt.wanted().num_scores == NUM_SCORES and not attempt.finished.done()


async def test_scores_are_whole_with_that_of_the_last_token_of_the_prompt(new_attempt):
    attempt, events = new_attempt(Path.LOCAL, prompt_logprobs=0)
    num_events = []
    for start in range(NUM_SCORES):
        attempt.on_delta("decode", scores(start, 1))
        num_events.append(len(events))
    assert num_events == [0] * (NUM_SCORES - 1) + [1]


async def test_a_missing_part_ends_the_attempt(new_attempt):
    attempt, events = new_attempt(Path.LOCAL, prompt_logprobs=0)
    attempt.on_delta("decode", scores(0, 4))
    attempt.on_delta("decode", scores(5, 5, "a"))
    with pytest.raises(WorkerLost, match="prompt scores 4 to 4 are missing"):
        attempt.finished.result()
    assert events == []


async def test_after_its_end_an_attempt_takes_nothing_more(new_attempt):
    attempt, events = new_attempt(Path.LOCAL)
    attempt.on_delta("decode", letters(0, "a"))
    attempt.fail(WorkerLost("gone"))
    attempt.on_delta("decode", letters(1, "b"))
    assert texts(events) == ["a"] and isinstance(attempt.finished.exception(), WorkerLost)


async def test_a_delta_that_cannot_be_taken_ends_the_attempt_and_says_nothing_of_choices(
    new_attempt,
):
    attempt, events = new_attempt(Path.LOCAL)
    heard = []
    attempt.on_choice_finished = lambda _: heard.append("finished")
    attempt.run.choices.append(ChoiceOutput(1, SamplingParams(), Letters()))
    attempt.run.choices[1].finished = "stop"  # heard of it, and not yet told
    attempt.on_delta("decode", letters(5, "x"))
    assert isinstance(attempt.finished.exception(), WorkerLost)
    assert heard == events == [] and not attempt.decode_spoke


async def test_what_decode_said_early_goes_before_what_it_says_after_the_prompts_scores(
    new_attempt,
):
    """The scores may fill the prefill worker's frame, so that its token comes in the next one."""
    attempt, events = new_attempt(prompt_logprobs=0)
    attempt.on_delta("decode", letters(0, "ab"))
    attempt.on_delta("prefill", scores(0, NUM_SCORES))
    attempt.on_delta("decode", letters(2, "c"))
    attempt.on_delta("prefill", letters(0, "a"))
    assert events == [
        PromptScored(SCORES),
        TextDelta(0, 0, (97, 98), "ab"),
        TextDelta(0, 2, (99,), "c"),
    ]
    assert not attempt.finished.done()


async def test_what_was_held_of_decode_proves_that_it_has_the_kv(new_attempt):
    """It goes out with the prefill worker's word, after which nobody needs that worker."""
    attempt, _ = new_attempt(prompt_logprobs=0)
    heard = []
    attempt.on_handed_over = lambda _: heard.append("handed over")
    attempt.on_delta("decode", letters(0, "a"))
    assert heard == []
    attempt.on_delta("prefill", scores(0, NUM_SCORES, "a"))
    assert heard == ["handed over"]
    attempt.on_lost("prefill", WorkerLost("gone"))
    assert not attempt.finished.done()


@pytest.mark.parametrize("order", [(3.0, 5.0), (5.0, 3.0)])
async def test_the_longest_decoding_that_was_reported_counts(new_attempt, order):
    """Each report holds all time since the attempt's first token."""
    attempt, _ = new_attempt()
    for decode_s in order:
        attempt.run.note_timings(WorkerTiming(decode_s=decode_s))
    assert attempt.run.timings.decode_s == 5.0


TIMES = WorkerTiming(queue_s=1.0, prefill_s=2.0, fetch=FetchReport("fetched", 16, 0.5))


def told(attempt, *order):
    """Let workers speak, a second each; returns what was measured 10 s after the start."""
    now_s = 0.0
    attempt.run.clock.now_s = lambda: now_s
    for who in order:
        now_s += 1.0
        attempt.on_delta(who, letters(0, "x"))
    return attempt.measured_by(10.0)


@pytest.mark.parametrize(
    ("path", "order", "transfer_s"),
    [
        (Path.PD, ("prefill", "decode"), 1.0),
        (Path.PD, ("decode", "prefill"), 0.0),
        (Path.LOCAL, ("decode",), 0.0),
    ],
)
async def test_the_phases_that_placement_predicts_are_measured(
    new_attempt, path, order, transfer_s
):
    attempt, _ = new_attempt(path)
    attempt.run.note_timings(TIMES)
    measured = told(attempt, *order)
    assert measured == MeasuredCost(1.0, 2.0, transfer_s, 0.5)
    assert measured.total_s == 3.0 + transfer_s, "the fetch is in the queue's time"
    assert attempt.measured_by(2.5).total_s == 2.5 + transfer_s, "a worker's clock may be wrong"


@pytest.mark.parametrize("why", ["a later attempt", "a resumed answer", "no hand-over", "no times"])
async def test_what_is_not_one_attempts_own_is_not_measured(new_attempt, why):
    attempt, _ = new_attempt()
    if why == "a later attempt":
        attempt.epoch = 1
    if why == "a resumed answer":
        attempt.run.request = replace(attempt.run.request, resume_from=(3,))
    if why != "no times":
        attempt.run.note_timings(TIMES)
    order = ("prefill",) if why == "no hand-over" else ("prefill", "decode")
    assert told(attempt, *order) is None
