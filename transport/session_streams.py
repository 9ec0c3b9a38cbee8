"""Sessions over gRPC: the generic transport with the session codec.

Owns the method name and the two codecs. Does not know what messages mean.
"""

from __future__ import annotations

import logging

from google.protobuf.message import DecodeError

from core.ports import StreamClosed
from protos.baton.internal.v1 import session_pb2 as pb
from transport.grpc_credentials import Tls
from transport.grpc_network import GrpcNetwork, MessageCodec
from transport.sequenced import Numbered
from transport.to_router_codec import from_router_wire, to_router_wire
from transport.to_worker_codec import from_worker_wire, to_worker_wire

log = logging.getLogger(__name__)


def session_network(
    host: str = "127.0.0.1", tls: Tls | None = None, key: bytes = b""
) -> GrpcNetwork:
    """Make the network of session streams; `key` as for `GrpcNetwork`."""
    # One connection to a worker, for there is one stream to it.
    return GrpcNetwork(
        "/baton.internal.v1.SessionService/Open",
        host,
        MessageCodec(
            encode_up=lambda n: to_worker_wire(n.number, n.message).SerializeToString(),
            decode_up=_decode_up,
            encode_down=lambda n: to_router_wire(n.number, n.message).SerializeToString(),
            decode_down=_decode_down,
        ),
        tls=tls,
        key=key,
    )


def _decode_up(data: bytes) -> Numbered:
    """Decode a router's message.

    Raises:
        StreamClosed: It is malformed; the stream is over.
    """
    try:
        wire = pb.ToWorker.FromString(data)
        return Numbered(wire.number, from_worker_wire(wire))
    except (DecodeError, ValueError) as error:
        # Cut: the error of an enum quotes the value, which may be as long as a message.
        why = f"a session message of {len(data)} bytes is malformed: {str(error)[:200]}"
        log.warning("a router's stream is ended: %s", why)
        raise StreamClosed(why) from error


def _decode_down(data: bytes) -> Numbered:
    wire = pb.ToRouter.FromString(data)
    return Numbered(wire.number, from_router_wire(wire))
