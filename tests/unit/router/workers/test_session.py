"""A link's stream: how it ends when the worker is given up, and what is measured over it."""

import asyncio
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from support.scripted_streams import WORKER, Listener, Script, Wire

from core.clocks import LoopClock
from core.errors import WorkerDied, WorkerLost
from core.ports import StreamClosed
from core.session import (
    ConnectPeers,
    Credit,
    Hello,
    Load,
    PeerReport,
    Progress,
    Role,
    RouteReport,
    RouterHeartbeat,
    Welcome,
)
from router.workers.outbox import MAX_OUTGOING
from router.workers.session import SessionState, WorkerSession
from router.workers.sessions import WorkerSessions
from simulation.loop import run_virtual
from simulation.ports import StaticMembership


def still_link():
    """A link that nobody runs: nothing is sent, and no time passes."""
    return WorkerSession(
        WORKER, None, "router", SimpleNamespace(now_s=lambda: 0.0), iter(range(9)), lambda _: None
    )


@pytest.mark.parametrize("was_live", [False, True])
def test_a_worker_that_does_not_answer_in_time_is_cut_off_and_has_not_died(was_live):
    """Its port is open or its host is out of reach: nothing says that its process has ended."""

    async def main():
        first = [Script(Welcome(WORKER), fails=StreamClosed("cut"))] if was_live else []
        silent = [Script() for _ in range(5)]
        worker = WorkerSession(
            WORKER, Wire(*first, *silent), "router", LoopClock(), iter(range(9)), lambda _: None
        )
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
            WORKER, Wire(stream, *refusals), "router", LoopClock(), iter(range(9)), lambda _: None
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
        worker = WorkerSession(
            WORKER, Wire(stream), "router", LoopClock(), iter(range(9)), lambda _: None
        )
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


@pytest.mark.parametrize("was_live", [False, True])
def test_one_refusal_is_a_worker_that_restarts_its_port_and_not_one_that_is_gone(was_live):
    """Each time anew: what was refused before the last connection does not count."""

    async def main():
        refused = StreamClosed("refused")
        first = [refused, Script(Welcome(WORKER), fails=StreamClosed("cut"))] if was_live else []
        last = Script(Welcome(WORKER))
        wire = Wire(*first, refused, last)
        worker = WorkerSession(WORKER, wire, "router", LoopClock(), iter(range(9)), lambda _: None)
        running = asyncio.ensure_future(worker.run())
        await asyncio.sleep(1.0)
        found = worker.state.name, worker.num_reconnects, last.is_reset
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return found

    assert run_virtual(main()) == ("LIVE", int(was_live), False)


def test_a_member_that_left_and_joins_again_as_it_was_is_dialled_again():
    """A membership that could not be read for a moment loses nobody for good."""

    async def main():
        first = Script(Welcome(WORKER), fails=StreamClosed("cut"))
        again = Script(Welcome(WORKER))
        members = StaticMembership()
        members.join(WORKER)
        wire = Wire(first, *[StreamClosed("refused")] * 2, again)
        sessions = WorkerSessions(members, wire, "router", LoopClock())
        sessions.follow()
        members.leave("w")
        await asyncio.sleep(5.0)
        left = sessions.all(), sessions._tasks
        left = [len(one) for one in left]
        members.join(WORKER)
        await asyncio.sleep(0.5)
        back = [session.state.name for session in sessions.all()]
        await sessions.close()
        return left, back, len(sessions.all()), len(sessions._tasks)

    assert run_virtual(main()) == ([0, 0], ["LIVE"], 0, 0)


def test_nothing_is_kept_of_the_route_to_a_peer_that_is_gone():
    worker = still_link()
    for address in ("a", "b"):
        worker.routes.introduce(address)
    worker.routes.note((RouteReport("a", "shm"), RouteReport("b", "shm")))
    worker.routes.forget("a")
    worker.routes.forget("never met")
    worker.routes.note((RouteReport("a", "shm", gb_per_s=1.0),))
    assert list(worker.routes.reports) == ["b"]
    assert list(worker.routes._introduced) == ["b"]
    assert list(worker._outbox._peers) == ["b"]


def test_of_a_route_the_last_news_are_kept_and_that_it_was_opened_again_is_none():
    worker, found = still_link(), []
    worker.routes.introduce("a")
    reports = [
        RouteReport("a", "grpc"),
        RouteReport("a", "shm", gb_per_s=2.0),
        RouteReport("a", "shm"),
        RouteReport("a", error="refused"),
        RouteReport("a", "shm"),
        RouteReport("a", "shm", gb_per_s=3.0),
    ]
    for report in reports:
        worker.routes.note((report,))
        found.append(reports.index(worker.routes.reports["a"]))
    assert found == [0, 1, 1, 3, 3, 5]


