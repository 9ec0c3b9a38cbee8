"""Choices, placement, admission, sampling parameters, detokenizing, timeline."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import TINY

from core.errors import (
    Draining,
    InvalidRequest,
    InvariantViolation,
    NoWorker,
    Overloaded,
    WorkerLost,
)
from core.session import Load, Role, TokenDelta, WorkerDescriptor
from core.timeline import Timeline
from core.types import (
    ChoiceFinished,
    FinishReason,
    GenerateRequest,
    Logprob,
    Path,
    PromptScored,
    SamplingParams,
    TextDelta,
)
from router.admission import Admission
from router.choice_output import ChoiceOutput
from router.cost import Candidate
from router.placement import Placement, PlacementConstraints, choose
from router.request_state import AttemptState, RequestState
from router.text.detokenizing import TextModel
from simulation.loop import run_virtual


class Letters:
    def push(self, token_id):
        return chr(token_id)

    def flush(self):
        return ""


def delta(position, text, finish=None, **more):
    return TokenDelta("r", 0, 0, position, tuple(map(ord, text)), finish=finish, **more)


def run_choice(pieces, stop=(), finish=FinishReason.LENGTH):
    choice, text, events, position = (
        ChoiceOutput(0, SamplingParams(stop=tuple(stop)), Letters()),
        "",
        [],
        0,
    )
    for index, piece in enumerate(pieces):
        is_last = index == len(pieces) - 1
        events += choice.accept(delta(position, piece, finish if is_last else None))
        position += len(piece)
    text = "".join(e.text for e in events if isinstance(e, TextDelta))
    return text, choice, events


@settings(max_examples=300, deadline=None)
@given(
    st.text("abc", min_size=1, max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_text_ends_before_the_first_stop_string_however_tokens_arrive(text, stop, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if text[a:b]]
    got, choice, events = run_choice(pieces, stop)
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert got == expected
    assert choice.finished.reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
    assert len(choice.token_ids) == (min(ends)[0] if ends else len(text)), (
        "usage counts up to the match"
    )
    assert sum(isinstance(e, ChoiceFinished) for e in events) == 1


def test_equal_positions_are_dropped_unequal_ones_are_a_violation_missing_ones_redo():
    choice = ChoiceOutput(0, SamplingParams(), Letters())
    choice.accept(delta(0, "abc"))
    assert choice.accept(delta(1, "bc")) == []
    assert choice.accept(delta(2, "cd"))[0].token_ids == (ord("d"),)
    with pytest.raises(InvariantViolation, match="were delivered"):
        choice.accept(delta(0, "x"))
    with pytest.raises(WorkerLost, match="positions 4 to 5"):
        choice.accept(delta(6, "z"))


WORD = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


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
        path="pd",
    )
    pair = [worker(role.value, role).descriptor for role in (Role.PREFILL, Role.DECODE)]
    finished = asyncio.get_running_loop().create_future()
    attempt = AttemptState(
        run, 0, Placement(Path.PD, *pair, ""), finished, 0.0, lambda _: None, lambda _: None
    )
    scores = (Logprob(2, -1.0),)
    attempt.on_delta("decode", delta(0, "ab"))
    attempt.on_delta("prefill", delta(0, "", prompt_logprobs=scores))
    attempt.on_delta("decode", delta(2, "c"))
    attempt.on_delta("prefill", delta(0, "a"))
    assert events == [
        PromptScored(scores),
        TextDelta(0, 0, (97, 98), "ab"),
        TextDelta(0, 2, (99,), "c"),
    ]
    assert not finished.done()


@settings(max_examples=200, deadline=None)
@given(WORD, WORD)
def test_detokenized_pieces_equal_one_decode_of_the_whole(prompt, text):
    model = TextModel(TINY)
    ids = list(text.encode())
    decoder = model.decoder(tuple(prompt.encode()))
    pieces = "".join([decoder.push(i) for i in ids] + [decoder.flush()])
    assert pieces == text


def test_an_incomplete_character_shows_at_the_end():
    decoder = TextModel(TINY).decoder(())
    assert decoder.push(0xE2) == "" and decoder.push(0x82) == ""
    assert "\ufffd" in decoder.flush()


def worker(name, role, waiting=0, running=0, **more):
    d = WorkerDescriptor(name, role, 1, "a", "b", "m", "digest", 16, 100, 2048)
    return Candidate(
        replace(d, **more), Load(num_running=running, waiting_tokens=waiting, free_blocks=100)
    )


REQUEST = GenerateRequest("r", "m", tuple(range(100)), SamplingParams(), 1, 0.0)
AUTO = PlacementConstraints("auto", 32)


def test_placement_takes_the_least_loaded_pair_whatever_the_order():
    pool = [
        worker("p1", Role.PREFILL, waiting=500), worker("p2", Role.PREFILL, waiting=5),
        worker("d1", Role.DECODE, running=1), worker("d2", Role.DECODE, running=9),
    ]  # fmt: skip
    for candidates in (pool, pool[::-1]):
        placement = choose(candidates, REQUEST, AUTO)
        assert (placement.path, placement.prefill.worker_id, placement.decode.worker_id) == (
            Path.PD,
            "p2",
            "d1",
        )


def test_placement_paths():
    p, d = worker("p", Role.PREFILL), worker("d", Role.DECODE)
    short = replace(REQUEST, token_ids=(1, 2, 3))
    assert choose([p, d], short, AUTO).path is Path.LOCAL
    assert choose([p, d], short, PlacementConstraints("pd", 32)).path is Path.PD
    assert choose([p, d], REQUEST, PlacementConstraints("local", 32)).decode.worker_id == "d"
    assert choose([p], REQUEST, AUTO).decode.worker_id == "p", (
        "a prefill worker decodes when nobody else lives"
    )
    assert choose([d], REQUEST, AUTO).path is Path.LOCAL
    assert (
        choose([p, d], REQUEST, PlacementConstraints("pd", 32, must_be_local=True)).path
        is Path.LOCAL
    )
    assert (
        choose([p, worker("x", Role.DECODE, content_digest="other")], REQUEST, AUTO).path
        is Path.LOCAL
    )
    for candidates, wish in (
        ([], AUTO),
        ([p], PlacementConstraints("pd", 32)),
        ([d], PlacementConstraints("pd", 32)),
    ):
        with pytest.raises(NoWorker, match="raise pools"):
            choose(candidates, REQUEST, wish)


def test_a_suspect_is_avoided_while_another_is_left():
    p, d1, d2 = (
        worker("p", Role.PREFILL),
        worker("d1", Role.DECODE),
        worker("d2", Role.DECODE, running=5),
    )
    wish = PlacementConstraints("pd", 32, excluded=frozenset({"d1"}))
    assert choose([p, d1, d2], REQUEST, wish).decode.worker_id == "d2"
    assert choose([p, d1], REQUEST, wish).decode.worker_id == "d1"


async def test_admission_is_bounded_and_first_come_first_served():
    admission, order = Admission(1, 2, 5.0), []

    async def one(name):
        async with admission.permit(REQUEST):
            order.append(name)
            await asyncio.sleep(0)

    async with admission.permit(REQUEST):
        waiting = [asyncio.create_task(one(n)) for n in "ab"]
        await asyncio.sleep(0)
        assert admission.num_queued == 2
        with pytest.raises(Overloaded, match="1 requests run and 2 wait"):
            async with admission.permit(REQUEST):
                pass
    await asyncio.gather(*waiting)
    assert order == ["a", "b"] and (admission.num_running, admission.num_queued) == (0, 0)


def of(tenant, n=1):
    return replace(REQUEST, tenant=tenant, sampling=SamplingParams(n=n))


async def hold(admission, request, log, until):
    async with admission.permit(request):
        log.append(request.tenant)
        await until.wait()


async def test_one_tenants_many_do_not_keep_out_anothers_one():
    """The line is full of one tenant: its newest makes room, and the newcomer is next but one."""
    admission, log, until = Admission(2, 3, 5.0), [], asyncio.Event()
    many = [asyncio.create_task(hold(admission, of("a"), log, until)) for _ in range(5)]
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_queued) == (2, 3)
    with pytest.raises(Overloaded, match="2 requests run and 3 wait"):
        admission.check_open("a")  # before anything is done for one more
    admission.check_open("b")
    one = asyncio.create_task(hold(admission, of("b"), log, until))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 requests run and 3 wait"):
        await many[-1]
    until.set()
    await asyncio.gather(one, *many[:-1])
    assert log == ["a", "a", "a", "b", "a"]
    assert (admission.num_running, admission.num_queued) == (0, 0)


async def test_a_request_takes_a_permit_for_each_choice():
    admission, log, until = Admission(8, 9, 30.0), [], asyncio.Event()
    first = asyncio.create_task(hold(admission, of("a", n=5), log, until))
    await asyncio.sleep(0)
    large = asyncio.create_task(hold(admission, of("b", n=4), log, until))
    small = asyncio.create_task(hold(admission, of("c"), log, until))
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_queued) == (5, 2), "small ones do not pass it"
    until.set()
    await asyncio.gather(first, large, small)
    assert log == ["a", "b", "c"] and admission.num_running == 0
    tight = Admission(2, 9, 30.0)
    async with tight.permit(of("a", n=8)):
        assert tight.num_running == 2


@pytest.mark.parametrize("leaves", ["late", "cancelled"])
async def test_when_a_large_request_leaves_the_line_those_behind_it_get_what_is_free(leaves):
    wait_s = 0.02 if leaves == "late" else 30.0
    admission, log, until = Admission(8, 2, wait_s), [], asyncio.Event()
    running = asyncio.create_task(hold(admission, of("a", n=5), log, until))
    await asyncio.sleep(0)
    large = asyncio.create_task(hold(admission, of("b", n=4), log, until))
    await asyncio.sleep(0)
    admission._queue_wait_s = 30.0
    small = asyncio.create_task(hold(admission, of("b"), log, until))
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_queued) == (5, 2)
    if leaves == "cancelled":
        large.cancel()
    await asyncio.gather(large, return_exceptions=True)
    await asyncio.sleep(0)
    assert log == ["a", "b"]
    assert (admission.num_running, admission.num_queued) == (6, 0)
    until.set()
    await asyncio.gather(running, small)
    assert admission.num_running == 0


def test_one_reply_takes_half_of_all_permits_at_most():
    Admission(256, 0, 1.0).check_share(128, 1)
    Admission(1, 0, 1.0).check_share(1, 8)
    with pytest.raises(InvalidRequest, match="128 prompts x n = 2.*256 outputs.*limit is 128"):
        Admission(256, 0, 1.0).check_share(128, 2)


async def test_admission_is_bounded_in_prompt_tokens_too():
    admission = Admission(1, 100, 5.0, max_queued_tokens=100)
    request = [replace(REQUEST, token_ids=tuple(range(n))) for n in (10, 60, 50, 40)]
    async with admission.permit(request[0]):
        waiting = asyncio.ensure_future(take(admission, request[1]))
        await asyncio.sleep(0)
        with pytest.raises(
            Overloaded, match="60 prompt tokens wait, this one has 50, the limit is 100"
        ):
            await take(admission, request[2])
        other = asyncio.ensure_future(take(admission, request[3]))
        await asyncio.sleep(0)
    await asyncio.gather(waiting, other)
    assert admission._num_queued_tokens == 0


async def take(admission, request):
    async with admission.permit(request):
        pass


async def test_admission_gives_up_in_time_and_returns_permits_of_those_who_left():
    admission = Admission(1, 5, 0.02)
    async with admission.permit(REQUEST):
        with pytest.raises(Overloaded, match=r"no permit within 0\.02 s"):
            async with admission.permit(REQUEST):
                pass
        task = asyncio.create_task(admission._acquire(1))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    # A permit granted to a waiter in the moment it is cancelled is not lost.
    async with admission.permit(REQUEST):
        task = asyncio.create_task(admission._acquire(1))
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (admission.num_running, admission.num_queued) == (0, 0)
    admission.is_draining = True
    with pytest.raises(Draining):
        async with admission.permit(REQUEST):
            pass


@pytest.mark.parametrize("is_first", [True, False])
def test_a_permit_that_comes_in_the_turn_in_which_its_waiter_gives_up_is_used_or_passed_on(
    is_first,
):
    async def main():
        admission, loop = Admission(1, 5, 1.0), asyncio.get_running_loop()
        await admission._acquire(1)
        if is_first:
            loop.call_at(1.0, admission._release)
        waiting = asyncio.ensure_future(take(admission, REQUEST))
        await asyncio.sleep(0.5)
        later = asyncio.ensure_future(take(admission, REQUEST))
        if not is_first:
            loop.call_at(1.0, admission._release)
        found = await asyncio.gather(waiting, later, return_exceptions=True)
        assert loop.time() == 1.0
        return found, admission.num_running, admission.num_queued

    (first, second), running, queued = run_virtual(main())
    assert second is None and (running, queued) == (0, 0)
    assert first is None if is_first else isinstance(first, Overloaded)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": float("inf")}, "top_p"),
        ({"n": 9}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ("é" * 200,)}, "stop"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_sampling_parameters_name_the_wrong_field(changes, field):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**changes).validate(100)
    assert caught.value.field == field


def test_timeline_definitions():
    line = Timeline(received_at=10.0)
    assert line.ttft_s is None and line.tpot_s is None and line.e2e_s is None
    for at, tokens in ((10.5, 1), (10.7, 2), (11.1, 1)):
        line.delivered(at, tokens)
    line.ended_at = 11.2
    assert line.ttft_s == pytest.approx(0.5) and line.e2e_s == pytest.approx(1.2)
    assert line.itl_s == pytest.approx([0.2, 0.4]) and line.tpot_s == pytest.approx(0.6 / 3)
