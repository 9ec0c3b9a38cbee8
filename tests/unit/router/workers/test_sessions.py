"""A link by itself, on streams made by hand: fences, accounts, introductions;
and a session's end of it."""

import asyncio
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.scripts import WORKER, Listener, Script, Wire

from core.config import PlacementConfig, RouterConfig
from core.errors import InternalError, WorkerDied, WorkerLost
from core.ports import LoopClock, StreamClosed
from core.session import (
    AttemptEnded,
    Cancel,
    ConnectPeers,
    Credit,
    Hello,
    Load,
    PeerReport,
    Progress,
    Role,
    RouteReport,
    RouterHeartbeat,
    StepFrame,
    Submit,
    Task,
    TokenDelta,
    Wanted,
    Welcome,
    WorkerTiming,
)
from core.types import GenerateRequest, SamplingParams
from protos.baton.internal.v1 import session_pb2 as pb
from router.attempts import Attempts
from router.prompt_prefixes import PromptPrefixes
from router.request_state import RequestObserver
from router.retry_budget import RetryBudget
from router.workers.introductions import Introductions
from router.workers.session import SessionState, WorkerSession
from router.workers.sessions import WorkerSessions
from simulation.loop import run_virtual
from simulation.ports import StaticMembership
from transport.to_router_codec import from_router_wire, to_router_wire
from transport.to_worker_codec import from_worker_wire, to_worker_wire
from worker.attempt import Attempt
from worker.router_session import RouterSessions
from worker.session_server import SessionServer

REQUEST = GenerateRequest("r", "m", (1, 2, 3), SamplingParams(), 1, 0.0)


def session(on_state_changed=lambda _: None, **changes):
    return WorkerSession(
        replace(WORKER, **changes),
        None,
        "router",
        SimpleNamespace(now_s=lambda: 0.0),
        iter(range(9)),
        on_state_changed,
    )


def delta(epoch=3, request_id="r"):
    return TokenDelta(request_id, epoch, 0, 0, (7,))


def ended(epoch=3, request_id="r"):
    return AttemptEnded(request_id, epoch, Task.LOCAL, WorkerTiming())


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
    assert [w.request_id for w in worker.subscriptions.wanted(())] == ["r"]
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


# --- the worker's end -----------------------------------------------------------------------------


class Host:
    """A worker that keeps its orders and fails at some."""

    def __init__(self, *bad):
        self.orders, self.bad, self.failed = [], bad, []

    def _order(self, name, *details):
        self.orders.append((name, *details))
        if name in self.bad:
            raise RuntimeError(name)

    def submit(self, router_id, submit):
        self._order("submit", submit.request.request_id)

    def cancel(self, request_id, epoch):
        self._order("cancel", request_id, epoch)

    def credit(self, message):
        self._order("credit", message.request_id)

    def connect_peers(self, message):
        self._order("connect_peers", message.addresses)

    def router_alive(self, router_id):
        self._order("alive", router_id)

    def fail(self, request_id, epoch, error):
        self.failed.append((request_id, epoch, type(error)))

    def progress(self):
        self._order("progress")
        return Progress(0, 0, False)

    descriptor = WORKER


def server_of(host):
    """A server of sessions, and the sessions."""
    sessions = RouterSessions(host.fail)
    return SessionServer(None, sessions, host, host, LoopClock(), lambda: 1), sessions


def test_whatever_comes_from_a_router_renews_its_leases():
    async def main():
        host = Host()
        server, sessions = server_of(host)
        for message in (RouterHeartbeat(), ConnectPeers(("a",))):
            server._take(sessions.of("router"), message)
        return host.orders

    assert run_virtual(main()) == [
        ("alive", "router"),
        ("alive", "router"),
        ("connect_peers", ("a",)),
    ]


@pytest.mark.parametrize(
    "bad", ["submit", "cancel", "credit", "connect_peers", "alive", "progress"]
)
def test_an_order_that_fails_harms_its_attempt_and_not_the_session(bad, caplog):
    async def main():
        host = Host(bad)
        server, _ = server_of(host)
        submit = Submit(REQUEST, 3, Task.LOCAL, ((),))
        orders = (
            submit,
            Credit("r", 3, 9),
            Cancel("q", 1),
            ConnectPeers(("a",)),
            RouterHeartbeat(),
        )
        stream = Script(Hello("router"), *orders)
        serving = asyncio.ensure_future(server._serve(stream))
        await asyncio.sleep(1.2)
        is_open = not stream.is_reset
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return host, is_open, stream.sent

    host, is_open, sent = run_virtual(main())
    names = [name for name, *_ in host.orders]
    assert is_open and names.count("alive") == 5
    assert {"submit", "credit", "cancel", "connect_peers"} <= set(names), (
        "the others were carried out"
    )
    assert bad in names and caplog.records and isinstance(sent[0], Welcome)
    ends = [e for m in sent if isinstance(m, StepFrame) for e in m.ended]
    told = [(e.request_id, e.epoch, type(e.error)) for e in ends]
    assert told == ([("r", 3, InternalError)] if bad == "submit" else [])
    assert host.failed == ([("r", 3, InternalError)] if bad == "credit" else [])


