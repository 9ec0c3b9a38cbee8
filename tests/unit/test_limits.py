"""Every limit of the heart twice: what is exactly at it is taken, what is one above it is not."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.peers import (
    TRANSFER,
    ReceiveCallbacks,
    SendCallbacks,
    offer_of,
    opened,
    settle,
)
from support.peers import run as run_agent
from support.scripts import WORKER, Script
from support.stepping import Engine, request
from support.virtual import run as run_cluster
from support.virtual import unit

from core.errors import Overloaded, PromptTooLong, WorkerDied
from core.ports import LoopClock
from core.session import Hello, Progress, Role, Submit, Task
from core.types import GenerateRequest, SamplingParams
from engine.scheduling.block_tables import Limits
from engine.scheduling.sequence import Handover, Status
from engine.scheduling.step_budget import StepBudget
from kv_transfer import frames
from kv_transfer import receive_agent as agents
from kv_transfer.send_agent import TOMBSTONE_S
from router.admission import CANARY_TIER, Admission
from router.workers import sessions as router_sessions
from router.workers.liveness import HUNG_S
from router.workers.session import WorkerSession
from router.workers.sessions import WorkerSessions
from simulation.loop import run_virtual
from simulation.ports import StaticMembership
from transport.sequenced import NumberedStream
from worker import attempts
from worker.router_session import RouterSessions
from worker.session_server import HEARTBEAT_S, ROUTER_PATIENCE_S, SessionServer

# --- an engine's ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_tokens", "fits"), [(30, True), (31, False)])
def test_a_request_fills_the_context_window_to_the_last_token(max_tokens, fits):
    engine = Engine(num_blocks=100, block=4, max_len=40)
    wanted = request("r", [1] * 10, max_tokens=max_tokens)
    if fits:
        engine.submit(wanted)
        return
    with pytest.raises(PromptTooLong, match=r"is 41, the context window is 40"):
        engine.submit(wanted)


@pytest.mark.parametrize(("n", "fits"), [(2, True), (3, False)])
def test_a_request_fills_the_pool_to_the_last_block(n, fits):
    """One block more for each choice: while they share a prompt each of them grows."""
    engine = Engine(num_blocks=12, block=4)
    wanted = request("r", [1] * 10, max_tokens=30, n=n)
    if fits:
        engine.submit(wanted)
        engine.run()
        return
    with pytest.raises(PromptTooLong, match=r"needs 13 blocks, the pool holds 12"):
        engine.submit(wanted)


@pytest.mark.parametrize(("num_held", "runs"), [(0, True), (1, False)])
def test_a_hand_over_runs_ahead_while_it_leaves_half_of_the_pool(num_held, runs):
    engine = Engine(num_blocks=20, block=4, budget=40, cache=False)
    engine.pool.allocate(num_held)
    ahead = engine.scheduler.new_sequence(
        request("r", [1] * 40), 1, (0,), (), 0.0, handover=Handover("slow")
    )
    engine.scheduler.submit(ahead)
    engine.scheduler.plan(0.0)
    assert ahead.status is (Status.RUNNING if runs else Status.WAITING)


def test_a_step_is_long_above_half_a_second_and_short_below_a_fifth():
    found = []
    for start, took_s in [(100, 0.5), (100, 0.6), (50, 0.2), (50, 0.19), (70, 0.19)]:
        budget = StepBudget(Limits(4, 100, 2, 400))
        budget.num_tokens = start
        budget.fit(start, took_s)
        found.append(budget.num_tokens)
    assert found == [100, 66, 50, 100, 100]


@pytest.mark.parametrize(
    ("num_tokens", "took_s", "left"), [(45, 1.0, 18), (46, 1.0, 18), (50, 1.0, 20)]
)
def test_a_budget_never_shrinks_below_one_token_for_each_place_and_some_for_a_prompt(
    num_tokens, took_s, left
):
    budget = StepBudget(Limits(4, 100, 2, 400))
    budget.fit(num_tokens, took_s)
    assert budget.num_tokens == left
    small = StepBudget(Limits(4, 10, 2, 400))
    small.fit(10, 60.0)
    assert small.num_tokens == 10, "and never above what is configured"


# --- an agent's -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("at_s", "is_held"), [(2.2, True), (2.7, False)])
def test_a_lease_ends_with_the_first_look_after_it_is_over(at_s, is_held):
    """Looks are half a second apart; the one at exactly two seconds is not after it."""

    async def scenario(world):
        world.agent.offer(offer_of(world))
        await settle(at_s)
        held = world.agent.num_live
        world.agent.end_send(TRANSFER, None)
        return held

    assert run_agent(scenario, SendCallbacks(), lease_s=2.0) == int(is_held)


@pytest.mark.parametrize(("after_s", "waited_s"), [(-0.1, 0.0), (0.1, 1.0)])
def test_a_transfer_that_has_ended_is_remembered_for_a_while(after_s, waited_s):
    async def scenario(world):
        world.agent.offer(offer_of(world))
        world.agent.end_send(TRANSFER, None)
        await settle(TOMBSTONE_S + after_s)
        began_at = asyncio.get_running_loop().time()
        talk = await opened(world)
        assert await talk.hear() == frames.NotFound()
        return asyncio.get_running_loop().time() - began_at

    assert run_agent(scenario, SendCallbacks(), park_s=1.0) == pytest.approx(waited_s)


def test_routes_are_probed_in_a_bounded_number_at_once_and_again_when_there_is_room(monkeypatch):
    monkeypatch.setattr(agents, "MAX_PROBES", 3)

    async def scenario(world):
        for number in range(4):
            world.agent.probe_peer(f"nowhere{number}", 0)
        await settle()
        tried = [call[1].address for call in world.host.calls]
        for number in range(4, 7):
            world.agent.probe_peer(f"nowhere{number}", 0)
        await settle()
        return tried, [call[1].address for call in world.host.calls]

    tried, later = run_agent(scenario, ReceiveCallbacks())
    assert tried == ["nowhere0", "nowhere1", "nowhere2"]
    assert later == [*tried, "nowhere4", "nowhere5", "nowhere6"]


# --- a worker's -----------------------------------------------------------------------------------


def test_a_worker_remembers_so_many_cancels_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(attempts, "MAX_TOMBSTONES", 3)

    async def scenario(cluster):
        table = unit(cluster, Role.DECODE).attempts
        found = []
        for names in (["a", "b", "c"], ["d"], ["b", "e"]):
            for name in names:
                table.cancel(name, 5)
            for name in "abcde":
                sampling = SamplingParams(max_tokens=1)
                wanted = GenerateRequest(name, "", (1, 2), sampling, 1, 1e6, (0,))
                before = table.num_stale
                known = dict(table._tombstones)
                if name in known:
                    table.submit("router", Submit(wanted, 5, Task.LOCAL, ((),)))
                    assert table.num_stale == before + 1 and name not in table.by_run
            found.append("".join(table._tombstones))
        table.submit("router", Submit(replace(wanted, request_id="a"), 5, Task.LOCAL, ((),)))
        taken = list(table.by_run)
        table.cancel("a", 5)
        return found, taken

    found, taken = run_cluster(scenario)
    assert found == ["abc", "bcd", "dbe"], "one that is cancelled again is the newest"
    assert taken == ["a"], "what was forgotten is news"


@pytest.mark.parametrize("is_read", [True, False])
def test_a_router_is_given_up_when_it_was_silent_or_away_for_longer_than_patience(is_read):
    """One that is connected and silent, and one whose stream is gone, alike."""

    async def main():
        host = SimpleNamespace(
            fail=None, router_alive=lambda router_id: None, descriptor=WORKER,
            progress=lambda: Progress(0, 0, False), cancel=None,
        )  # fmt: skip
        sessions = RouterSessions(host.fail)
        server = SessionServer(None, sessions, host, host, LoopClock(), lambda: 0)
        watching = asyncio.ensure_future(server.watch())
        stream = Script(Hello("router", (), 0))
        serving = asyncio.ensure_future(server._serve(stream))
        await asyncio.sleep(0)
        if not is_read:
            serving.cancel()
        await asyncio.sleep(ROUTER_PATIENCE_S + HEARTBEAT_S / 2)
        before = [s.router_id for s in sessions]
        await asyncio.sleep(HEARTBEAT_S)
        after = [s.router_id for s in sessions]
        watching.cancel()
        serving.cancel()
        await asyncio.gather(watching, serving, return_exceptions=True)
        return before, after

    assert run_virtual(main()) == (["router"], [])


# --- a router's -----------------------------------------------------------------------------------


def stuck_for(seconds):
    """What a router says of a worker whose counters stood still with work in hand for so long."""

    async def main():
        stream = Script()
        worker = WorkerSession(WORKER, None, "router", LoopClock(), iter(range(9)), lambda _: None)
        serving = asyncio.ensure_future(worker._serve(NumberedStream(stream)))
        for number in range(int(seconds / 0.5) + 1):
            progress = Progress(7, 7, work_in_hand=True)
            stream.inbox.put_nowait(SimpleNamespace(number=number, message=progress))
            await asyncio.sleep(0.5)
        is_over = serving.done()
        serving.cancel()
        [found] = await asyncio.gather(serving, return_exceptions=True)
        return found if is_over else None

    return run_virtual(main())


def test_a_worker_is_stuck_once_it_stood_still_for_longer_than_a_hang():
    assert stuck_for(HUNG_S) is None
    assert type(stuck_for(HUNG_S + 0.5)) is WorkerDied


def test_so_many_pairs_that_do_not_fit_are_remembered(monkeypatch):
    monkeypatch.setattr(router_sessions, "MAX_INCOMPATIBLE_PAIRS", 2)

    async def main():
        sessions = WorkerSessions(StaticMembership(), None, "router", LoopClock())
        for incarnation in (2, 3, 4):
            sessions.note_incompatible(replace(WORKER, incarnation=incarnation), WORKER)
        return sessions.incompatible_pairs

    assert run_virtual(main()) == {(2, 1), (3, 1)}


async def test_prompts_fill_the_queue_to_its_last_token():
    admission = Admission(1, 5, 60.0, max_queued_tokens=10)
    await admission._acquire(3)
    waiting = asyncio.ensure_future(admission._acquire(10))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="10 prompt tokens wait, this one has 1, the limit is 10"):
        await admission._acquire(1)
    admission._release()
    await waiting
    with pytest.raises(Overloaded, match="0 prompt tokens wait, this one has 11"):
        await admission._acquire(11)


async def test_a_canary_needs_no_permit_and_takes_none():
    """A full router is still able to show that it serves."""
    admission = Admission(1, 5, 60.0)
    plain = GenerateRequest("r", "", (1, 2), SamplingParams(), 1, 1e6, (0,))
    async with admission.permit(plain):
        async with admission.permit(replace(plain, tier=CANARY_TIER)):
            assert admission.num_running == 1
        assert (admission.num_running, admission.num_queued) == (1, 0)
    assert admission.num_running == 0
