"""Session values to protobuf and back.

Owns the translation; proto types stop here. Does not know streams. Deadlines are instants on this
side and seconds left on the wire. What a router says has a shape here, and nothing more: whether it
can be is `worker.checking`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from core.errors import from_wire, to_wire
from core.ids import Epoch, Incarnation, RequestId, RouterId, RunId, TransferId, WorkerId
from core.session import (
    MAX_ID_CHARACTERS,
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
    ToRouter,
    ToWorker,
    Wanted,
    Welcome,
    WorkerDescriptor,
    WorkerTiming,
)
from core.trace import parse_trace
from core.types import FinishReason, GenerateRequest, Logprob
from protos.baton.internal.v1 import session_pb2 as pb
from transport.sampling_codec import sampling_from_wire, sampling_to_wire

MAX_ERROR_CHARACTERS = 1000


def to_worker_wire(number: int, message: ToWorker) -> pb.ToWorker:
    """Encode a router's message and its number in the stream."""
    match message:
        case Hello(router_id, wanted, stream_number):
            hello = pb.Hello(
                router_id=router_id,
                wanted=[_wanted_to_wire(w) for w in wanted],
                stream_number=stream_number,
            )
            return pb.ToWorker(number=number, hello=hello)
        case Submit():
            return pb.ToWorker(number=number, submit=_submit_to_wire(message))
        case Cancel(request_id, epoch):
            return pb.ToWorker(number=number, cancel=pb.Cancel(request_id=request_id, epoch=epoch))
        case Credit():
            return pb.ToWorker(number=number, credit=_credit_to_wire(message))
        case ConnectPeers(addresses, probe_bytes):
            return pb.ToWorker(
                number=number,
                connect_peers=pb.ConnectPeers(addresses=addresses, probe_bytes=probe_bytes),
            )
        case RouterHeartbeat():
            return pb.ToWorker(number=number, heartbeat=pb.RouterHeartbeat())


def from_worker_wire(wire: pb.ToWorker) -> ToWorker | None:
    """Decode a router's message; None for a kind of a newer version.

    Raises:
        ValueError: It names a task that there is not, or something by too long an id.
    """
    match wire.WhichOneof("message"):
        case "hello":
            hello = wire.hello
            wanted = tuple(_wanted_from_wire(w) for w in hello.wanted)
            return Hello(RouterId(_id(hello.router_id)), wanted, hello.stream_number)
        case "submit":
            return _submit_from_wire(wire.submit)
        case "cancel":
            return Cancel(_run_id(wire.cancel.request_id), Epoch(wire.cancel.epoch))
        case "credit":
            w = wire.credit
            return Credit(_run_id(w.request_id), Epoch(w.epoch), w.limit, tuple(w.finished_choices))
        case "connect_peers":
            return ConnectPeers(tuple(wire.connect_peers.addresses), wire.connect_peers.probe_bytes)
        case "heartbeat":
            return RouterHeartbeat()
        case _:
            return None


def _id(text: str) -> str:
    """A name that is kept, and told again: nobody may make it long."""
    if len(text) > MAX_ID_CHARACTERS:
        raise ValueError(f"an id has {len(text)} characters, the limit is {MAX_ID_CHARACTERS}")
    return text


def _run_id(text: str) -> RunId:
    return RunId(RequestId(_id(text)))


def _wanted_to_wire(w: Wanted) -> pb.Wanted:
    return pb.Wanted(
        request_id=w.request_id,
        epoch=w.epoch,
        next_positions=w.next_positions,
        credit=w.credit,
        num_scores=w.num_scores,
        finished_choices=w.finished_choices,
        is_coming=w.is_coming,
    )


def _wanted_from_wire(w: pb.Wanted) -> Wanted:
    return Wanted(
        _run_id(w.request_id),
        Epoch(w.epoch),
        tuple(w.next_positions),
        w.credit,
        w.num_scores,
        tuple(w.finished_choices),
        w.is_coming,
    )


def _credit_to_wire(m: Credit) -> pb.Credit:
    return pb.Credit(
        request_id=m.request_id, epoch=m.epoch, limit=m.limit, finished_choices=m.finished_choices
    )


