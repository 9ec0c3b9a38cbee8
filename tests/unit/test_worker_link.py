"""A link's stream: how it ends when the worker is given up, and what is measured over it."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.scripts import WORKER, Listener, Script, Wire

from core.errors import WorkerDied, WorkerLost
from core.ports import LoopClock, StreamClosed
from core.session import ConnectPeers, Credit, Load, PeerReport, Progress, RouteReport, Welcome
from router.workers.outbox import MAX_OUTGOING
from router.workers.session import SessionState, WorkerSession
from simulation.loop import run_virtual


def still_link():
    """A link that nobody runs: nothing is sent, and no time passes."""
    return WorkerSession(WORKER, None, "router", SimpleNamespace(now_s=lambda: 0.0), iter(range(9)))


@pytest.mark.parametrize("was_live", [False, True])
def test_a_worker_that_does_not_answer_in_time_is_cut_off_and_has_not_died(was_live):
    """Its port is open or its host is out of reach: nothing says that its process has ended."""

    async def main():
        first = [Script(Welcome(WORKER), fails=StreamClosed("cut"))] if was_live else []
        silent = [Script() for _ in range(5)]
        worker = WorkerSession(WORKER, Wire(*first, *silent), "router", LoopClock(), iter(range(9)))
        listener = Listener()
        worker.subscribe("r", listener, 3)
        await worker.run()
        return listener.heard, [s.is_reset for s in silent if s.sent], worker.state.name

    [error], resets, state = run_virtual(main())
    assert type(error) is WorkerLost and error.message == "worker w was cut off"
    assert resets and all(resets) and state == "LOST"


@pytest.mark.parametrize("ending", ["silent", "stuck", "replaced", "odd"])
def test_no_stream_is_left_open_to_a_worker_that_is_given_up(ending):
    """The worker would hold its attempts for a router that does not listen any more."""

    async def main():
        stuck = [Progress(7, 7, work_in_hand=True)] * (9 if ending == "stuck" else 0)
        welcome = Welcome(replace(WORKER, incarnation=2) if ending == "replaced" else WORKER)
        welcome = PeerReport(()) if ending == "odd" else welcome
        stream, refusals = Script(welcome), [StreamClosed("refused")] * 3
        worker = WorkerSession(
            WORKER, Wire(stream, *refusals), "router", LoopClock(), iter(range(9))
        )
        listener = Listener()
        worker.subscribe("r", listener, 3)
        running = asyncio.ensure_future(worker.run())
        for number, progress in enumerate(stuck, 1):
            await asyncio.sleep(0.5)
            stream.inbox.put_nowait(SimpleNamespace(number=number, message=progress))
        await running
        return stream.is_reset, listener.heard

    is_reset, [error] = run_virtual(main())
    kind = WorkerDied if ending == "stuck" else WorkerLost
    words = {"silent": "was silent for 3 s", "stuck": "is stuck in a step"}.get(ending, "died")
    assert is_reset and type(error) is kind and error.message == f"worker w {words}"


def test_a_way_is_measured_by_the_worker_and_only_what_it_measured_is_the_answer():
    async def main():
        opened, measured = RouteReport("a", "shm"), RouteReport("a", "shm", gb_per_s=2.5)
        stream = Script(Welcome(WORKER))
        worker = WorkerSession(WORKER, Wire(stream), "router", LoopClock(), iter(range(9)))
        running = asyncio.ensure_future(worker.run())
        await asyncio.sleep(0.1)
        asking = asyncio.ensure_future(worker.routes.measure("a", 1 << 20))
        answered = []
        for number, route in enumerate((opened, RouteReport("b", gb_per_s=9.0), measured), 1):
            await asyncio.sleep(0.1)
            stream.inbox.put_nowait(SimpleNamespace(number=number, message=PeerReport((route,))))
            await asyncio.sleep(0.1)
            answered.append(asking.done())
        found = await asking
        with pytest.raises(TimeoutError):
            await worker.routes.measure("c", 1 << 20)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return answered, found, [m for m in stream.sent if isinstance(m, ConnectPeers)]

    answered, found, meets = run_virtual(main())
    assert answered == [False, False, True]
    assert found == RouteReport("a", "shm", gb_per_s=2.5)
    assert meets == [ConnectPeers(("a",), 1 << 20), ConnectPeers(("c",), 1 << 20)]


def test_the_last_ranks_that_a_worker_named_are_kept_while_fresh_ones_start():
    worker, found = still_link(), []
    for pids in ((7, 8), (), (9,)):
        worker._note_progress(Progress(0, 0, work_in_hand=False, rank_pids=pids))
        found.append(worker.rank_pids)
    assert found == [(7, 8), (7, 8), (9,)]


def test_placement_sees_every_change_of_a_workers_load():
    worker, found = still_link(), []

    def look():
        candidate = worker.candidate
        found.append((candidate.load.num_waiting, candidate.pending_tokens))

    look()
    worker._note_progress(Progress(0, 0, work_in_hand=False, load=Load(num_waiting=4)))
    look()
    worker.subscribe("r", Listener(), 30)
    look()
    worker.forget("r", 0)
    look()
    assert found == [(0, 0), (4, 0), (4, 30), (4, 0)]


def test_a_command_that_would_not_be_read_is_refused_and_not_kept():
    worker = still_link()
    for _ in range(MAX_OUTGOING):
        worker.send(Credit("r", 0, 9))
    with pytest.raises(WorkerLost, match="worker w is dialling"):
        worker.send(Credit("r", 0, 9))
    assert len(worker._outbox) == MAX_OUTGOING
    lost = still_link()
    lost._set_state(state=SessionState.LOST)
    with pytest.raises(WorkerLost, match="worker w is lost"):
        lost.send(Credit("r", 0, 9))
    assert not lost._outbox
