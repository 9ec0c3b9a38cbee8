"""Faults in the code that delivers: a request's harm that request,
a link's that link, on virtual time."""

import asyncio

import pytest
from support.virtual import PROMPT, Heard, ask, expected, run, unit

from core.config import PlacementConfig, RouterConfig
from core.errors import InternalError
from core.session import Role
from core.types import RequestEnded, SamplingParams, TextDelta
from simulation.observers import ClusterObserver
from simulation.ports import InlineDecoder
from worker.attempt import Attempt

LONG = {"max_tokens": 30, "ignore_eos": True}


class BadDecoder(InlineDecoder):
    """Raises at its third token, as a tokenizer may at bytes that are no text."""

    num_pushed = 0

    def push(self, token_id):
        self.num_pushed += 1
        if self.num_pushed == 3:
            raise Exception("Invalid prefix encountered")
        return super().push(token_id)


def states(cluster):
    return [session.state.name for session in cluster.sessions.all()]


def test_a_decoder_that_raises_ends_its_request_alone(caplog):
    async def scenario(cluster):
        cluster.orchestrator._new_decoder = lambda request: (
            BadDecoder() if request.request_id == "bad" else InlineDecoder()
        )
        names = ("neighbour", "bad", "other")
        answers = await asyncio.gather(*(ask(cluster, name, **LONG) for name in names))
        later = await ask(cluster, "later", **LONG)
        return answers, later, states(cluster)

    (neighbour, bad, other), later, sessions = run(scenario)
    assert type(bad[1].error) is InternalError and bad[1].timing.attempts == (
        "0:pd:internal_error",
    )
    assert neighbour[1].error is other[1].error is later[1].error is None
    assert neighbour[0] == other[0] == later[0] == expected(**LONG)
    assert sessions == ["LIVE", "LIVE"]
    assert len([r for r in caplog.records if r.exc_info]) == 1


def test_a_decoder_that_cannot_be_made_is_the_requests_fault_too():
    async def scenario(cluster):
        def refuse(request):
            raise RuntimeError("no decoder")

        cluster.orchestrator._new_decoder = refuse
        events = await cluster.generate(cluster.request("r", PROMPT, SamplingParams()))
        return events, cluster.orchestrator.num_running

    [end], running = run(scenario)
    assert type(end.error) is InternalError and running == 0


@pytest.mark.parametrize("bad", [TextDelta, RequestEnded])
def test_a_caller_that_fails_to_take_an_event_leaks_nothing_and_is_told_the_end_once(bad):
    async def scenario(cluster):
        events, heard = [], Heard(cluster)

        def emit(event):
            events.append(event)
            if isinstance(event, bad):
                raise RuntimeError("the reply is broken")

        request = cluster.request("r", PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))
        await cluster.orchestrator.run(request, emit)
        admission = cluster.orchestrator._admission
        subscribers = sum(len(session.subscriptions) for session in cluster.sessions.all())
        left = cluster.orchestrator.num_running, admission.num_running, subscribers
        return events, heard.ended, left, states(cluster)

    events, noted, left, sessions = run(scenario)
    assert [type(e) for e in events].count(RequestEnded) == 1
    assert noted == [events[-1]] and left == (0, 0, 0) and sessions == ["LIVE", "LIVE"]
    assert (type(events[-1].error) is InternalError) == (bad is TextDelta)


def test_those_who_note_ends_and_retries_harm_nobody():
    async def scenario(cluster):
        class Broken(ClusterObserver):
            def retried(self, error):
                raise RuntimeError("the metrics are broken")

            def request_ended(self, run, ended):
                raise RuntimeError("the metrics are broken")

        cluster.observers.join(Broken())
        cluster.runners["decode2"].fails_next = 1
        return await ask(cluster, **LONG)

    tokens, ended = run(scenario)
    assert ended.error is None and len(ended.timing.attempts) == 2
    assert tokens == expected(**LONG)


@pytest.mark.parametrize("role", list(Role))
def test_a_worker_that_fails_to_begin_an_attempt_ends_that_one(role):
    async def scenario(cluster):
        worker = unit(cluster, role)
        begin = worker.role.begin

        def refuse(attempt):
            begin(attempt)
            if attempt.run_id.startswith("bad~"):
                raise KeyError("bug")

        worker.role.begin = refuse
        return await asyncio.gather(ask(cluster, "bad", **LONG), ask(cluster, "good", **LONG))

    (_, bad), (tokens, good) = run(scenario)
    assert type(bad.error) is InternalError
    assert good.error is None and tokens == expected(**LONG)


@pytest.mark.parametrize("order", ["submit", "credit"])
def test_an_order_that_a_worker_fails_at_ends_its_attempt(order):
    async def scenario(cluster):
        attempts = unit(cluster, Role.DECODE).attempts
        good = getattr(attempts, order)
        bitten = []

        def fails(*details):
            if details[-1].run_id.startswith("bad~"):
                bitten.append(order)
                raise KeyError("bug")
            good(*details)

        setattr(attempts, order, fails)
        sampling = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0)
        events = []
        request = cluster.request("bad", PROMPT, sampling)
        bad = asyncio.ensure_future(cluster.orchestrator.run(request, events.append))
        neighbour = asyncio.ensure_future(ask(cluster, "good", max_tokens=10, ignore_eos=True))
        await asyncio.sleep(1)
        cluster.orchestrator.consumed(request.run_key, 10)
        async with asyncio.timeout(5):
            await bad
        return bitten, events[-1], await neighbour, states(cluster)

    bitten, end, (tokens, good), sessions = run(scenario, router=RouterConfig(credit_positions=10))
    assert bitten and type(end.error) is InternalError
    assert good.error is None and tokens == expected(max_tokens=10, ignore_eos=True)
    assert sessions == ["LIVE", "LIVE"]


def test_a_result_that_a_worker_fails_to_take_ends_its_attempt(monkeypatch):
    append = Attempt.append

    def fails(attempt, choice, position, token):
        if attempt.run_id.startswith("bad~") and position == 5:
            raise KeyError("bug")
        return append(attempt, choice, position, token)

    monkeypatch.setattr(Attempt, "append", fails)

    async def scenario(cluster):
        return await asyncio.gather(ask(cluster, "bad", **LONG), ask(cluster, "good", **LONG))

    (tokens, bad), (rest, good) = run(scenario)
    assert type(bad.error) is InternalError and len(tokens[0]) == 5
    assert good.error is None and rest == expected(**LONG)


def test_what_a_failed_beginning_had_begun_is_given_back_at_once():
    async def scenario(cluster):
        worker = unit(cluster, Role.DECODE)
        begin = worker.attempts._begin

        def fails(attempt):
            begin(attempt)
            raise KeyError("bug")

        worker.attempts._begin = fails
        _, ended = await ask(cluster, max_tokens=100, ignore_eos=True)
        await asyncio.sleep(0.05)
        scheduler = worker.scheduler
        return ended.error, len(scheduler.waiting) + len(scheduler.running)

    error, left = run(scenario, placement=PlacementConfig(path="local"))
    assert type(error) is InternalError and left == 0
