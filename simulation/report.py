"""What one trial found.

Owns the counts and the list of violations. Does not know how they are found.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """What happened."""

    style: str = ""
    violations: list[str] = field(default_factory=list)
    bitten: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    transitions: Counter[str] = field(default_factory=Counter)
    decisions: list[str] = field(default_factory=list)
    requests: int = 0
    retries: int = 0
    moves: int = 0
    reconnects: int = 0
    tokens: int = 0
    scored: int = 0
    preemptions: int = 0
    hits: int = 0
    """Requests of which a part of the prompt was found cached."""
    led: int = 0
    """Placements at a worker that the router thought to hold a part of the prompt."""
    charges: int = 0
    """Granted to keys with limits."""
    over_quota: int = 0
    """Refused to them."""
    local_charges: int = 0
    """Of both, those decided without the store."""
    spills: int = 0
    """Placements outside the first pools of a request's tier."""
    steps: int = 0
    virtual_s: float = 0.0

    def violated(self, what: str) -> None:
        """Note a violation, once."""
        if what not in self.violations:
            self.violations.append(what)
