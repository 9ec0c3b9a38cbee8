"""Monotonic stamps of one request and the durations derived from them, defined once.

Owns TTFT, ITL, TPOT and E2E as this project means them, and how a duration is shown. Does not know
who stamps.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Timeline:
    """Instants in loop time (seconds); `token_at` has one entry per delivered delta."""

    received_at: float
    admitted_at: float | None = None
    token_at: list[float] = field(default_factory=list)
    num_tokens: int = 0
    ended_at: float | None = None

    def delivered(self, now_s: float, num_tokens: int) -> None:
        """Stamp the delivery of `num_tokens` to the server."""
        self.token_at.append(now_s)
        self.num_tokens += num_tokens

    @property
    def ttft_s(self) -> float | None:
        """First token sent minus request received, at the router."""
        return self.token_at[0] - self.received_at if self.token_at else None

    @property
    def e2e_s(self) -> float | None:
        """End minus request received."""
        return None if self.ended_at is None else self.ended_at - self.received_at

    @property
    def itl_s(self) -> list[float]:
        """Gaps between consecutive deliveries."""
        return [b - a for a, b in zip(self.token_at, self.token_at[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """(Last token minus first token) over (tokens minus 1)."""
        if self.num_tokens < 2 or not self.token_at:
            return None
        return (self.token_at[-1] - self.token_at[0]) / (self.num_tokens - 1)


def rounded_ms(seconds: float) -> float:
    """Return a duration as people and logs get it: milliseconds, to the microsecond."""
    return round(seconds * 1000, 3)
