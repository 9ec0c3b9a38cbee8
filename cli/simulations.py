"""The commands `baton simulate ...`.

Owns their options. Does not know what they do; heavy modules are imported inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Output

simulate = typer.Typer(help="Run the cluster's own code on virtual time.", no_args_is_help=True)


@simulate.command("faults")
def simulate_faults(
    seeds: Annotated[int, typer.Option(help="seeds to run, from --first-seed on", min=1)] = 100,
    first_seed: Annotated[int, typer.Option(help="where the range begins", min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="replay this one seed instead", min=0)] = None,
    only_faults: Annotated[
        str, typer.Option(help="with --seed: indices of faults to keep, or - for none")
    ] = "",
    only_requests: Annotated[
        str, typer.Option(help="with --seed: indices of requests to keep")
    ] = "",
    output: Output = "table",
) -> None:
    """Search for violated invariants under random faults; a failing seed replays from one line."""
    from cli import simulate as simulate_cli  # noqa: PLC0415

    if seed is None:
        simulate_cli.simulate_faults(seeds, first_seed, as_json=output == "json")
    else:
        simulate_cli.replay(seed, only_faults, only_requests, as_json=output == "json")


@simulate.command("trace")
def simulate_trace(
    trace: Annotated[
        Path,
        typer.Option(help="JSON lines or CSV, .gz too: lengths, arrivals, hash_ids or sessions"),
    ],
    workers: Annotated[int, typer.Option(help="prefill workers", min=1, max=10_000)] = 8,
    cache_tokens: Annotated[
        int, typer.Option(help="size of each worker's prefix cache (tokens)", min=1)
    ] = 3_000_000,
    prefill_tokens_per_s: Annotated[
        float, typer.Option(help="speed of each worker on tokens that are not cached", min=0.001)
    ] = 8_000.0,
    policy: Annotated[str, typer.Option(help="cost, least-queued or round-robin")] = "cost",
    block_tokens: Annotated[
        int, typer.Option(help="tokens of one of the trace's hash_ids; 0: by its lengths", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="of the instants at which sessions start")] = 0,
    output: Output = "table",
) -> None:
    """Replay a trace of requests: hit rate, balance and TTFT of placement on such a cluster."""
    from cli.simulate_trace import simulate_trace as run_trace  # noqa: PLC0415

    as_json = output == "json"
    sizes = (workers, cache_tokens, prefill_tokens_per_s)
    run_trace(trace, *sizes, policy, block_tokens, seed, as_json=as_json)
