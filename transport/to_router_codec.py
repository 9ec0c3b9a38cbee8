"""A worker's messages to protobuf and back: a pair of functions for each, in the order of a stream.

Owns the translation; proto types stop here. Does not know streams.

To add a field of `Load` or `WorkerTiming`: both are taken by their fields' names, `Load` into
`Progress`. A name that the message lacks is an error at the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from core.errors import from_wire, to_wire
from core.ids import Epoch, Incarnation, RequestId, RunId, WorkerId
from core.session import (
    AttemptEnded,
    FetchReport,
    Load,
    PeerReport,
    Progress,
    Role,
    RouteReport,
    StepFrame,
    StorageLoad,
    Task,
    TokenDelta,
    ToRouter,
    Welcome,
    WorkerDescriptor,
    WorkerTiming,
)
from core.types import FinishReason, Logprob
from protos.baton.internal.v1 import session_pb2 as pb

LOAD_FIELDS = tuple(one.name for one in fields(Load))
TIMING_FIELDS = tuple(one.name for one in fields(WorkerTiming) if one.name != "fetch")
MAX_ERROR_CHARACTERS = 1000
"""Of an error's message: an end must fit into any frame (`worker.attempt.ENDED_BYTES`)."""


def to_router_wire(number: int, message: ToRouter) -> pb.ToRouter:
    """Encode a worker's message and its number in the stream."""
    match message:
        case Welcome(descriptor):
            welcome = pb.Welcome(descriptor=_descriptor_to_wire(descriptor))
            return pb.ToRouter(number=number, welcome=welcome)
        case StepFrame():
            return pb.ToRouter(number=number, frame=_frame_to_wire(message))
        case Progress():
            return pb.ToRouter(number=number, progress=_progress_to_wire(message))
        case PeerReport():
            return pb.ToRouter(number=number, peer_report=_peer_report_to_wire(message))


def from_router_wire(wire: pb.ToRouter) -> ToRouter | None:
    """Decode a worker's message; None for a kind of a newer version."""
    match wire.WhichOneof("message"):
        case "welcome":
            return Welcome(_descriptor_from_wire(wire.welcome.descriptor))
        case "frame":
            return _frame_from_wire(wire.frame)
        case "progress":
            return _progress_from_wire(wire.progress)
        case "peer_report":
            return _peer_report_from_wire(wire.peer_report)
        case _:
            return None


# --- Welcome --------------------------------------------------------------------------------------


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
        exports_kv=d.exports_kv,
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
        exports_kv=w.exports_kv,
    )


# --- StepFrame: deltas and ends -------------------------------------------------------------------


def _frame_to_wire(m: StepFrame) -> pb.StepFrame:
    return pb.StepFrame(
        step_id=m.step_id,
        deltas=[_delta_to_wire(d) for d in m.deltas],
        ended=[_ended_to_wire(e) for e in m.ended],
    )


def _frame_from_wire(w: pb.StepFrame) -> StepFrame:
    return StepFrame(
        w.step_id,
        tuple(_delta_from_wire(d) for d in w.deltas),
        tuple(_ended_from_wire(e) for e in w.ended),
    )


def _delta_to_wire(d: TokenDelta) -> pb.TokenDelta:
    return pb.TokenDelta(
        request_id=d.run_id,
        epoch=d.epoch,
        choice=d.choice,
        position=d.position,
        token_ids=d.token_ids,
        logprobs=_logprobs_to_wire(d.logprobs),
        finish=d.finish.value if d.finish else "",
        stop_token_id=d.stop_token_id,
        timings=_timings_to_wire(d.timings),
        prompt_logprobs=_logprobs_to_wire(d.prompt_logprobs),
        prompt_start=d.prompt_start,
    )


