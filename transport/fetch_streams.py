"""The network of Fetch streams, on which a decode worker receives KV over gRPC.

Owns the method's name and how many connections its streams share. Does not know their frames.
"""

from __future__ import annotations

from transport.grpc_credentials import Tls
from transport.grpc_network import GrpcNetwork

FETCH_CHANNELS = 4
"""Connections from one decode worker to one prefill worker, which are served side by side."""


def fetch_network(host: str = "127.0.0.1", tls: Tls | None = None, key: bytes = b"") -> GrpcNetwork:
    """Make the network of Fetch streams, which share `FETCH_CHANNELS` connections to a peer."""
    return GrpcNetwork(
        "/baton.internal.v1.KVTransfer/Fetch", host, tls=tls, key=key, num_channels=FETCH_CHANNELS
    )
