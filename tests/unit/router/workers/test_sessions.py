"""A link by itself, on streams made by hand: fences, accounts, introductions;
and a session's end of it."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.scripted_streams import WORKER, Listener, Script, Wire

from core.clocks import LoopClock
from core.errors import InternalError, WorkerDied, WorkerLost
from core.ports import StreamClosed
from core.session import (
    AttemptEnded,
    ConnectPeers,
    Hello,
    Load,
    PeerReport,
    Progress,
    Role,
    RouteReport,
    StepFrame,
    Task,
    TokenDelta,
    Welcome,
    WorkerTiming,
)
from router.workers import sessions as router_sessions
from router.workers.introductions import Introductions
from router.workers.session import MAX_REFUSED, SessionState, WorkerSession
from router.workers.sessions import WorkerSessions
from simulation.loop import run_virtual
from simulation.ports import StaticMembership
from transport.to_router_codec import from_router_wire, to_router_wire


def session(on_state_changed=lambda _: None, **changes):
    return WorkerSession(
        replace(WORKER, **changes),
        None,
        "router",
        SimpleNamespace(now_s=lambda: 0.0),
        iter(range(9)),
        on_state_changed,
    )


def delta(epoch=3, run_id="r"):
    return TokenDelta(run_id, epoch, 0, 0, (7,))


def ended(epoch=3, run_id="r"):
    return AttemptEnded(run_id, epoch, Task.LOCAL, WorkerTiming())


def test_news_of_other_epochs_and_of_nobody_are_dropped():
    worker, listener = session(), Listener()
    worker.subscribe("r", listener, 3)
    old = StepFrame(1, (delta(2), delta(4), delta(3, "x")), (ended(2), ended(4)))
    worker.subscriptions.deliver(old)
    assert listener.heard == [] and worker.subscriptions.num_stale == 5
    worker.subscriptions.deliver(StepFrame(2, (delta(),), (ended(),)))
    assert listener.heard == [delta(), ended()]


def test_a_listener_that_fails_ends_alone_and_the_rest_of_the_frame_is_told(caplog):
    worker, bad, good = session(), Listener(RuntimeError("bug")), Listener()
    worker.subscribe("bad", bad, 3)
    worker.subscribe("r", good, 3)
    frame = StepFrame(1, (delta(3, "bad"), delta()), (ended(3, "bad"), ended()))
    worker.subscriptions.deliver(frame)
    assert good.heard == [delta(), ended()] and good.failed == []
    assert [type(e) for e in bad.failed] == [InternalError] * 2
    worker.subscribe("bad", bad, 3)
    worker.subscriptions.lose(WorkerLost("gone"))
    assert isinstance(good.heard[-1], WorkerLost) and len(bad.failed) == 3
    assert len(caplog.records) == 3 and all(r.exc_info for r in caplog.records)


@pytest.mark.parametrize("word", [StepFrame(1, (delta(),)), StepFrame(1, (), (ended(),))])
def test_a_prompt_is_load_until_the_workers_first_word_and_the_request_until_it_is_forgotten(word):
    worker = session()
    worker.subscribe("r", Listener(), 500)
    worker.subscribe("other", Listener(), 20)
    assert (worker.candidate.pending_tokens, worker.candidate.pending_requests) == (520, 2)
    worker.subscriptions.deliver(StepFrame(1, (delta(2),)))
    assert worker.candidate.pending_tokens == 520, "a word of another attempt"
    worker.subscriptions.deliver(word)
    assert (worker.candidate.pending_tokens, worker.candidate.pending_requests) == (20, 2)
    worker.forget("r", 3)
    worker.forget("other", 3)
    assert (worker.candidate.pending_tokens, worker.candidate.pending_requests) == (0, 0)


def test_what_placement_reads_of_a_worker_never_changes_untold():
    told = []
    worker = session(lambda session: told.append((session.state.name, session.is_ready)))
    worker._note_progress(Progress(0, 0, False, Load(), (), True))
    assert told == [], "nothing changed"
    worker._note_progress(Progress(0, 0, False, Load(), (), False))
    assert not worker.is_usable and worker.is_back_soon
    worker._note_progress(Progress(0, 0, False, Load(3), (), True))
    assert worker.is_usable and worker.candidate.load == Load(3)
    worker._set_state(state=SessionState.LOST)
    assert told == [("DIALLING", False), ("DIALLING", True), ("LOST", True)]
    with pytest.raises(AttributeError):
        worker.is_ready = True


def test_a_worker_that_drains_leaves_in_order_once_no_request_is_left_on_it():
    worker = session()
    leaving = Progress(0, 0, False, is_ready=False, is_leaving=True)
    worker._note_progress(from_router_wire(to_router_wire(1, leaving)))
    worker.subscribe("r", Listener(), 3)
    assert not worker._leaves_in_order
    worker.forget("r", 3)
    assert worker._leaves_in_order
    worker._note_progress(replace(leaving, is_leaving=False))
    assert not worker._leaves_in_order, "it restarts its ranks, or has failed"


def test_each_pair_is_introduced_once_and_what_is_gone_is_forgotten():
    pairs = Introductions()
    p1, p2 = (session(worker_id=p, role=Role.PREFILL, transfer_address=p) for p in ("p1", "p2"))
    d1, d2 = (session(worker_id=d) for d in ("d1", "d2"))

    def met(receiver):
        outbox = receiver._outbox
        new, outbox._peers = list(outbox._peers), {}
        return new

    for one in (p1, d1, p2, d2):
        pairs.joined(one.descriptor, one.routes)
    assert (met(d1), met(d2)) == (["p1", "p2"], ["p1", "p2"])
    for one in (p1, d1, p2, d2):
        pairs.joined(one.descriptor, one.routes)
    assert (met(d1), met(d2)) == ([], []), "after a reconnect they know one another"
    pairs.left(p1.descriptor)
    assert list(d1.routes._introduced) == ["p2"]
    pairs.joined(p1.descriptor, p1.routes)
    assert (met(d1), met(d2)) == (["p1"], ["p1"]), "one that comes back is a newcomer"
    pairs.left(d1.descriptor)
    again = session(worker_id="d1")
    pairs.joined(again.descriptor, again.routes)
    assert met(again) == ["p2", "p1"] and met(d2) == []


def test_a_greeting_that_is_not_answered_in_time_leaves_no_stream_behind():
    async def main():
        silent = Script()
        worker = WorkerSession(
            WORKER, Wire(silent), "router", LoopClock(), iter(range(9)), lambda _: None
        )
        with pytest.raises(TimeoutError):
            await worker._connect()
        return silent

    silent = run_virtual(main())
    assert [type(m) for m in silent.sent] == [Hello] and silent.is_reset


def test_who_cannot_say_what_it_wants_ends_alone_and_the_others_are_asked_for(caplog):
    worker, bad, good = session(), Listener(), Listener()
    bad.wanted = lambda: {}["a bug"]
    worker.subscribe("bad", bad, 3)
    worker.subscribe("r", good, 3)
    assert [w.run_id for w in worker.subscriptions.wanted(())] == ["r"]
    assert [type(e) for e in bad.failed] == [InternalError] and good.failed == []


@pytest.mark.parametrize("was_live", [False, True])
def test_only_a_worker_that_was_reached_can_have_died(was_live):
    """A request that was placed on a worker which never answered is under no suspicion."""

    async def main():
        refusals = [StreamClosed("refused") for _ in range(4)]
        first = [Script(Welcome(WORKER), fails=StreamClosed("cut"))] if was_live else []
        worker = WorkerSession(
            WORKER, Wire(*first, *refusals), "router", LoopClock(), iter(range(9)), lambda _: None
        )
        listener = Listener()
        worker.subscribe("r", listener, 3)
        await worker.run()
        return listener.heard

    [error] = run_virtual(main())
    assert type(error) is (WorkerDied if was_live else WorkerLost)


def test_a_pair_that_does_not_fit_is_forgotten_with_either_of_them():
    async def main():
        prefill = replace(WORKER, worker_id="p", role=Role.PREFILL, incarnation=2)
        other = replace(WORKER, worker_id="o", incarnation=3)
        members = StaticMembership()
        for member in (WORKER, prefill, other):
            members.join(member)
        streams = (Script(Welcome(m), fails=StreamClosed("cut")) for m in (WORKER, prefill, other))
        sessions = WorkerSessions(
            members, Wire(*streams, *[StreamClosed("refused")] * 99), "router", LoopClock()
        )
        sessions.follow()
        sessions.note_incompatible(prefill, WORKER)
        sessions.note_incompatible(prefill, other)
        before = sessions.incompatible_pairs
        members.leave("w")
        await asyncio.sleep(9.0)
        left = sessions.incompatible_pairs
        await sessions.close()
        return before, left

    assert run_virtual(main()) == ({(2, 1), (2, 3)}, {(2, 3)})


def test_a_links_own_fault_is_told_to_who_listens_and_the_worker_is_dialled_again(caplog):
    async def main():
        broken = Script(Welcome(WORKER), fails=KeyError("a bug in the codec"))
        good = Script(Welcome(WORKER))
        members = StaticMembership()
        members.join(WORKER)
        sessions = WorkerSessions(members, Wire(broken, good), "router", LoopClock())
        sessions.follow()
        listener = Listener()
        sessions.get(WORKER).subscribe("r", listener, 3)
        await asyncio.sleep(0.5)
        lost = sessions.has_lost(), sessions.candidates(), sessions.all()[0].state.name
        await asyncio.sleep(1.0)
        back = [c.descriptor for c in sessions.candidates()], sessions.all()[0].state.name
        numbers = [stream.sent[0].stream_number for stream in (broken, good)]
        await sessions.close()
        return listener.heard, lost, back, numbers, sessions.all()

    heard, lost, back, numbers, left = run_virtual(main())
    assert [type(e) for e in heard] == [WorkerLost]
    assert lost == (True, [], "LOST") and back == ([WORKER], "LIVE")
    assert numbers == [0, 1] and left == []
    assert [r.getMessage() for r in caplog.records] == ["the session with worker w failed"]


def test_an_introduction_that_was_lost_with_its_stream_is_made_again():
    async def main():
        first = Script(Welcome(WORKER), PeerReport((RouteReport("a", "shm"),)))
        second = Script(Welcome(WORKER))
        worker = WorkerSession(
            WORKER, Wire(first, second), "router", LoopClock(), iter(range(9)), lambda _: None
        )
        running = asyncio.ensure_future(worker.run())
        await asyncio.sleep(0)
        worker.routes.introduce("a")
        worker.routes.introduce("b")
        await asyncio.sleep(0.1)
        first.fails = StreamClosed("cut")
        first.inbox.put_nowait(SimpleNamespace(number=2, message=None))
        await asyncio.sleep(0.2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return [[m for m in s.sent if isinstance(m, ConnectPeers)] for s in (first, second)]

    assert run_virtual(main()) == [[ConnectPeers(("a", "b"))], [ConnectPeers(("b",))]]


@pytest.mark.parametrize(("num_refused", "num_introductions"), [(0, 1), (MAX_REFUSED, 2)])
def test_a_worker_is_introduced_again_after_it_was_lost_not_after_a_cut(
    num_refused, num_introductions
):
    async def main():
        prefill = replace(WORKER, worker_id="p", role=Role.PREFILL, incarnation=2)
        prefill = replace(prefill, transfer_address="p")
        decode_stream = Script(Welcome(WORKER))
        cut = Script(Welcome(prefill), fails=StreamClosed("cut"))
        members = StaticMembership()
        members.join(WORKER)
        members.join(prefill)
        refused = [StreamClosed("refused")] * num_refused
        wire = Wire(decode_stream, cut, *refused, Script(Welcome(prefill)))
        sessions = WorkerSessions(members, wire, "router", LoopClock())
        sessions.follow()
        await asyncio.sleep(2.0)
        states = [session.state.name for session in sessions.all()]
        await sessions.close()
        return states, [m for m in decode_stream.sent if isinstance(m, ConnectPeers)]

    assert run_virtual(main()) == (["LIVE", "LIVE"], [ConnectPeers(("p",))] * num_introductions)


def test_so_many_pairs_that_do_not_fit_are_remembered(monkeypatch):
    monkeypatch.setattr(router_sessions, "MAX_INCOMPATIBLE_PAIRS", 2)

    async def main():
        sessions = WorkerSessions(StaticMembership(), None, "router", LoopClock())
        for incarnation in (2, 3, 4):
            sessions.note_incompatible(replace(WORKER, incarnation=incarnation), WORKER)
        return sessions.incompatible_pairs

    assert run_virtual(main()) == {(2, 1), (3, 1)}


def test_a_worker_that_left_since_it_was_placed_is_lost():
    async def main():
        sessions = WorkerSessions(StaticMembership(), None, "router", LoopClock())
        with pytest.raises(WorkerLost, match="w is gone"):
            sessions.get(WORKER)

    run_virtual(main())