def _delta_from_wire(w: pb.TokenDelta) -> TokenDelta:
    return TokenDelta(
        run_id=RunId(RequestId(w.request_id)),
        epoch=Epoch(w.epoch),
        choice=w.choice,
        position=w.position,
        token_ids=tuple(w.token_ids),
        logprobs=_logprobs_from_wire(w.logprobs),
        finish=FinishReason(w.finish) if w.finish else None,
        stop_token_id=w.stop_token_id if w.HasField("stop_token_id") else None,
        timings=_timings_from_wire(w.timings) if w.HasField("timings") else None,
        prompt_logprobs=_logprobs_from_wire(w.prompt_logprobs),
        prompt_start=w.prompt_start,
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


def _logprobs_from_wire(wire: Sequence[pb.TokenLogprob]) -> tuple[Logprob, ...]:
    # Every token passes here twice, and nearly none has any.
    if not wire:
        return ()
    return tuple(
        Logprob(t.token_id, t.logprob, tuple((top.token_id, top.logprob) for top in t.top))
        for t in wire
    )


def _ended_to_wire(e: AttemptEnded) -> pb.AttemptEnded:
    name, message = to_wire(e.error) if e.error else ("", "")
    return pb.AttemptEnded(
        request_id=e.run_id,
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


def _timings_to_wire(t: WorkerTiming | None) -> pb.WorkerTiming | None:
    if t is None:
        return None
    fetch = _fetch_to_wire(t.fetch) if t.fetch.outcome else None
    return pb.WorkerTiming(**{name: getattr(t, name) for name in TIMING_FIELDS}, fetch=fetch)


def _timings_from_wire(w: pb.WorkerTiming) -> WorkerTiming:
    fetch = FetchReport(w.fetch.outcome, w.fetch.num_tokens, w.fetch.took_s)
    return WorkerTiming(**{name: getattr(w, name) for name in TIMING_FIELDS}, fetch=fetch)


def _fetch_to_wire(f: FetchReport) -> pb.FetchReport:
    return pb.FetchReport(outcome=f.outcome, num_tokens=f.num_tokens, took_s=f.took_s)


# --- Progress -------------------------------------------------------------------------------------


def _progress_to_wire(m: Progress) -> pb.Progress:
    return pb.Progress(
        steps=m.steps,
        layers_done=m.layers_done,
        work_in_hand=m.work_in_hand,
        rank_pids=m.rank_pids,
        is_ready=m.is_ready,
        is_leaving=m.is_leaving,
        storage=[
            pb.StorageLoad(
                tier=one.tier, blocks=one.blocks, hit_blocks=one.hit_blocks, faults=one.faults
            )
            for one in m.storage
        ],
        **{name: getattr(m.load, name) for name in LOAD_FIELDS},
    )


def _progress_from_wire(w: pb.Progress) -> Progress:
    return Progress(
        steps=w.steps,
        layers_done=w.layers_done,
        work_in_hand=w.work_in_hand,
        load=Load(**{name: getattr(w, name) for name in LOAD_FIELDS}),
        rank_pids=tuple(w.rank_pids),
        is_ready=w.is_ready,
        is_leaving=w.is_leaving,
        storage=tuple(
            StorageLoad(one.tier, one.blocks, one.hit_blocks, dict(one.faults)) for one in w.storage
        ),
    )


# --- PeerReport -----------------------------------------------------------------------------------


def _peer_report_to_wire(m: PeerReport) -> pb.PeerReport:
    return pb.PeerReport(
        routes=[
            pb.RouteReport(
                address=route.address,
                transport=route.transport,
                round_trip_s=route.round_trip_s,
                gb_per_s=route.gb_per_s,
                error=route.error,
            )
            for route in m.routes
        ]
    )


def _peer_report_from_wire(w: pb.PeerReport) -> PeerReport:
    return PeerReport(
        tuple(
            RouteReport(
                address=route.address,
                transport=route.transport,
                round_trip_s=route.round_trip_s,
                gb_per_s=route.gb_per_s,
                error=route.error,
            )
            for route in w.routes
        )
    )
