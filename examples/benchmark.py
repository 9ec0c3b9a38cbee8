"""`baton bench serve` from Python: `python examples/benchmark.py [URL]`.

Start a cluster first: `baton up --local`. Any OpenAI-compatible server can be the target; the same
seed makes the same load.
"""

import asyncio
import sys
from dataclasses import replace
from typing import Any

from bench.load import Planned, Shape, plan
from bench.report import Sample, summarise
from bench.serve import run
from client.endpoints import Endpoints

SHAPE = Shape(requests=16, input_tokens=64, output_tokens=16, seed=7)
LIMITS_MS = {"ttft": 500.0, "tpot": 50.0}
"""The limits within which a request counts as good."""


def make_load(card: dict[str, Any]) -> list[Planned]:
    """Make requests from the served model's vocabulary; `card` is its entry in /v1/models."""
    return plan(replace(SHAPE, vocabulary_size=card["vocabulary_size"]))


def show(sample: Sample) -> None:
    """Print each request as it ends."""
    print(sample.index, sample.error or f"TTFT {sample.ttft_s * 1e3:.1f} ms")


async def main() -> None:
    """Send the load, four requests at a time, and print the figures."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    samples = await run(
        url,
        model="",
        make_load=make_load,
        concurrency=4,
        timeout_s=60.0,
        on_done=show,
        access=Endpoints(),
    )
    summary = summarise(samples, LIMITS_MS)
    print(f"{summary['completed']} of {SHAPE.requests} completed")
    print(f"{summary['output_tokens_per_s']:.0f} output tokens/s")
    print(f"TTFT p50 {summary['ttft']['p50_ms']:.1f} ms")


if __name__ == "__main__":
    asyncio.run(main())
