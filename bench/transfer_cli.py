"""`baton bench transfer` in the terminal: progress, table, JSON.

Owns what is shown and the ratios. Does not know how KV is moved.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.transfer import Bench, Turn
from bench.transfer_plan import TransferPlan


def run_bench_transfer(plan: TransferPlan, *, as_json: bool) -> None:
    """Run and report.

    Raises:
        ConfigError: There is no such transport.
        ServingError: A transfer failed, so nothing was measured.
    """
    progress = Progress(
        TextColumn("turns"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=as_json and not Console(stderr=True).is_terminal,
    )
    with progress:
        bar = progress.add_task("turns", total=plan.turns)
        turns = asyncio.run(_run(plan, lambda: progress.advance(bar)))
    summary = summarise(plan, turns)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _show(summary)


async def _run(plan: TransferPlan, on_turn: Callable[[], None]) -> list[Turn]:
    turns = []
    async with Bench(plan) as bench:
        for _ in range(plan.turns):
            turns.append(await bench.turn())
            on_turn()
    return turns


def summarise(plan: TransferPlan, turns: list[Turn]) -> dict[str, Any]:
    """Take medians over the turns; every ratio is computed within its turn."""
    speeds = [turn.num_bytes / turn.seconds / 1e9 for turn in turns]
    bare = [
        speed / turn.bare_gb_per_s
        for speed, turn in zip(speeds, turns, strict=True)
        if turn.bare_gb_per_s
    ]
    return {
        "transport": plan.transport,
        "mib": plan.mib,
        "streams": plan.streams,
        "frame_bytes": plan.frame_bytes,
        "copy_threads": plan.copy_threads,
        "gb_per_s": round(median(speeds), 3),
        "memcpy_gb_per_s": round(median(turn.memcpy_gb_per_s for turn in turns), 3),
        "memcpy_fraction": round(
            median(s / t.memcpy_gb_per_s for s, t in zip(speeds, turns, strict=True)), 3
        ),
        "bare_fraction": round(median(bare), 3) if bare else None,
        "checksum_cpu_share": round(
            median(t.sum_s_per_gb * t.num_bytes / 1e9 / max(t.receiver_cpu_s, 1e-9) for t in turns),
            3,
        ),
        "cores": {
            "machine": os.cpu_count(),
            "receiver": round(median(t.receiver_cpu_s / t.seconds for t in turns), 2),
            "sender": round(median(t.sender_cpu_s / t.seconds for t in turns), 2),
        },
        "turns": [asdict(turn) for turn in turns],
    }


def _show(summary: dict[str, Any]) -> None:
    table = Table(
        "transport",
        "GB/s",
        "of memcpy",
        "of the bare stream",
        "checksum's CPU share",
        "cores",
        box=box.SIMPLE,
    )
    bare = summary["bare_fraction"]
    cores = summary["cores"]
    table.add_row(
        summary["transport"],
        f"{summary['gb_per_s']:.2f}",
        f"{summary['memcpy_fraction']:.0%}",
        "-" if bare is None else f"{bare:.0%}",
        f"{summary['checksum_cpu_share']:.0%}",
        f"{cores['receiver']} receiving, {cores['sender']} sending",
    )
    Console().print(table)
