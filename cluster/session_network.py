"""Sessions over gRPC: the generic transport with the session codec.

Owns the method name and the two codecs. Called by the composition roots of workers and routers.
"""

from __future__ import annotations

from cluster.session_codec import from_router_wire, from_worker_wire, to_router_wire, to_worker_wire
from kv_transfer.grpc_network import GrpcNetwork
from protos.baton.internal.v1 import session_pb2 as pb


def session_network(host: str = "127.0.0.1") -> GrpcNetwork:
    """Make the network of session streams."""
    return GrpcNetwork(
        "/baton.internal.v1.SessionService/Open",
        host,
        encode_up=lambda message: to_worker_wire(message).SerializeToString(),
        decode_up=lambda data: from_worker_wire(pb.ToWorker.FromString(data)),
        encode_down=lambda message: to_router_wire(message).SerializeToString(),
        decode_down=lambda data: from_router_wire(pb.ToRouter.FromString(data)),
    )
