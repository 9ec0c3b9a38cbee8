"""What a run of `baton bench router` means.

Owns the definitions. Does not know how anything was sent.

Added TTFT is what passes at the client between sending a request and its first event, less what
passes at the stub worker between the request and its first token. All processes run on one machine
and read one clock, so it also splits in two: to the worker, and back to the client. Tokens per
second per core are the tokens that clients received over the CPU seconds of the router and of the
processes that it started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import Sample, percentile
from bench.router.stub_worker import StubFirstToken

PERCENTILES = (50, 99)
REFUSED = ("429", "503")


@dataclass(frozen=True, slots=True)
class Measured:
    """One load, and what it took."""

    samples: Sequence[Sample]
    """In any order; instants are monotonic seconds."""
    first_tokens: Mapping[int, StubFirstToken]
    """By the number of the request; those of other requests are left out."""
    took_s: float
    """From the first request to the last end."""
    router_cpu_s: float
    """Of the router's own process."""
    children_cpu_s: float
    """Of the processes that it started: tokenizers, a reader of large bodies."""


def summarise_first_token(measured: Measured) -> dict[str, Any]:
    """Reduce the load of many prompts to what the router adds to their first tokens."""
    added: list[float] = []
    to_worker: list[float] = []
    to_client: list[float] = []
    for sample in measured.samples:
        stub = measured.first_tokens.get(sample.index)
        if sample.error or not sample.arrivals or stub is None:
            continue
        first_at = sample.arrivals[0]
        to_worker.append(stub.received_at - sample.sent_at)
        to_client.append(first_at - stub.sent_at)
        added.append(to_worker[-1] + to_client[-1])
    return {
        **_percentiles("added_ttft_ms", added),
        **_percentiles("to_worker_ms", to_worker),
        **_percentiles("to_client_ms", to_client),
        "measured": len(added),
        **_common(measured),
    }


def summarise_streams(measured: Measured) -> dict[str, Any]:
    """Reduce the load of many streams to what a core of the router carries."""
    tokens = sum(sample.output_tokens for sample in measured.samples if not sample.error)
    used_s = measured.router_cpu_s + measured.children_cpu_s
    return {
        # The kernel counts in ticks: a short run may have used none.
        "tokens_per_s_per_core": tokens / used_s if used_s else None,
        "tokens": tokens,
        "tokens_per_s": tokens / measured.took_s,
        **_common(measured),
    }


def summarise_overload(measured: Measured) -> dict[str, Any]:
    """Reduce the load above capacity to its refusals."""
    refused = [s for s in measured.samples if s.error.startswith(REFUSED)]
    answered = [s for s in measured.samples if not s.error]
    return {
        # Not the time of the plan: clients that are late offer less.
        "refusals_per_s": len(refused) / measured.took_s,
        **_percentiles("refusal_ms", [s.ended_at - s.sent_at for s in refused]),
        "refused": len(refused),
        "answered_per_s": len(answered) / measured.took_s,
        **_percentiles("ttft_ms", [s.arrivals[0] - s.sent_at for s in answered]),
        **_common(measured),
    }


def _common(measured: Measured) -> dict[str, Any]:
    errors: dict[str, int] = {}
    for sample in measured.samples:
        if sample.error:
            errors[sample.error] = errors.get(sample.error, 0) + 1
    return {
        "requests": len(measured.samples),
        "completed": sum(not sample.error for sample in measured.samples),
        "errors": errors,
        "prompt_tokens": sum(s.input_tokens for s in measured.samples),
        "cached_tokens": sum(s.cached_tokens for s in measured.samples),
        **_percentiles("send_lag_ms", [s.sent_at - s.scheduled_at for s in measured.samples]),
        "took_s": measured.took_s,
        "router_cpu_s": measured.router_cpu_s,
        "children_cpu_s": measured.children_cpu_s,
    }


def _percentiles(name: str, values_s: Sequence[float]) -> dict[str, float | None]:
    """Return p50 and p99 in milliseconds; None where there is nothing."""
    ordered = sorted(values_s)
    return {
        f"{name}_p{share}": percentile(ordered, share) * 1e3 if ordered else None
        for share in PERCENTILES
    }
