"""W3C trace context and the port through which spans are recorded.

Owns parsing and formatting of `traceparent`, and the `Tracing` protocol with its silent
implementation. Does not know OpenTelemetry: the adapter stands in `cluster.tracing`. Source:
https://www.w3.org/TR/trace-context/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
MAX_TRACESTATE_CHARACTERS = 512
Attributes = Mapping[str, str | int | float | bool | tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in a trace the caller stands; `state` is carried and never read."""

    trace_id: int
    span_id: int
    flags: int = 1
    state: str = ""

    @property
    def traceparent(self) -> str:
        """The header's value."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"


def parse_trace(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """Read the two headers; None for anything malformed, which a request must survive."""
    match = _TRACEPARENT.fullmatch(traceparent.strip())
    # Version ff is forbidden; 00 has four fields, later versions may have more.
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    trace_id, span_id = int(match[2], 16), int(match[3], 16)
    # All zeros mean none.
    if not trace_id or not span_id:
        return None
    # Dropped rather than cut: half of a vendor's entry is wrong, none is allowed.
    state = (
        tracestate if len(tracestate) <= MAX_TRACESTATE_CHARACTERS and tracestate.isascii() else ""
    )
    return TraceContext(trace_id, span_id, int(match[4], 16), state)


class Span(Protocol):
    """A span that is open."""

    @property
    def context(self) -> TraceContext | None:
        """What children name as their parent; None when nothing is recorded."""
        ...

    @property
    def is_recorded(self) -> bool:
        """False: nobody will see it, so nothing need be made for it."""
        ...

    def event(self, name: str, at_s: float, attributes: Attributes) -> None:
        """Note what happened within it at an instant (monotonic seconds)."""
        ...

    def end(self, end_s: float, attributes: Attributes, error: str = "") -> None:
        """Close it at an instant (monotonic seconds); `error` is a code of the error tree."""
        ...


class Tracing(Protocol):
    """Records spans; instants are monotonic seconds of this process."""

    def open(self, name: str, parent: TraceContext | None, start_s: float) -> Span:
        """Begin a span."""
        ...

    def close(self) -> None:
        """Export what is left and end."""
        ...


class _NoSpan:
    """A span nobody records: the caller's context goes on unchanged."""

    is_recorded = False

    def __init__(self, context: TraceContext | None) -> None:
        self.context = context

    def event(self, name: str, at_s: float, attributes: Attributes) -> None:
        """Do nothing."""

    def end(self, end_s: float, attributes: Attributes, error: str = "") -> None:
        """Do nothing."""


class NoTracing:
    """The silent implementation."""

    def open(self, name: str, parent: TraceContext | None, start_s: float) -> Span:
        """Pass the parent on."""
        return _NoSpan(parent)

    def close(self) -> None:
        """Do nothing."""


def record(
    tracing: Tracing,
    name: str,
    parent: TraceContext | None,
    start_s: float,
    end_s: float,
    attributes: Attributes | None = None,
    error: str = "",
) -> None:
    """Record a span that is over already."""
    tracing.open(name, parent, start_s).end(end_s, attributes or {}, error)
