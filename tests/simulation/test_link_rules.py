"""Sessions between router and workers: who is woken, who counts as dead,
what is wanted, on virtual time."""

import asyncio
import gc

import pytest
from support.virtual import PROMPT, ask, attempt_of, expected, run, unit

from core.config import EngineConfig, PlacementConfig, RouterConfig
from core.errors import Draining, NoWorker, PoolExhausted, StepFailed, WorkerDied, WorkerLost
from core.session import (
    AttemptEnded,
    Credit,
    Role,
    StepFrame,
    Submit,
    Task,
    WorkerTiming,
)
from core.types import Logprob, RequestEnded, SamplingParams
from engine.scheduling.events import Sampled
from simulation.network import SimStream

LONG = {"max_tokens": 30, "ignore_eos": True}
LOCAL = PlacementConfig(path="local")


# --- who waits is woken ---------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
def test_a_request_that_comes_while_ranks_restart_goes_on_when_they_are_up(role):
    async def scenario(cluster):
        await ask(cluster, "warm")
        worker = unit(cluster, role)
        worker._runner.die_between_steps()
        await asyncio.sleep(0.1)
        assert not worker.is_ready
        started_at = cluster.clock.now_s()
        tokens, ended = await ask(cluster, timeout_s=300.0, **LONG)
        return tokens, ended, cluster.clock.now_s() - started_at

    tokens, ended, took_s = run(scenario)
    assert ended.error is None and ended.timing.attempts == ("0:pd:ok",)
    assert tokens == expected(**LONG) and took_s < 2


def test_after_a_fault_a_request_waits_as_long_as_ranks_are_starting():
    async def scenario(cluster):
        runner = cluster.runners["decode2"]

        async def slow_restart():
            await asyncio.sleep(20)

        runner.restart = slow_restart
        running = asyncio.ensure_future(ask(cluster, **LONG))
        await asyncio.sleep(0.15)
        runner.dies_next = True
        return await running

    tokens, ended = run(scenario)
    assert ended.error is None and ended.timing.attempts == ("0:pd:worker_lost", "1:pd:ok")
    assert tokens == expected(**LONG) and 20 < ended.timing.e2e_s < 22


def test_after_a_fault_a_request_waits_for_a_worker_that_is_starting():
    async def scenario(cluster):
        running = asyncio.ensure_future(ask(cluster, **LONG))
        await asyncio.sleep(0.15)
        cluster.membership.starting = 1
        await cluster.kill("decode2")
        await asyncio.sleep(15)
        await cluster.add(Role.DECODE)
        cluster.membership.starting = 0
        return await running

    tokens, ended = run(scenario)
    assert ended.error is None and tokens == expected(**LONG) and ended.timing.e2e_s > 15


def test_a_start_that_comes_to_nothing_is_waited_for_three_seconds_more():
    async def scenario(cluster):
        running = asyncio.ensure_future(ask(cluster, **LONG))
        await asyncio.sleep(0.15)
        cluster.membership.starting = 1
        await cluster.kill("decode2")
        await asyncio.sleep(8)
        cluster.membership.starting = 0
        cluster.membership.notify()
        gave_up_at = cluster.clock.now_s()
        _, ended = await running
        return ended, cluster.clock.now_s() - gave_up_at

    ended, after_s = run(scenario)
    assert isinstance(ended.error, NoWorker) and after_s == pytest.approx(3.0)


def test_a_member_whose_link_failed_is_waited_for_and_used_again(caplog):
    async def scenario(cluster):
        [session] = [x for x in cluster.sessions.all() if x.descriptor.role is Role.DECODE]

        def fails(message):
            raise KeyError("a bug of the link")

        session._note_progress = fails
        await asyncio.sleep(0.6)
        lost = cluster.sessions.has_lost()
        return lost, await ask(cluster, **LONG)

    lost, (tokens, ended) = run(scenario)
    assert lost and ended.error is None and tokens == expected(**LONG)
    assert "the session with worker decode2 failed" in [r.getMessage() for r in caplog.records]


# --- who counts as dead ---------------------------------------------------------------------------


def test_a_hung_worker_behind_a_stream_that_breaks_again_and_again_is_found():
    async def scenario(cluster):
        running = asyncio.ensure_future(ask(cluster, **LONG))
        await asyncio.sleep(0.15)
        [decode] = [u for u in cluster.units.values() if attempt_of(u, "r") and u.pool.num_held
                    and u.descriptor.role is Role.DECODE]  # fmt: skip
        cluster.runners[decode.descriptor.worker_id].stuck_for_s = 3600.0
        started_at = cluster.clock.now_s()
        cuts = 0
        while not running.done() and cluster.clock.now_s() < started_at + 30:
            await asyncio.sleep(0.4)
            cuts += cluster.hub.reset("session", decode.descriptor.worker_id)
        tokens, ended = await running
        took_s = cluster.clock.now_s() - started_at
        await cluster.kill(decode.descriptor.worker_id)
        return tokens, ended, took_s, cuts

    tokens, ended, took_s, cuts = run(scenario, decode=2)
    assert ended.error is None and cuts > 5 and took_s < 6
    assert tokens == expected(**LONG)


