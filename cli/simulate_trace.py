"""`baton simulate trace` in the terminal: progress, table, JSON.

Owns what is shown, and the check of the options. Does not know how a trace is replayed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.options import INTERRUPTED
from core.errors import ConfigError
from simulation.replay import Policy, Replay, ReplayPlan
from simulation.traces import read_trace

ANSWERS_PER_UPDATE = 64


def simulate_trace(
    path: Path,
    num_workers: int,
    cache_tokens: int,
    prefill_tokens_per_s: float,
    policy: str,
    block_tokens: int,
    seed: int,
    *,
    as_json: bool,
) -> None:
    """Replay a trace and show the figures.

    Raises:
        ConfigError: The trace cannot be read, or an option does not fit it.
        SystemExit: 130 at Ctrl-C.
    """
    try:
        chosen = Policy(policy)
    except ValueError as error:
        known = ", ".join(p.value for p in Policy)
        raise ConfigError(f"--policy is {policy}, must be one of {known}") from error
    began = time.perf_counter()
    trace = read_trace(path, block_tokens)
    if cache_tokens < trace.block_tokens:
        raise ConfigError(
            f"--cache-tokens is {cache_tokens}, a block of this trace has {trace.block_tokens}"
        )
    plan = ReplayPlan(num_workers, cache_tokens, prefill_tokens_per_s, chosen, seed)
    progress = Progress(
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    try:
        with progress:
            bar = progress.add_task("requests", total=len(trace.requests))

            def on_answer(num_answered: int) -> None:
                if num_answered % ANSWERS_PER_UPDATE == 0:
                    progress.update(bar, completed=num_answered)

            figures = Replay(trace, plan, on_answer).run()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    found: dict[str, object] = {
        "trace": path.name,
        "requests": len(trace.requests),
        "block_tokens": trace.block_tokens,
        "workers": num_workers,
        "cache_tokens": cache_tokens,
        "prefill_tokens_per_s": prefill_tokens_per_s,
        "policy": chosen.value,
        **{name: round(value, 6) for name, value in figures.items()},
        "wall_s": round(time.perf_counter() - began, 3),
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("figure", "value", box=box.SIMPLE)
    for name, value in found.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
