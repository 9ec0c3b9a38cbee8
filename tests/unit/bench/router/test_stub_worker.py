"""A stub worker answers like a worker: every position once, at its pace, within the credit."""

import asyncio
import contextlib

import pytest
from support.in_process_network import InProcessNetwork

from bench.router.stub_blocks import StubBlocks
from bench.router.stub_worker import StubFirstToken, StubPace, StubWorker
from core.block_hash import naming_of
from core.clocks import LoopClock
from core.ids import Epoch, Incarnation, RequestId, RouterId, RunId, WorkerId
from core.session import (
    Cancel,
    ConnectPeers,
    Credit,
    Hello,
    PeerReport,
    Progress,
    Role,
    StepFrame,
    Submit,
    Task,
    Wanted,
    Welcome,
    WorkerDescriptor,
)
from core.types import FinishReason, GenerateRequest, SamplingParams
from router.workers.liveness import HUNG_S, Liveness
from simulation.loop import run_virtual
from transport.sequenced import NumberedStream

PACE = StubPace(first_token_s=0.25, token_s=0.5)
OUTPUT = 6
DESCRIPTOR = WorkerDescriptor(
    WorkerId("stub"),
    Role.DECODE,
    Incarnation(1),
    session_address="",
    transfer_address="shm=stub",
    model="m",
    content_digest="digest",
    block_size_tokens=4,
    num_blocks=64,
    max_model_len=256,
)


class Router:
    """The other end of a stub's session: what came, and when."""

    def __init__(self, stream):
        self.stream = stream
        self.liveness = Liveness(DESCRIPTOR.worker_id, LoopClock())
        self.frames, self.others = [], []

    async def run(self):
        """Read, and watch the stub as a router watches a worker."""
        self.liveness.connected()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.liveness.watch())
            tasks.create_task(self._read())

    async def _read(self):
        loop = asyncio.get_running_loop()
        while True:
            message = await self.stream.recv()
            self.liveness.note_message()
            if isinstance(message, StepFrame):
                self.frames.append((loop.time(), message))
            elif isinstance(message, Progress):
                self.liveness.note_progress(message)
            else:
                self.others.append(message)

    def tokens(self, run_id="r"):
        """(when, position) of every token of a run."""
        return [
            (at, delta.position + number)
            for at, frame in self.frames
            for delta in frame.deltas
            if delta.run_id == run_id
            for number in range(len(delta.token_ids))
        ]

    def ends(self):
        return [(at, end.run_id, end.error) for at, frame in self.frames for end in frame.ended]


def run(scenario, wanted=(), pace=PACE):
    """Run `scenario(router, first_tokens)` on virtual time, in a session with a stub."""

    async def main():
        network = InProcessNetwork({})
        blocks = StubBlocks(64, 4, lambda scope: naming_of("digest", scope, 4))
        first_tokens = {}
        stub = StubWorker(DESCRIPTOR, network, pace, blocks, LoopClock(), first_tokens.setdefault)
        await stub.listen()
        stream = NumberedStream(await network.dial(stub.descriptor.session_address))
        await stream.send(Hello(RouterId("router"), wanted))
        router = Router(stream)
        running = asyncio.create_task(router.run())
        await scenario(router, first_tokens)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await stub.close()
        return router, first_tokens

    return run_virtual(main())


def submit(task, run_id="r", epoch=0, credit=100, emitted=()):
    sampling = SamplingParams(max_tokens=OUTPUT, temperature=0.0)
    prompt = tuple(range(9))
    request = GenerateRequest(RequestId(run_id), "m", prompt, sampling, seed=7, deadline_at=1e9)
    return Submit(request, Epoch(epoch), task, (tuple(emitted),), credit=credit)


def test_a_prefill_worker_sends_the_first_token_in_its_time_and_no_other():
    async def scenario(router, _):
        await asyncio.sleep(1.1)
        await router.stream.send(submit(Task.PREFILL))
        await asyncio.sleep(5)

    router, first_tokens = run(scenario)
    assert router.tokens() == [(pytest.approx(1.35), 0)]
    assert router.ends() == [(pytest.approx(1.35), "r", None)]
    assert first_tokens == {7: StubFirstToken(pytest.approx(1.1), pytest.approx(1.35))}