def test_a_router_that_slept_takes_nobody_for_silent_or_stuck():
    async def scenario(cluster):
        running = asyncio.ensure_future(ask(cluster, max_tokens=100, ignore_eos=True))
        await asyncio.sleep(0.15)
        router = cluster.routers[0]
        before = [id(session) for session in router.sessions.all()]
        for runner in cluster.runners.values():
            runner.stuck_for_s = 0.3
        await cluster.pause(router.name, 4.0)
        _, ended = await running
        await asyncio.sleep(2)
        return ended, before == [id(session) for session in router.sessions.all()]

    ended, are_the_same = run(scenario)
    assert ended.error is None and ended.timing.attempts == ("0:pd:ok",) and are_the_same


def test_who_was_not_in_the_step_that_killed_the_ranks_is_not_suspected():
    """One is parked for want of credit: its attempt ends too, but not as a death of its doing."""

    async def scenario(cluster):
        errors = {}
        for name in ("parked", "running"):
            request = cluster.request(name, PROMPT, SamplingParams(**LONG), 60.0)
            asyncio.ensure_future(cluster.orchestrator.run(request, lambda event: None))
            await asyncio.sleep(0.5)
        runs = {key[1]: r for key, r in cluster.orchestrator._runs.items()}
        cluster.orchestrator.consumed(("", "running"), 10)
        cluster.runners["decode2"].dies_next = True
        await asyncio.sleep(0.5)
        for name, one in runs.items():
            errors[name] = one.num_deaths, str(one.attempts[0])
        for key in list(cluster.orchestrator._runs):
            cluster.orchestrator.abort(key)
        await asyncio.sleep(0.1)
        return errors

    errors = run(
        scenario,
        router=RouterConfig(credit_positions=10),
        engine=EngineConfig(block_size_tokens=4, num_blocks=128, max_step_tokens=64),
    )
    assert errors == {"parked": (0, "0:pd:worker_lost"), "running": (1, "0:pd:worker_lost")}


@pytest.mark.parametrize("error", [Draining("moves on"), PoolExhausted("no room")])
def test_moves_are_no_faults_but_they_are_bounded(error):
    async def scenario(cluster):
        def refuse(attempt):
            raise error

        unit(cluster, Role.DECODE).attempts._begin = refuse
        return await ask(cluster, timeout_s=300.0)

    _, ended = run(scenario, placement=LOCAL)
    assert type(ended.error) is type(error) and len(ended.timing.attempts) == 33


# --- what is wanted -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["local", "pd"])
def test_a_submit_that_arrived_before_its_write_returned_is_served_once(path, monkeypatch):
    """The stream is cut between the two: the Submit comes again, and is known."""
    send = SimStream.send

    async def slow_send(stream, message):
        await send(stream, message)
        if stream.kind == "session":
            await asyncio.sleep(0.005)

    monkeypatch.setattr(SimStream, "send", slow_send)

    async def scenario(cluster):
        loop, cut = asyncio.get_running_loop(), []

        def tamper(stream, message):
            if isinstance(message, Submit) and not cut:
                cut.append(stream.peer.node)
                loop.call_later(0.003, cluster.hub.reset, "session", cut[0])
            return message

        cluster.hub.tamper = tamper
        tokens, ended = await ask(cluster, **LONG)
        return cut, tokens, ended, sum(u.attempts.num_stale for u in cluster.units.values())

    cut, tokens, ended, stale = run(scenario, placement=PlacementConfig(path=path))
    assert cut and stale == 1 and ended.error is None
    assert ended.timing.attempts == (f"0:{path}:ok",) and tokens == expected(**LONG)


def test_the_end_of_a_choice_that_was_lost_with_its_stream_is_sent_again():
    async def scenario(cluster):
        lost = []

        def tamper(stream, message):
            if isinstance(message, StepFrame) and not lost:
                if any(d.finish for d in message.deltas):
                    lost.append(message)
                    cluster.hub.reset("session", stream.node)
                    return None
            return message

        cluster.hub.tamper = tamper
        return lost, await ask(cluster, timeout_s=20.0, **LONG)

    lost, (tokens, ended) = run(scenario, placement=LOCAL)
    assert lost and ended.error is None and ended.timing.attempts == ("0:local:ok",)
    assert tokens == expected(**LONG)


