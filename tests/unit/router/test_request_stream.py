"""What a consumer of running requests is given, and when."""

import asyncio

import pytest

from core.errors import Unavailable
from core.types import (
    ChoiceFinished,
    FinishReason,
    GenerateRequest,
    Logprob,
    RequestEnded,
    SamplingParams,
    TextDelta,
    Usage,
)
from router.request_stream import StreamGroup
from router.turns import MAX_WOKEN, Turns
from simulation.loop import run_virtual

END = RequestEnded(Usage(1), None)


class Runner:
    """Runs requests whose events a test gives; notes how much their consumers took."""

    def __init__(self):
        self.emits, self.taken = [], []

    async def run(self, request, emit, forced_path=None):
        self.emits.append(emit)
        await asyncio.get_running_loop().create_future()

    def consumed(self, run_key, num_positions):
        self.taken.append(num_positions)

    def abort(self, run_key, error=None):
        return False

    def is_admitted(self, run_key):
        return True


@pytest.fixture
async def new_group():
    """Opens a group of one request; returns it with what emits its events."""
    runner, groups = Runner(), []

    async def make(turns, n=1):
        request = GenerateRequest(f"r{len(groups)}", "m", (1,), SamplingParams(n=n), 1, 0.0)
        groups.append(StreamGroup(runner, [request], turns))
        await asyncio.sleep(0)
        return groups[-1], runner.emits[-1], runner

    yield make
    for group in groups:
        await group.close(Unavailable("the test is over"))


def token(position, text, choice=0):
    logprobs = (Logprob(ord(text), -1.0),)
    return TextDelta(choice, position, (ord(text),), text, logprobs)


def crowd(turns):
    """Let so many consumers wait that nobody else is woken in this turn or the next."""
    for _ in range(2 * MAX_WOKEN + 1):
        turns.wake(asyncio.Event())


async def test_each_token_is_an_event_of_its_own_while_the_router_keeps_up(new_group):
    group, emit, _ = await new_group(Turns())
    events = [token(0, "a"), token(1, "b"), END]
    for event in events:
        emit(event)
    assert await group.batch() == [(0, event) for event in events]
    assert group.is_over


async def test_tokens_of_a_choice_become_one_event_when_the_router_is_behind(new_group):
    turns = Turns()
    group, emit, runner = await new_group(turns, n=2)
    crowd(turns)
    tail = TextDelta(1, 2, (), "!")
    finished = ChoiceFinished(1, FinishReason.LENGTH, position=2)
    for event in (token(0, "a"), token(1, "b"), token(0, "c", 1), token(1, "d", 1)):
        emit(event)
    for event in (tail, finished, token(2, "e")):
        emit(event)
    scores = (Logprob(ord("a"), -1.0), Logprob(ord("b"), -1.0))
    assert [event for _, event in await group.batch()] == [
        TextDelta(0, 0, (ord("a"), ord("b")), "ab", scores),
        TextDelta(
            1, 0, (ord("c"), ord("d")), "cd", token(0, "c").logprobs + token(0, "d").logprobs
        ),
        # It counts as a position of its own for a client that resumes.
        tail,
        finished,
        token(2, "e"),
    ]
    assert runner.taken[-1] == 3, "credit counts all tokens"


async def test_a_consumer_waits_for_its_turn(new_group):
    turns = Turns()
    group, emit, _ = await new_group(turns)
    waiting = asyncio.ensure_future(group.batch())
    await asyncio.sleep(0)
    crowd(turns)
    emit(token(0, "a"))
    await asyncio.sleep(0)
    emit(token(1, "b"))
    assert not waiting.done()
    assert await waiting == [(0, token(0, "a")), (0, token(1, "b"))]


def test_a_wait_without_events_ends_after_its_own_time_and_not_after_anothers():
    async def waits():
        runner = Runner()
        request = GenerateRequest("r", "m", (1,), SamplingParams(), 1, 0.0)
        group = StreamGroup(runner, [request], Turns())
        first = asyncio.ensure_future(group.batch(10.0))
        await asyncio.sleep(6.0)
        runner.emits[0](token(0, "a"))
        assert await first == [(0, token(0, "a"))]
        began_at = asyncio.get_running_loop().time()
        assert await group.batch(10.0) == []
        waited_s = asyncio.get_running_loop().time() - began_at
        await group.close()
        return waited_s

    assert run_virtual(waits()) == pytest.approx(10.0)
