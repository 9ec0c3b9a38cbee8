"""What a run of `baton bench serve` means: the field's metrics, a table, a picture.

Owns the definitions. Does not know how requests were sent.

t0 is the SCHEDULED send time (a client that sends late has waited too), t1..tn the arrivals of
chunks: TTFT = t1 - t0; ITL = every gap between chunks, pooled; TPOT = (tn - t1) / (tokens - 1) of a
request; E2E = tn - t0. A request is good if it keeps every limit; attainment is the share of good
ones among all OFFERED requests, goodput their number per second.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PERCENTILES = (50, 95, 99)
COLOURS = ("#2f6fde", "#d9822b", "#3a9b6f", "#8a5cc2")


@dataclass(slots=True)
class Sample:
    """One request as the client saw it; instants are seconds since the run began."""

    index: int
    scheduled_at: float
    sent_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    ended_at: float = 0.0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """First chunk after the scheduled time."""
        return self.arrivals[0] - self.scheduled_at

    @property
    def e2e_s(self) -> float:
        """Last chunk after the scheduled time."""
        return self.arrivals[-1] - self.scheduled_at

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Gaps between chunks."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def percentile(values: Sequence[float], share: int) -> float:
    """Nearest-rank percentile of a sorted list."""
    return values[min(len(values) - 1, max(0, -(-len(values) * share // 100) - 1))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum, in milliseconds."""
    if not values:
        return {}
    ordered = sorted(values)
    out = {"mean_ms": sum(ordered) / len(ordered) * 1e3}
    out |= {f"p{share}_ms": percentile(ordered, share) * 1e3 for share in PERCENTILES}
    return {**out, "max_ms": ordered[-1] * 1e3, "count": len(ordered)}


def summarise(samples: Sequence[Sample], limits_ms: dict[str, float]) -> dict[str, Any]:
    """Reduce a run to its metrics."""
    good = [s for s in samples if not s.error and s.arrivals]
    # Until the last request ended, failed ones too: they took the server's time.
    took_s = max((s.ended_at for s in samples), default=0.0)
    attained = [s for s in good if _is_within(s, limits_ms)]
    errors: dict[str, int] = {}
    for sample in samples:
        if sample.error:
            errors[sample.error] = errors.get(sample.error, 0) + 1
    summary: dict[str, Any] = {
        "requests": len(samples),
        "completed": len(good),
        "errors": errors,
        "took_s": took_s,
        "requests_per_s": len(good) / took_s if took_s else 0.0,
        "output_tokens_per_s": sum(s.output_tokens for s in good) / took_s if took_s else 0.0,
        "total_tokens_per_s": sum(s.output_tokens + s.input_tokens for s in good) / took_s
        if took_s
        else 0.0,
        "input_tokens": sum(s.input_tokens for s in good),
        "output_tokens": sum(s.output_tokens for s in good),
        "cached_tokens": sum(s.cached_tokens for s in good),
        "achieved_concurrency": sum(s.e2e_s for s in good) / took_s if took_s else 0.0,
        "ttft": spread([s.ttft_s for s in good]),
        "itl": spread([g for s in good for g in s.gaps_s]),
        "tpot": spread([t for s in good if (t := s.tpot_s) is not None]),
        "e2e": spread([s.e2e_s for s in good]),
        "longest_gap": spread([max(s.gaps_s) for s in good if s.gaps_s]),
        "send_lag": spread([s.sent_at - s.scheduled_at for s in samples]),
    }
    if limits_ms:
        summary["limits_ms"] = limits_ms
        summary["attainment"] = len(attained) / len(samples) if samples else 0.0
        summary["goodput_requests_per_s"] = len(attained) / took_s if took_s else 0.0
    return summary


def _is_within(sample: Sample, limits_ms: dict[str, float]) -> bool:
    # One token has no TPOT, and keeps every limit on it.
    measured = {"ttft": sample.ttft_s, "tpot": sample.tpot_s or 0.0, "e2e": sample.e2e_s}
    return all(measured[name] * 1e3 <= limit for name, limit in limits_ms.items())


def svg(samples: Sequence[Sample], title: str) -> str:
    """Draw the distributions of TTFT, ITL, TPOT and E2E: share of requests or gaps below a time."""
    good = [s for s in samples if not s.error and s.arrivals]
    panels: list[tuple[str, list[float]]] = [
        ("TTFT", [s.ttft_s for s in good]),
        ("ITL", [g for s in good for g in s.gaps_s]),
        ("TPOT", [t for s in good if (t := s.tpot_s) is not None]),
        ("E2E", [s.e2e_s for s in good]),
    ]
    width = 300
    height = 190
    drawn = [
        _panel(name, values, COLOURS[i], 40 + i % 2 * width, 40 + i // 2 * height)
        for i, (name, values) in enumerate(panels)
        if values
    ]
    box = f'<rect width="{2 * width + 60}" height="{2 * height + 50}" fill="white"/>'
    head = f'<text x="40" y="22" font-weight="bold">{html.escape(title)}</text>'
    size = f'width="{2 * width + 60}" height="{2 * height + 50}"'
    font = 'font-family="sans-serif" font-size="12"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>{box}{head}{"".join(drawn)}</svg>\n'
    )


def _panel(name: str, values: list[float], colour: str, x: int, y: int) -> str:
    ordered = sorted(values)
    width = 240
    height = 120
    # Just behind p99: one straggler would flatten the rest of the curve.
    top = percentile(ordered, 99) * 1.1 or 1.0

    def at(value: float, share: float) -> str:
        return f"{x + min(value / top, 1) * width:.1f},{y + height * (1 - share):.1f}"

    # As many points as the picture has room for.
    step = max(1, len(ordered) // 200)
    points = " ".join(
        at(v, (i + 1) / len(ordered))
        for i, v in enumerate(ordered)
        if i % step == 0 or i == len(ordered) - 1
    )
    marks = "".join(
        f'<text x="{x + 248}" y="{y + 20 + 16 * i}" fill="#556">p{share} '
        f"{percentile(ordered, share) * 1e3:.1f}</text>"
        for i, share in enumerate(PERCENTILES)
    )
    axis = f'<path d="M{x} {y}V{y + height}H{x + width}" fill="none" stroke="#bbb"/>'
    ends = f'<text x="{x}" y="{y + height + 15}" fill="#556">0</text>'
    ends += (
        f'<text x="{x + width}" y="{y + height + 15}" text-anchor="end" '
        f'fill="#556">{top * 1e3:.1f} ms</text>'
    )
    line = f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
    return f'<text x="{x}" y="{y - 6}">{name}: share below</text>{axis}{line}{marks}{ends}'