def _submit_to_wire(m: Submit) -> pb.Submit:
    r = m.request
    return pb.Submit(
        request_id=r.request_id,
        epoch=m.epoch,
        task=m.task.value,
        model=r.model,
        prompt=r.token_ids,
        sampling=sampling_to_wire(r.sampling, r.seed),
        time_left_s=max(0.0, r.deadline_at - asyncio.get_running_loop().time()),
        eos_token_ids=r.eos_token_ids,
        tier=r.tier,
        scope=r.scope,
        emitted=[pb.TokenIds(ids=ids) for ids in m.emitted],
        finished_choices=m.finished_choices,
        credit=m.credit,
        transfer_id=m.transfer_id,
        peer_id=m.peer_id,
        peer_incarnation=m.peer_incarnation,
        peer_address=m.peer_address,
        run_alone=m.run_alone,
        traceparent=r.trace.traceparent if r.trace else "",
        tracestate=r.trace.state if r.trace else "",
        age_s=m.age_s,
    )


def _submit_from_wire(w: pb.Submit) -> Submit:
    request = GenerateRequest(
        request_id=_run_id(w.request_id),
        model=w.model,
        token_ids=tuple(w.prompt),
        sampling=sampling_from_wire(w.sampling),
        seed=w.sampling.seed,
        deadline_at=asyncio.get_running_loop().time() + w.time_left_s,
        eos_token_ids=tuple(w.eos_token_ids),
        tier=w.tier,
        scope=w.scope,
        trace=parse_trace(w.traceparent, w.tracestate),
    )
    return Submit(
        request=request,
        epoch=Epoch(w.epoch),
        task=Task(w.task),
        emitted=tuple(tuple(e.ids) for e in w.emitted),
        finished_choices=tuple(w.finished_choices),
        credit=w.credit,
        transfer_id=TransferId(w.transfer_id),
        peer_id=WorkerId(w.peer_id),
        peer_incarnation=Incarnation(w.peer_incarnation),
        peer_address=w.peer_address,
        run_alone=w.run_alone,
        age_s=w.age_s,
    )


def to_router_wire(number: int, message: ToRouter) -> pb.ToRouter:
    """Encode a worker's message and its number in the stream."""
    match message:
        case Welcome(descriptor):
            return pb.ToRouter(
                number=number, welcome=pb.Welcome(descriptor=_descriptor_to_wire(descriptor))
            )
        case StepFrame(step_id, deltas, ended):
            frame = pb.StepFrame(
                step_id=step_id,
                deltas=[_delta_to_wire(d) for d in deltas],
                ended=[_ended_to_wire(e) for e in ended],
            )
            return pb.ToRouter(number=number, frame=frame)
        case Progress(steps, layers_done, work_in_hand, load, rank_pids, is_ready, is_leaving):
            progress = pb.Progress(
                steps=steps,
                layers_done=layers_done,
                work_in_hand=work_in_hand,
                num_waiting=load.num_waiting,
                num_running=load.num_running,
                waiting_tokens=load.waiting_tokens,
                free_blocks=load.free_blocks,
                cached_blocks=load.cached_blocks,
                rank_pids=rank_pids,
                is_ready=is_ready,
                is_leaving=is_leaving,
            )
            return pb.ToRouter(number=number, progress=progress)
        case PeerReport(routes):
            rows = [
                pb.RouteReport(
                    address=w.address,
                    transport=w.transport,
                    round_trip_s=w.round_trip_s,
                    gb_per_s=w.gb_per_s,
                    error=w.error,
                )
                for w in routes
            ]
            return pb.ToRouter(number=number, peer_report=pb.PeerReport(routes=rows))


def from_router_wire(wire: pb.ToRouter) -> ToRouter | None:
    """Decode a worker's message; None for a kind of a newer version."""
    match wire.WhichOneof("message"):
        case "welcome":
            return Welcome(_descriptor_from_wire(wire.welcome.descriptor))
        case "frame":
            deltas = tuple(_delta_from_wire(d) for d in wire.frame.deltas)
            return StepFrame(
                wire.frame.step_id, deltas, tuple(_ended_from_wire(e) for e in wire.frame.ended)
            )
        case "progress":
            p = wire.progress
            load = Load(
                p.num_waiting, p.num_running, p.waiting_tokens, p.free_blocks, p.cached_blocks
            )
            return Progress(
                p.steps,
                p.layers_done,
                p.work_in_hand,
                load,
                tuple(p.rank_pids),
                p.is_ready,
                p.is_leaving,
            )
        case "peer_report":
            routes = wire.peer_report.routes
            return PeerReport(
                tuple(
                    RouteReport(w.address, w.transport, w.round_trip_s, w.gb_per_s, w.error)
                    for w in routes
                )
            )
        case _:
            return None


def _descriptor_to_wire(d: WorkerDescriptor) -> pb.WorkerDescriptor:
    return pb.WorkerDescriptor(
        worker_id=d.worker_id,
        role=d.role.value,
        incarnation=d.incarnation,
        session_address=d.session_address,
        transfer_address=d.transfer_address,
        model=d.model,
        content_digest=d.content_digest,
        block_size_tokens=d.block_size_tokens,
        num_blocks=d.num_blocks,
        max_model_len=d.max_model_len,
        tier=d.tier,
        node=d.node,
        pid=d.pid,
        rank_pids=d.rank_pids,
    )


