"""A router's messages to protobuf and back: a pair of functions for each, in the order of a stream.

Owns the translation; proto types stop here. Does not know streams, nor whether a router may ask for
what it asks: a message has a shape here, and `worker.checking` looks at its values. Deadlines are
instants on this side and seconds left on the wire: two machines' clocks need not agree.

To add a field of sampling: `transport.sampling_codec` takes it by its name.
"""

from __future__ import annotations

import asyncio

from core.ids import (
    MAX_RUN_ID_CHARACTERS,
    Epoch,
    Incarnation,
    RequestId,
    RouterId,
    RunId,
    TransferId,
    WorkerId,
)
from core.session import (
    Cancel,
    ConnectPeers,
    Credit,
    Hello,
    RouterHeartbeat,
    Submit,
    Task,
    ToWorker,
    Wanted,
)
from core.trace import parse_trace
from core.types import GenerateRequest
from protos.baton.internal.v1 import session_pb2 as pb
from transport.sampling_codec import sampling_from_wire, sampling_to_wire


def to_worker_wire(number: int, message: ToWorker) -> pb.ToWorker:
    """Encode a router's message and its number in the stream."""
    match message:
        case Hello():
            return pb.ToWorker(number=number, hello=_hello_to_wire(message))
        case Submit():
            return pb.ToWorker(number=number, submit=_submit_to_wire(message))
        case Credit():
            return pb.ToWorker(number=number, credit=_credit_to_wire(message))
        case Cancel():
            return pb.ToWorker(number=number, cancel=_cancel_to_wire(message))
        case ConnectPeers():
            return pb.ToWorker(number=number, connect_peers=_connect_peers_to_wire(message))
        case RouterHeartbeat():
            return pb.ToWorker(number=number, heartbeat=pb.RouterHeartbeat())


def from_worker_wire(wire: pb.ToWorker) -> ToWorker | None:
    """Decode a router's message; None for a kind of a newer version.

    Raises:
        ValueError: It names a task that there is not, or something by too long an id.
    """
    match wire.WhichOneof("message"):
        case "hello":
            return _hello_from_wire(wire.hello)
        case "submit":
            return _submit_from_wire(wire.submit)
        case "credit":
            return _credit_from_wire(wire.credit)
        case "cancel":
            return _cancel_from_wire(wire.cancel)
        case "connect_peers":
            return _connect_peers_from_wire(wire.connect_peers)
        case "heartbeat":
            return RouterHeartbeat()
        case _:
            # Newer routers send this worker what it cannot know; it goes on without.
            return None


# --- Hello ----------------------------------------------------------------------------------------


def _hello_to_wire(m: Hello) -> pb.Hello:
    wanted = [_wanted_to_wire(w) for w in m.wanted]
    return pb.Hello(router_id=m.router_id, wanted=wanted, stream_number=m.stream_number)


def _hello_from_wire(w: pb.Hello) -> Hello:
    wanted = tuple(_wanted_from_wire(one) for one in w.wanted)
    return Hello(RouterId(_id(w.router_id)), wanted, w.stream_number)


def _wanted_to_wire(w: Wanted) -> pb.Wanted:
    return pb.Wanted(
        request_id=w.run_id,
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
        next_positions=tuple(w.next_positions),
        credit=w.credit,
        num_scores=w.num_scores,
        finished_choices=tuple(w.finished_choices),
        is_coming=w.is_coming,
    )


# --- Submit ---------------------------------------------------------------------------------------


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
        keeps_prefix=r.keeps_prefix,
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
        keeps_prefix=w.keeps_prefix,
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


# --- Credit, Cancel, ConnectPeers -----------------------------------------------------------------


def _credit_to_wire(m: Credit) -> pb.Credit:
    return pb.Credit(
        request_id=m.run_id, epoch=m.epoch, limit=m.limit, finished_choices=m.finished_choices
    )


def _credit_from_wire(w: pb.Credit) -> Credit:
    return Credit(_run_id(w.request_id), Epoch(w.epoch), w.limit, tuple(w.finished_choices))


def _cancel_to_wire(m: Cancel) -> pb.Cancel:
    return pb.Cancel(request_id=m.run_id, epoch=m.epoch)


def _cancel_from_wire(w: pb.Cancel) -> Cancel:
    return Cancel(_run_id(w.request_id), Epoch(w.epoch))


def _connect_peers_to_wire(m: ConnectPeers) -> pb.ConnectPeers:
    return pb.ConnectPeers(addresses=m.addresses, probe_bytes=m.probe_bytes)


def _connect_peers_from_wire(w: pb.ConnectPeers) -> ConnectPeers:
    return ConnectPeers(tuple(w.addresses), w.probe_bytes)


# --- ids ------------------------------------------------------------------------------------------


def _id(text: str) -> str:
    """Bound a name that is kept, logged and sent again."""
    if len(text) > MAX_RUN_ID_CHARACTERS:
        raise ValueError(f"an id has {len(text)} characters, the limit is {MAX_RUN_ID_CHARACTERS}")
    return text


def _run_id(text: str) -> RunId:
    return RunId(RequestId(_id(text)))
