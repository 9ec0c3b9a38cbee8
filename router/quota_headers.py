"""How a key stands to its limits, as a reply shows it: OpenAI's names and durations.

Owns the names and their form. Does not know who counts, or that gRPC sends them as trailers.
"""

from __future__ import annotations

import math

from router.quotas.rules import Standing

KINDS = ("requests", "tokens")
HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in KINDS
)


def quota_headers(standing: Standing) -> dict[str, str]:
    """Return the headers of each limit that a key has."""
    shown: dict[str, str] = {}
    figures = zip(KINDS, standing.limits, standing.left, standing.reset_s, strict=True)
    for kind, limit, left, reset_s in figures:
        if limit:
            shown[f"x-ratelimit-limit-{kind}"] = str(limit)
            shown[f"x-ratelimit-remaining-{kind}"] = str(left)
            shown[f"x-ratelimit-reset-{kind}"] = duration(reset_s)
    return shown


def duration(seconds: float) -> str:
    """Write a duration as OpenAI does: `6m0s`, `1.5s`, `20ms`; never shorter than it is."""
    ms = math.ceil(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    minutes, ms = divmod(ms, 60_000)
    rest = f"{ms / 1000:g}s"
    return f"{minutes}m{rest}" if minutes else rest
