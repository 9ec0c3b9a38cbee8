"""Sessions over gRPC: the generic transport with the session codec.

Owns the method name and the two codecs. Called by the composition roots of workers and routers.
"""

from __future__ import annotations

from cluster.session_codec import from_router_wire, from_worker_wire, to_router_wire, to_worker_wire
from core.numbered import Numbered
from kv_transfer.grpc_network import GrpcNetwork, Tls
from protos.baton.internal.v1 import session_pb2 as pb


def session_network(host: str = "127.0.0.1", tls: Tls | None = None) -> GrpcNetwork:
    """Make the network of session streams."""
    return GrpcNetwork(
        "/baton.internal.v1.SessionService/Open",
        host,
        encode_up=lambda n: to_worker_wire(n.number, n.message).SerializeToString(),
        decode_up=_decode_up,
        encode_down=lambda n: to_router_wire(n.number, n.message).SerializeToString(),
        decode_down=_decode_down,
        tls=tls,
    )


def _decode_up(data: bytes) -> Numbered:
    wire = pb.ToWorker.FromString(data)
    return Numbered(wire.number, from_worker_wire(wire))


def _decode_down(data: bytes) -> Numbered:
    wire = pb.ToRouter.FromString(data)
    return Numbered(wire.number, from_router_wire(wire))
