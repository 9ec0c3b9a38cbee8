"""What one trial is: its cluster, its load and its faults, as its seed has drawn them.

Owns the plan's form. Does not know how it is drawn, nor how it is carried out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from core.types import SamplingParams
from simulation.faults.kinds import Fault, Kind
from simulation.shape import ClusterShape

TIMEOUT_S = 120.0
METERED = "metered"
"""The tier of keys with limits, in the trials that have some."""


class Style(StrEnum):
    """What a trial presses on."""

    CALM = "calm"
    ALONE = "alone"
    ADMISSION = "admission"
    POOL = "pool"
    GIANTS = "giants"

    @property
    def is_overload(self) -> bool:
        """True if more is asked than can be served, so that refusals are honest."""
        return self in (Style.ADMISSION, Style.POOL, Style.GIANTS)


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """What one client does."""

    start_s: float
    name: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    scope: str = ""
    tier: str = "standard"
    timeout_s: float = TIMEOUT_S
    cancel_after_s: float | None = None
    stall_s: float = 0.0
    raises: Kind | None = None
    """Its decoder or its reply raises, after a few tokens."""
    key: str = ""
    """Its API key, of the tier with limits; empty: one without."""
    is_length_open: bool = False
    """Its client does not say how long the answer may be."""
    is_named: bool = True
    """Its client has chosen its id; without, it knows the one that its router chose."""
    is_repeated: bool = False
    """Its client sends it once more when it has the answer."""


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """Everything one seed decides before the run."""

    seed: int
    shape: ClusterShape
    requests: tuple[PlannedRequest, ...]
    faults: tuple[Fault, ...]
    style: Style = Style.CALM
