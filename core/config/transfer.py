"""How KV changes hands.

Owns the settings of the hand-over. Does not know transports.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from core.config.node import Node, Seconds

Transport = Literal["shm", "grpc", "gloo", "nccl", "nixl"]
TRANSPORTS: tuple[str, ...] = get_args(Transport)
"""Every name that a config may list."""


class TransferConfig(Node):
    """The hand-over of KV."""

    transports: tuple[Transport, ...] = Field(
        ("shm", "grpc"),
        min_length=1,
        description="transports for KV, best first; a pair takes the first it has in common",
    )
    frame_bytes: int = Field(
        1 << 20, ge=4096, le=1 << 24, description="frames are coalesced up to this size"
    )
    copy_threads: int = Field(
        1, ge=1, le=16, description="cores that copy and verify what arrives at one worker"
    )
    lease_s: Seconds = Field(5.0, description="silence after which source blocks are freed")
    park_s: Seconds = Field(
        1.0, description="how long an unknown transfer id may wait for its Submit"
    )
    reserve_wait_s: Seconds = Field(
        10.0, description="how long decode lets a transfer wait for free blocks"
    )
    open_timeout_s: Seconds = Field(5.0, description="longest wait for the sender's first answer")
