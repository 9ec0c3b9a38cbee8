"""What a trace holds of a request: its spans, by whom, when, and whose child each is."""

import asyncio
import json
from dataclasses import replace

import pytest
from support.virtual import PROMPT, ask, attempt_of, run, unit

from core.config import PlacementConfig, RouterConfig, TierConfig, default_tiers
from core.session import Role
from core.trace import TraceContext
from core.types import SamplingParams
from engine.scheduling.sequence import Status

CALLER = TraceContext(0xABC, 0xDEF)


class Recorder:
    """Keeps every span that was closed: name, parent, its own context, instants, the rest."""

    def __init__(self):
        self.spans, self.num_open = [], 0

    def open(self, name, parent, start_s):
        self.num_open += 1
        context = TraceContext(parent.trace_id, self.num_open)
        return Open(self, context, {"name": name, "parent": parent, "start_s": start_s})

    def close(self):
        pass

    def one(self, name):
        [span] = [span for span in self.spans if span["name"] == name]
        return span

    def named(self, name):
        return [span for span in self.spans if span["name"] == name]

    def under(self, name):
        """Children of a span, in order: name, start, end."""
        parent = self.one(name)["context"]
        children = [s for s in self.spans if s["parent"] == parent]
        return [(s["name"], s["start_s"], s["end_s"]) for s in children]


class Open:
    def __init__(self, recorder, context, span):
        self.context, self._recorder, self._span = context, recorder, span
        self.is_recorded = True
        self._span["events"] = []

    def event(self, name, at_s, attributes):
        self._span["events"].append((name, at_s, attributes))

    def end(self, end_s, attributes, error=""):
        closed = {"context": self.context, "end_s": end_s, **attributes, "error": error}
        self._recorder.spans.append({**self._span, **closed})


def traced(path, trace=CALLER, records_routers=True):
    """Ask once, workers recording; returns the recorder and the request's end."""
    recorder = Recorder()

    async def scenario(cluster):
        await asyncio.sleep(1.0)
        if records_routers:
            cluster.orchestrator.tracing = recorder
        for one in cluster.units.values():
            one.attempts.tracing = recorder
        sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        request = cluster.request("r", PROMPT, sampling)
        events = await cluster.generate(replace(request, trace=trace, received_at=0.75))
        return events[-1]

    return recorder, run(scenario, placement=PlacementConfig(path=path))


def test_a_trace_has_every_attempt_with_its_epoch_reason_and_end():
    recorder = Recorder()

    async def scenario(cluster):
        cluster.orchestrator.tracing = recorder
        sampling = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        request = replace(cluster.request("r", PROMPT, sampling), trace=CALLER)
        running = asyncio.ensure_future(cluster.generate(request))
        await asyncio.sleep(0.2)
        victim = next(
            name
            for name, unit in cluster.units.items()
            if unit.descriptor.role is Role.DECODE and unit.attempts.by_run
        )
        await cluster.kill(victim)
        await running
        return victim

    victim = run(scenario, prefill=2, decode=2, placement=PlacementConfig(path="pd"))
    gateway = recorder.one("gateway.request")
    first, second = (facts for name, _, facts in gateway["events"] if name == "baton.attempt")
    assert (first["baton.epoch"], second["baton.epoch"]) == (0, 1)
    assert (first["baton.outcome"], second["baton.outcome"]) == ("worker_lost", "ok")
    assert victim in first["baton.workers"] and victim not in second["baton.workers"]
    assert first["baton.placement.reason"] == second["baton.placement.reason"] != ""
    assert second["baton.placement.reason"] == gateway["baton.placement.reason"]
    starts = [at_s for _, at_s, _ in gateway["events"]]
    assert gateway["start_s"] < starts[0] < starts[1] <= gateway["end_s"]
    assert gateway["baton.outcome"] == "finished" and gateway["baton.path"] == "pd"
    assert gateway["gen_ai.response.finish_reasons"] == ("length",)


def test_a_trace_has_the_predicted_wait_beside_its_limit_and_the_wait_there_was():
    """One runs for each router here, and the second waits for it."""
    recorder = Recorder()

    async def scenario(cluster):
        cluster.orchestrator.tracing = recorder
        sampling = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        requests = [cluster.request(name, PROMPT, sampling) for name in "ab"]
        traced = [replace(one, trace=CALLER, tier="interactive") for one in requests]
        await asyncio.gather(*map(cluster.generate, traced))

    tiers = {**default_tiers(), "interactive": TierConfig(max_ttft_s=60.0)}
    run(scenario, router=RouterConfig(max_running=1), tiers=tiers)
    first, second = recorder.named("gateway.request")
    assert "baton.admission.predicted_turn_ms" not in first, "nothing ran: it is not predicted"
    assert first["baton.admission.wait_ms"] == 0
    assert second["baton.admission.wait_ms"] == pytest.approx((first["end_s"]) * 1000, abs=1)
    assert second["baton.admission.predicted_turn_ms"] >= 0
    assert second["baton.admission.predicted_permit_ms"] >= 0
    assert second["baton.admission.max_ttft_ms"] == 60_000


WORKERS = {
    "pd": {
        "worker.prefill": ["prefill.queue", "prefill.compute", "kv.send"],
        "worker.decode": ["kv.wait", "kv.receive", "decode.generate"],
    },
    "local": {"worker.local": ["prefill.queue", "prefill.compute", "decode.generate"]},
}