def test_a_measurement_that_is_over_keeps_nothing():
    async def main():
        worker = WorkerSession(WORKER, None, "router", LoopClock(), iter(range(9)), lambda _: None)
        asking = asyncio.ensure_future(worker.routes.measure("a", 1))
        await asyncio.sleep(0)
        measured = list(worker.routes._measured)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return measured, worker.routes._measured

    assert run_virtual(main()) == (["a"], {})


def test_every_route_between_live_workers_is_measured_once_and_a_silent_one_is_named():
    async def main():
        sessions, asked = WorkerSessions(StaticMembership(), None, "router", LoopClock()), []

        async def measure(to, address, probe_bytes):
            asked.append((address, to, probe_bytes))
            if (address, to) == ("p2", "d1"):
                raise TimeoutError
            return RouteReport(address, "shm", gb_per_s=2.0)

        for number, name in enumerate(("p1", "p2", "d1", "d2", "d3", "p3")):
            role = Role.PREFILL if name.startswith("p") else Role.DECODE
            descriptor = replace(
                WORKER, worker_id=name, role=role, incarnation=number, transfer_address=name
            )
            session = WorkerSession(
                descriptor, None, "router", LoopClock(), iter(range(9)), lambda _: None
            )
            session._state = SessionState.LOST if name in ("d3", "p3") else SessionState.LIVE
            session.routes.measure = partial(measure, name)
            sessions._sessions[session.key] = session
        found = await sessions.measure(1 << 20)
        return asked, [(s.worker_id, r.worker_id, route.error) for s, r, route in found]

    pairs = [("p1", "d1"), ("p2", "d1"), ("p1", "d2"), ("p2", "d2")]
    asked, found = run_virtual(main())
    assert asked == [(*pair, 1 << 20) for pair in pairs]
    silent = "no answer within 15 s"
    assert found == [(*pair, silent if pair == ("p2", "d1") else "") for pair in pairs]


# --- times that are promised ----------------------------------------------------------------------


def lost_after_s(*scripts, cut_at_s=0.0):
    """How long after a cut (or the first dial) a worker is given up."""

    async def main():
        worker = WorkerSession(
            WORKER, Wire(*scripts), "router", LoopClock(), iter(range(99)), lambda _: None
        )
        running = asyncio.ensure_future(worker.run())
        await asyncio.sleep(cut_at_s)
        if cut_at_s:
            scripts[0].fails = StreamClosed("cut")
            scripts[0].inbox.put_nowait(SimpleNamespace(number=1, message=Progress(0, 0, False)))
        await running
        return asyncio.get_running_loop().time() - cut_at_s

    return run_virtual(main())


def test_a_worker_that_does_not_answer_is_given_up_two_seconds_after_the_first_dial():
    assert lost_after_s(*[Script() for _ in range(9)]) == pytest.approx(2.0)


def test_a_worker_is_dialled_ten_times_a_second_for_two_seconds_after_a_cut():
    out_of_reach = [TimeoutError() for _ in range(99)]
    scripts = [Script(Welcome(WORKER)), *out_of_reach]
    assert lost_after_s(*scripts, cut_at_s=1.0) == pytest.approx(1.9, abs=0.11)


def test_a_silent_worker_is_given_up_at_the_first_look_after_three_seconds():
    silent = Script(Welcome(WORKER))
    assert lost_after_s(silent, StreamClosed(""), StreamClosed("")) == pytest.approx(3.5)


def test_a_lost_member_is_dialled_again_each_second():
    async def main():
        dialled = []

        class Refusing:
            async def dial(self, address):
                dialled.append(asyncio.get_running_loop().time())
                raise StreamClosed("refused")

        members = StaticMembership()
        members.join(WORKER)
        sessions = WorkerSessions(members, Refusing(), "router", LoopClock())
        sessions.follow()
        await asyncio.sleep(3.5)
        await sessions.close()
        return dialled

    pairs = [0.0, 0.1, 1.1, 1.2, 2.2, 2.3, 3.3, 3.4]
    assert run_virtual(main()) == pytest.approx(pairs)


def test_a_router_with_nothing_to_say_says_so_twice_a_second():
    async def main():
        stream = Script(Welcome(WORKER))
        worker = WorkerSession(
            WORKER, Wire(stream), "router", LoopClock(), iter(range(9)), lambda _: None
        )
        running = asyncio.ensure_future(worker.run())
        await asyncio.sleep(2.2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return [type(message) for message in stream.sent]

    assert run_virtual(main()) == [Hello, *[RouterHeartbeat] * 4]
