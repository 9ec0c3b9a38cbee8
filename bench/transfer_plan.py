"""What both processes of `baton bench transfer` share: the plan, the KV pool and the network.

Owns those. Does not know what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ConfigError
from core.ids import Incarnation, WorkerId
from core.kv_layout import KVLayout
from core.ports import Network
from engine.ranks.shared_kv import SharedKV
from kv_transfer.sidecar.network import SidecarNetwork
from kv_transfer.transports.choice import Transports
from kv_transfer.transports.shared_memory import SharedNetwork
from process.shared_memory import create_segment
from transport.fetch_streams import fetch_network

LAYOUT = KVLayout(
    "bench", "bfloat16", num_layers=24, num_kv_heads=2, head_size=64, block_size_tokens=16
)
"""Qwen2.5-0.5B's."""
RECEIVER = (WorkerId("bench-receiver"), Incarnation(1))
BARE = "/baton.internal.v1.Bench/Bare"
SIDECAR_TRANSPORTS = ("gloo", "nccl", "nixl")
SIDECAR_FRAME_BYTES = (1 << 20) + (1 << 16)
"""Room for a frame and its header."""


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What to measure."""

    transport: str
    mib: int
    streams: int
    turns: int = 5
    transfers: int = 8
    frame_bytes: int = 1 << 20
    copy_threads: int = 1

    @property
    def num_blocks(self) -> int:
        """Blocks of one transfer."""
        return max(1, (self.mib << 20) // LAYOUT.block_bytes)

    @property
    def transfer_bytes(self) -> int:
        """Bytes of one transfer, in whole blocks."""
        return self.num_blocks * LAYOUT.block_bytes


def make_network(transport: str, kv: SharedKV) -> Network:
    """Make the network of one transport.

    Raises:
        ConfigError: There is no such transport.
    """
    if transport == "shm":
        return Transports({"shm": SharedNetwork(kv.shared)})
    if transport == "grpc":
        return Transports({"grpc": fetch_network()})
    if transport in SIDECAR_TRANSPORTS:
        return Transports({transport: SidecarNetwork(transport, "127.0.0.1", SIDECAR_FRAME_BYTES)})
    known = ", ".join(("shm", "grpc", *SIDECAR_TRANSPORTS))
    raise ConfigError(f"--transport {transport!r} is unknown; possible: {known}")


def make_pool(num_blocks: int) -> SharedKV:
    """Make a KV pool of so many blocks."""
    kv = SharedKV(LAYOUT, num_blocks)
    kv.use([create_segment(LAYOUT.pool_bytes(num_blocks))])
    return kv