def test_a_decode_worker_sends_every_token_on_the_steps_that_all_its_sequences_share():
    async def scenario(router, _):
        await router.stream.send(submit(Task.DECODE, "a"))
        await asyncio.sleep(0.6)
        await router.stream.send(submit(Task.DECODE, "b"))
        await asyncio.sleep(6)

    router, first_tokens = run(scenario)
    for run_id, start in (("a", 1.0), ("b", 1.5)):
        due = [(pytest.approx(start + 0.5 * n), n) for n in range(OUTPUT)]
        assert router.tokens(run_id) == due, "first token, hand-over, then the next step"
    assert sorted(len(frame.deltas) for _, frame in router.frames) == [1, 1, 2, 2, 2, 2, 2]
    last = [d for _, f in router.frames for d in f.deltas if d.position == OUTPUT - 1]
    assert [delta.finish for delta in last] == [FinishReason.LENGTH] * 2
    assert [run_id for _, run_id, error in router.ends()] == ["a", "b"]
    assert first_tokens == {7: StubFirstToken(0.0, pytest.approx(1.0))}, "of the earlier one"


def test_a_local_task_does_both_and_reports_what_was_cached_once():
    async def scenario(router, _):
        for run_id in ("a", "b"):
            await router.stream.send(submit(Task.LOCAL, run_id))
            await asyncio.sleep(5)

    router, first_tokens = run(scenario)
    assert [position for _, position in router.tokens("a")] == list(range(OUTPUT))
    assert 7 in first_tokens
    timings = [d.timings for _, f in router.frames for d in f.deltas if d.timings is not None]
    assert [t.cached_tokens for t in timings] == [0, 8], "two blocks of four of nine tokens"


def test_an_attempt_that_continues_goes_on_behind_what_was_emitted():
    async def scenario(router, _):
        await router.stream.send(submit(Task.LOCAL, emitted=(97, 98)))
        await asyncio.sleep(5)

    assert [position for _, position in run(scenario)[0].tokens()] == [2, 3, 4, 5]


def test_it_stops_at_the_credit_and_goes_on_with_more():
    async def scenario(router, _):
        await router.stream.send(submit(Task.LOCAL, credit=2))
        await asyncio.sleep(5)
        assert [position for _, position in router.tokens()] == [0, 1]
        await router.stream.send(Credit(RunId("r"), Epoch(1), limit=6))
        await asyncio.sleep(5)
        assert len(router.tokens()) == 2, "of another attempt"
        await router.stream.send(Credit(RunId("r"), Epoch(0), limit=6))
        await asyncio.sleep(5)

    assert [position for _, position in run(scenario)[0].tokens()] == list(range(OUTPUT))


def test_a_cancelled_attempt_is_silent_and_a_newer_one_goes_on():
    async def scenario(router, _):
        await router.stream.send(submit(Task.LOCAL, "old"))
        await router.stream.send(submit(Task.LOCAL, "new", epoch=1))
        await router.stream.send(Cancel(RunId("old"), Epoch(0)))
        await router.stream.send(Cancel(RunId("new"), Epoch(0)))
        await asyncio.sleep(5)

    router, _ = run(scenario)
    assert router.tokens("old") == [] and len(router.tokens("new")) == OUTPUT


def test_a_slow_stub_is_not_taken_for_a_hung_worker():
    async def scenario(router, _):
        await router.stream.send(submit(Task.LOCAL))
        await asyncio.sleep(5 * HUNG_S)

    router, _ = run(scenario, pace=StubPace(first_token_s=2 * HUNG_S, token_s=2 * HUNG_S))
    assert [position for _, position in router.tokens()] == [0, 1]


def test_it_introduces_itself_and_reports_every_route():
    async def scenario(router, _):
        await router.stream.send(ConnectPeers(("shm=p0", "shm=p1")))
        await asyncio.sleep(1)

    welcome, report = run(scenario)[0].others
    assert isinstance(welcome, Welcome) and welcome.descriptor.worker_id == "stub"
    assert isinstance(report, PeerReport)
    assert [route.address for route in report.routes] == ["shm=p0", "shm=p1"]


def test_what_a_router_still_wants_after_a_reconnect_is_over_unless_it_is_on_its_way():
    async def scenario(router, _):
        await asyncio.sleep(1)

    coming = Wanted(RunId("coming"), Epoch(0), (0,), is_coming=True)
    router, _ = run(scenario, (Wanted(RunId("gone"), Epoch(3), (2,)), coming))
    ((_, run_id, error),) = router.ends()
    assert run_id == "gone" and error.is_retryable
