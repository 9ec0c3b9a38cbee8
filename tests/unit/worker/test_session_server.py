"""A worker's end of a session: leases, orders that fail, greetings that come late."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.scripted_streams import WORKER, Script

from core.clocks import LoopClock
from core.errors import InternalError
from core.ports import StreamClosed
from core.session import (
    Cancel,
    ConnectPeers,
    Credit,
    Hello,
    Progress,
    RouterHeartbeat,
    StepFrame,
    Submit,
    Task,
    Wanted,
    Welcome,
)
from core.types import GenerateRequest, SamplingParams
from simulation.loop import run_virtual
from worker.attempt import Attempt
from worker.router_session import RouterSessions
from worker.session_server import HEARTBEAT_S, ROUTER_PATIENCE_S, SessionServer

REQUEST = GenerateRequest("r", "m", (1, 2, 3), SamplingParams(), 1, 0.0)


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

    def cancel(self, run_id, epoch):
        self._order("cancel", run_id, epoch)

    def credit(self, message):
        self._order("credit", message.run_id)

    def connect_peers(self, message):
        self._order("connect_peers", message.addresses)

    def router_alive(self, router_id):
        self._order("alive", router_id)

    def fail(self, run_id, epoch, error):
        self.failed.append((run_id, epoch, type(error)))

    def progress(self):
        self._order("progress")
        return Progress(0, 0, False)

    descriptor = WORKER


def server_of(host):
    """A server of sessions, and the sessions."""
    sessions = RouterSessions(host.fail)
    return SessionServer(None, sessions, host, host, LoopClock(), lambda: 1), sessions


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
    told = [(e.run_id, e.epoch, type(e.error)) for e in ends]
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
    ends = [(e.run_id, e.epoch) for m in sent if isinstance(m, StepFrame) for e in m.ended]
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