@pytest.mark.parametrize("path", ["pd", "local"])
def test_a_requests_span_is_the_callers_child_and_the_workers_are_its_own(path):
    recorder, ended = traced(path)
    gateway = recorder.one("gateway.request")
    assert gateway["parent"] == CALLER and gateway["start_s"] == 0.75
    assert gateway["end_s"] - gateway["start_s"] == pytest.approx(ended.timing.e2e_s)
    names = [name for name, _, _ in recorder.under("gateway.request")]
    assert sorted(names) == sorted(WORKERS[path])
    for worker, parts in WORKERS[path].items():
        span, children = recorder.one(worker), recorder.under(worker)
        assert [name for name, _, _ in children] == parts
        starts = [start_s for _, start_s, _ in children]
        ends = [end_s for _, _, end_s in children]
        assert [span["start_s"], *ends] == [*starts, span["end_s"]], "parts follow one another"
        assert 1.0 < span["start_s"] < span["end_s"] < gateway["end_s"]
    assert {span["error"] for span in recorder.spans} == {""}
    assert recorder.num_open == len(recorder.spans)


@pytest.mark.parametrize("path", ["pd", "local"])
def test_a_requests_span_says_what_it_cost(path):
    recorder, ended = traced(path)
    gateway = recorder.one("gateway.request")
    worker = "worker.prefill" if path == "pd" else "worker.local"
    _, start_s, end_s = recorder.under(worker)[1]
    assert gateway["baton.phase.prefill_ms"] == pytest.approx((end_s - start_s) * 1000)
    assert gateway["baton.phase.tokenize_ms"] == pytest.approx(250)
    phases = [ms for name, ms in gateway.items() if name.startswith("baton.phase.")]
    assert sum(phases) == pytest.approx(ended.timing.e2e_s * 1000)
    assert gateway["gen_ai.usage.output_tokens"] == 12
    assert gateway["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert gateway["baton.attempts"] == f"0:{path}:ok"
    why = json.loads(gateway["baton.why"])
    measured = why["measured"]
    assert measured["prefill_ms"] == pytest.approx((end_s - start_s) * 1000)
    assert gateway["baton.placement.error_ms"] == pytest.approx(
        measured["total_ms"] - measured["predicted_ms"], abs=0.002
    )
    assert "baton.placement.regret_ms" not in gateway, "a path is forced, and one worker has it"
    assert why == ended.timing.why and why["decision"]["path"] == path
    assert why["decision"]["decode_worker"] == ended.timing.decode_worker
    if path == "pd":
        decode = recorder.one("worker.decode")
        assert decode["baton.kv_blocks"] == 15 and decode["baton.kv_transport"] == "sim"
        assert gateway["baton.kv_bytes"] == decode["baton.kv_bytes"] == 15 * 4 * 16 * 3


@pytest.mark.parametrize("trace", [CALLER, None])
def test_a_router_that_records_nothing_hands_the_callers_trace_to_workers(trace):
    recorder, ended = traced("pd", trace=trace, records_routers=False)
    assert ended.error is None
    spans = [s for s in recorder.spans if s["name"].startswith("worker.")]
    assert [span["parent"] for span in spans] == ([CALLER] * 2 if trace else [])
    assert trace is not None or recorder.num_open == 0


def test_a_request_that_is_admitted_at_time_0_has_not_queued():
    """Virtual time begins there."""

    async def scenario(cluster):
        assert cluster.clock.now_s() == 0.0
        _, ended = await ask(cluster)
        return ended.timing

    timing = run(scenario)
    assert timing.queue_s == 0.0 < timing.prefill_s


@pytest.mark.parametrize("path", ["pd", "local"])
def test_an_attempt_that_its_router_cancels_has_its_spans(path):
    """A client left, a stop string came, or the answer was whole before prefill's end."""
    recorder = Recorder()

    async def scenario(cluster):
        await asyncio.sleep(1.0)
        for one in cluster.units.values():
            one.attempts.tracing = recorder
        sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        request = replace(cluster.request("r", PROMPT, sampling), trace=CALLER)
        events = []

        def leave(event):
            events.append(event)
            if len(events) == 5:
                running.cancel()

        running = asyncio.get_running_loop().create_task(cluster.orchestrator.run(request, leave))
        await asyncio.gather(running, return_exceptions=True)
        await asyncio.sleep(1.0)
        return running.cancelled(), len(events)

    is_cancelled, num_events = run(scenario, placement=PlacementConfig(path=path))
    assert is_cancelled and num_events < 12
    for name, children in WORKERS[path].items():
        assert [child for child, *_ in recorder.under(name)] == children
    last = recorder.one("worker.local" if path == "local" else "worker.decode")
    assert last["baton.cancelled"] and last["error"] == ""
    assert last["baton.preemptions"] == last["baton.parkings"] == 0


def test_a_workers_span_tells_how_often_it_lost_its_blocks_or_waited_for_its_client():
    recorder = Recorder()

    async def scenario(cluster):
        await asyncio.sleep(1.0)
        worker = unit(cluster, Role.DECODE)
        worker.attempts.tracing = recorder
        sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        request = replace(cluster.request("r", PROMPT, sampling), trace=CALLER)
        running = asyncio.ensure_future(cluster.generate(request))
        async with asyncio.timeout(5):
            while (found := attempt_of(worker, "r")) is None or not found.sequences:
                await asyncio.sleep(0.01)
            while found.sequences[0].status is not Status.RUNNING:
                await asyncio.sleep(0.01)
        [sequence] = found.sequences
        sequence.credit = 0
        worker.attempts.scheduler.credit(sequence, 256)
        worker.attempts.scheduler.preempt(sequence)
        await running

    run(scenario, placement=PlacementConfig(path="local"))
    span = recorder.one("worker.local")
    assert (span["baton.preemptions"], span["baton.parkings"]) == (1, 1)
    assert span["baton.tier"] == "standard" and span["baton.epoch"] == 0