def _descriptor_from_wire(w: pb.WorkerDescriptor) -> WorkerDescriptor:
    return WorkerDescriptor(
        worker_id=WorkerId(w.worker_id),
        role=Role(w.role),
        incarnation=Incarnation(w.incarnation),
        session_address=w.session_address,
        transfer_address=w.transfer_address,
        model=w.model,
        content_digest=w.content_digest,
        block_size_tokens=w.block_size_tokens,
        num_blocks=w.num_blocks,
        max_model_len=w.max_model_len,
        tier=w.tier,
        node=w.node,
        pid=w.pid,
        rank_pids=tuple(w.rank_pids),
    )


def _timings_to_wire(t: WorkerTiming | None) -> pb.WorkerTiming | None:
    if t is None:
        return None
    return pb.WorkerTiming(
        queue_s=t.queue_s,
        prefill_s=t.prefill_s,
        decode_s=t.decode_s,
        cached_tokens=t.cached_tokens,
        kv_bytes=t.kv_bytes,
        kv_blocks=t.kv_blocks,
        kv_transport=t.kv_transport,
        kv_fragments_resent=t.kv_fragments_resent,
    )


def _timings_from_wire(w: pb.WorkerTiming) -> WorkerTiming:
    return WorkerTiming(
        queue_s=w.queue_s,
        prefill_s=w.prefill_s,
        decode_s=w.decode_s,
        cached_tokens=w.cached_tokens,
        kv_bytes=w.kv_bytes,
        kv_blocks=w.kv_blocks,
        kv_transport=w.kv_transport,
        kv_fragments_resent=w.kv_fragments_resent,
    )


def _delta_to_wire(d: TokenDelta) -> pb.TokenDelta:
    logprobs = _logprobs_to_wire(d.logprobs)
    prompt_logprobs = _logprobs_to_wire(d.prompt_logprobs)
    return pb.TokenDelta(
        request_id=d.request_id,
        epoch=d.epoch,
        choice=d.choice,
        position=d.position,
        token_ids=d.token_ids,
        logprobs=logprobs,
        finish=d.finish.value if d.finish else "",
        stop_token_id=d.stop_token_id,
        timings=_timings_to_wire(d.timings),
        prompt_logprobs=prompt_logprobs,
        prompt_start=d.prompt_start,
    )


def _logprobs_to_wire(logprobs: tuple[Logprob, ...]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=t.token_id,
            logprob=t.logprob,
            top=[pb.TopLogprob(token_id=i, logprob=p) for i, p in t.top],
        )
        for t in logprobs
    ]


def _logprobs_from_wire(wire: Iterable[pb.TokenLogprob]) -> tuple[Logprob, ...]:
    return tuple(
        Logprob(t.token_id, t.logprob, tuple((top.token_id, top.logprob) for top in t.top))
        for t in wire
    )


def _delta_from_wire(w: pb.TokenDelta) -> TokenDelta:
    logprobs = _logprobs_from_wire(w.logprobs)
    return TokenDelta(
        request_id=RunId(RequestId(w.request_id)),
        epoch=Epoch(w.epoch),
        choice=w.choice,
        position=w.position,
        token_ids=tuple(w.token_ids),
        logprobs=logprobs,
        finish=FinishReason(w.finish) if w.finish else None,
        stop_token_id=w.stop_token_id if w.HasField("stop_token_id") else None,
        timings=_timings_from_wire(w.timings) if w.HasField("timings") else None,
        prompt_logprobs=_logprobs_from_wire(w.prompt_logprobs),
        prompt_start=w.prompt_start,
    )


def _ended_to_wire(e: AttemptEnded) -> pb.AttemptEnded:
    name, message = to_wire(e.error) if e.error else ("", "")
    return pb.AttemptEnded(
        request_id=e.request_id,
        epoch=e.epoch,
        task=e.task.value,
        timings=_timings_to_wire(e.timings),
        error=name,
        error_message=message[:MAX_ERROR_CHARACTERS],
    )


def _ended_from_wire(w: pb.AttemptEnded) -> AttemptEnded:
    error = from_wire(w.error, w.error_message) if w.error else None
    run_id = RunId(RequestId(w.request_id))
    timings = _timings_from_wire(w.timings)
    return AttemptEnded(run_id, Epoch(w.epoch), Task(w.task), timings, error)
