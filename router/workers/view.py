"""One worker as others see it: what its session knows, as plain values.

Owns the states of a session and what operators are shown of a worker. Does not know streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from core.session import Load, RouteReport, StorageLoad, WorkerDescriptor


class SessionState(Enum):
    """Whether the session is connected."""

    DIALLING = auto()
    LIVE = auto()
    RECONNECTING = auto()
    LOST = auto()


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker at one moment."""

    descriptor: WorkerDescriptor
    state: SessionState
    is_ready: bool
    """False while the worker drains or restarts its ranks."""
    load: Load
    """What the worker reported last."""
    rank_pids: tuple[int, ...]
    routes: Mapping[str, RouteReport]
    """Routes by which KV reaches it, by the sender's transfer address."""
    exposed_transfer_s: float = 0.0
    """By which KV that it sent came behind the first token, smoothed; 0: not measured of late."""
    storage: tuple[StorageLoad, ...] = ()
    """What it reported last of the storage tiers below its pool."""