def test_a_submit_carries_the_age_of_its_request():
    async def scenario(cluster):
        ages = []

        def tamper(stream, message):
            if isinstance(message, Submit):
                ages.append((message.task, message.age_s))
            return message

        cluster.hub.tamper = tamper
        running = asyncio.ensure_future(ask(cluster, **LONG))
        await asyncio.sleep(0.25)
        await cluster.kill("decode2")
        _, ended = await running
        return ages, ended

    ages, ended = run(scenario, placement=PlacementConfig(path="auto"))
    assert ended.error is None
    assert ages[:2] == [(Task.PREFILL, 0.0), (Task.DECODE, 0.0)]
    assert ages[2][0] is Task.LOCAL and 0.25 < ages[2][1] < 1.0


def test_credit_is_renewed_when_half_of_it_is_used_and_not_before():
    async def scenario(cluster):
        sent = []

        def tamper(stream, message):
            if isinstance(message, Credit):
                sent.append(message.limit)
            return message

        cluster.hub.tamper = tamper
        request = cluster.request("slow", PROMPT, SamplingParams(**LONG), 60.0)
        running = asyncio.ensure_future(cluster.orchestrator.run(request, lambda event: None))
        await asyncio.sleep(1)
        found = []
        for taken in (4, 5, 9, 10):
            cluster.orchestrator.consumed(request.run_key, taken)
            await asyncio.sleep(0.5)
            found.append(list(sent))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return found

    found = run(scenario, router=RouterConfig(credit_positions=10))
    assert found == [[], [15], [15], [15, 20]]


def test_what_the_engine_says_after_an_attempts_end_is_not_told():
    async def scenario(cluster):
        running = asyncio.ensure_future(ask(cluster, max_tokens=100, ignore_eos=True))
        await asyncio.sleep(0.2)
        table = unit(cluster, Role.DECODE).attempts
        attempt = attempt_of(unit(cluster, Role.DECODE), "r")
        sequence = attempt.sequences[-1]
        table.end(attempt, StepFailed("injected"))
        before = len(attempt.logs[0].tokens)
        position = attempt.logs[0].base + before
        table.deliver([Sampled(sequence, 0, position, Logprob(9, 0.0), None, None)])
        after = len(attempt.logs[0].tokens)
        tokens, ended = await running
        return before, after, tokens, ended

    before, after, tokens, ended = run(scenario)
    assert before > 0 and after == before
    assert ended.error is None and tokens == expected(max_tokens=100, ignore_eos=True)


@pytest.mark.parametrize("trouble", ["ended", "lost"])
@pytest.mark.parametrize("has_spoken", [True, False])
def test_troubles_of_prefill_count_only_until_decode_has_spoken(trouble, has_spoken):
    async def scenario(cluster):
        attempts = []
        running = asyncio.ensure_future(ask(cluster, max_tokens=60, ignore_eos=True))
        while not attempts or attempts[0].decode_spoke is not has_spoken:
            await asyncio.sleep(0.01)
            attempts = list(cluster.orchestrator._attempts.in_progress.values())
        [attempt] = attempts
        error = WorkerDied("gone") if trouble == "lost" else WorkerLost("its engine failed")
        prefill = unit(cluster, Role.PREFILL)
        if trouble == "lost":
            attempt.on_lost(prefill.descriptor.worker_id, error)
        else:
            name, key = prefill.descriptor.worker_id, attempt.run.run_id
            ended = AttemptEnded(key, attempt.epoch, Task.PREFILL, WorkerTiming(), error)
            attempt.on_ended(name, ended)
        return await running

    tokens, ended = run(scenario)
    assert ended.error is None and tokens == expected(max_tokens=60, ignore_eos=True)
    assert len(ended.timing.attempts) == (1 if has_spoken else 2)


def test_no_fault_of_an_attempt_is_left_unheard(caplog):
    """asyncio would report it when the future is collected."""

    async def scenario(cluster):
        tasks = [asyncio.ensure_future(ask(cluster, f"r{i}", **LONG)) for i in range(4)]
        await asyncio.sleep(0.15)
        attempts = list(cluster.orchestrator._attempts.in_progress.values())
        for task, attempt in zip(tasks, attempts, strict=True):
            attempt.fail(WorkerLost("gone"))
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        del attempts, attempt, tasks, task
        gc.collect()
        return ends

    ends = run(scenario)
    assert all(isinstance(e, asyncio.CancelledError) for e in ends)
    assert [r.getMessage() for r in caplog.records] == []


def test_the_terminal_event_is_one_even_for_a_request_that_is_aborted_twice():
    async def scenario(cluster):
        events = []
        request = cluster.request("r", PROMPT, SamplingParams(**LONG))
        running = asyncio.ensure_future(cluster.orchestrator.run(request, events.append))
        await asyncio.sleep(0.15)
        found = [cluster.orchestrator.abort(request.run_key) for _ in range(2)]
        await running
        return found, events

    found, events = run(scenario)
    assert found == [True, True]
    assert [isinstance(e, RequestEnded) for e in events].count(True) == 1