@pytest.mark.parametrize("bad", ["credit", "cancel"])
def test_an_attempt_that_cannot_be_taken_up_after_a_reconnect_ends_and_the_others_go_on(bad):
    async def main():
        host = Host(bad)
        server, sessions = server_of(host)
        session = sessions.of("router")
        for name in ("r", "s"):
            submit = Submit(replace(REQUEST, request_id=name), 3, Task.LOCAL, ((),))
            session.attempts[name] = Attempt("router", submit)
        wanted = {"credit": "r", "cancel": "x"}[bad]
        hello = Hello("router", (Wanted(wanted, 3, (0,), 9), Wanted("gone", 1, (0,))))
        stream = Script(hello)
        serving = asyncio.ensure_future(server._serve(stream))
        await asyncio.sleep(0.1)
        is_open = not stream.is_reset
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return host, is_open, stream.sent

    host, is_open, sent = run_virtual(main())
    assert is_open and bad in [name for name, *_ in host.orders]
    broken = ["r"] if bad == "credit" else ["r", "s"]
    assert host.failed == [(name, 3, InternalError) for name in broken]
    ends = [(e.request_id, e.epoch) for m in sent if isinstance(m, StepFrame) for e in m.ended]
    assert ("gone", 1) in ends, "what is unknown is told all the same"


def test_a_greeting_that_comes_late_does_not_take_the_session_from_a_newer_stream():
    async def main():
        server, _ = server_of(Host())
        newer, late = Script(Hello("router", (), 8)), Script(Hello("router", (), 7))
        other = Script(Hello("another", (), 1))
        serving = []
        for stream in (newer, late, other):
            serving.append(asyncio.ensure_future(server._serve(stream)))
            await asyncio.sleep(0.1)
        found = [s.is_reset for s in (newer, late, other)], late.sent
        newest = Script(Hello("router", (), 9))
        serving.append(asyncio.ensure_future(server._serve(newest)))
        await asyncio.sleep(0.1)
        replaced = newer.is_reset, newest.is_reset
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        return found, replaced

    (resets, said), replaced = run_virtual(main())
    assert resets == [False, True, False] and said == []
    assert replaced == (True, False)


def test_a_greeting_that_cannot_be_read_ends_its_stream_alone_and_is_logged(caplog):
    async def main():
        server, _ = server_of(Host())
        broken = Script(fails=KeyError("a bug in the codec"))
        cut = Script(fails=StreamClosed("cut"))
        await server._serve(broken)
        await server._serve(cut)
        return broken.is_reset, cut.is_reset, broken.sent

    assert run_virtual(main()) == (True, True, [])
    assert [r.getMessage() for r in caplog.records] == ["the greeting of a router failed"]


async def test_what_a_router_says_crosses_the_wire_whole():
    request = replace(REQUEST, deadline_at=asyncio.get_running_loop().time() + 9.0)
    submit = Submit(request, 3, Task.LOCAL, ((),), age_s=2.5)
    wanted = (
        Wanted("r", 3, (4,), 256, num_scores=7, finished_choices=(0,), is_coming=True),
        Wanted("q", 1, (0, 2), 16),
    )
    hello = Hello("router", wanted, 77)
    for message in (submit, hello):
        wire = pb.ToWorker.FromString(to_worker_wire(5, message).SerializeToString())
        found = from_worker_wire(wire)
        if isinstance(found, Submit):
            assert found.request.deadline_at == pytest.approx(request.deadline_at, abs=5.0)
            found = replace(found, request=request)
        assert (wire.number, found) == (5, message)


# --- retries --------------------------------------------------------------------------------------


def test_routers_share_the_retries_and_each_has_one_at_least():
    for replicas, burst in ((1, 6), (2, 3), (6, 1), (9, 1)):
        config = RouterConfig(replicas=replicas, retry_burst=6, retry_per_s=18.0)
        prefixes = PromptPrefixes(None, b"", LoopClock())
        parts = (None, config, PlacementConfig(), LoopClock(), None, prefixes, RequestObserver())
        budget = Attempts(*parts)._budget
        delays = [budget.reserve(10.0, 99.0) for _ in range(burst + 1)]
        assert delays == [0.0] * burst + [pytest.approx(replicas / 18)]


def test_a_burst_is_as_many_retries_as_it_says():
    budget = RetryBudget(burst=3, per_s=2.0)
    delays = [budget.reserve(10.0, 9.0) for _ in range(5)]
    assert delays == [0.0, 0.0, 0.0, pytest.approx(0.5), pytest.approx(1.0)]
    assert budget.reserve(10.0, 1.4) is None, "the next would wait 1.5 s"
    assert budget.reserve(10.0, 1.6) == pytest.approx(1.5), "and the refusal took nothing"
    assert list(itertools.islice((budget.reserve(99.0, 9.0) for _ in range(3)), 3)) == [0.0] * 3
