"""`baton simulate faults` in the terminal: progress, table, JSON, replay and shrinking.

Owns what is shown. Does not know trials.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.options import INTERRUPTED
from core.errors import ConfigError
from simulation.loads import make_plan
from simulation.search import MAX_SHRUNK, Summary, as_line, chosen, replay_line, search, shrink
from simulation.trial import run_trial


def simulate_faults(num_seeds: int, first_seed: int, *, as_json: bool) -> None:
    """Search a range of seeds for violations; Ctrl-C ends the search and shows what was run.

    Raises:
        SystemExit: 130 at Ctrl-C, else 1 if an invariant was violated.
    """
    progress = Progress(
        TextColumn("seeds"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
    summary = Summary(first_seed)
    replay_lines: list[str] = []
    is_interrupted = False
    try:
        with progress:
            bar = progress.add_task("seeds", total=num_seeds, note="")

            def on_seed() -> None:
                note = f"{len(summary.violations)} violations"
                progress.update(bar, completed=summary.seeds, note=note)

            asyncio.run(search(summary, num_seeds, os.cpu_count() or 1, on_seed))
        # Shrinking runs a seed many times over.
        failing = _failing(summary)[:MAX_SHRUNK]
        replay_lines.extend(replay_line(seed, *shrink(seed)) for seed in failing)
    except KeyboardInterrupt:
        is_interrupted = True
    found = summary.as_dict() | {
        "seeds_wanted": num_seeds,
        "is_interrupted": is_interrupted,
        "replay": replay_lines,
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(summary, found)
    if is_interrupted:
        raise SystemExit(INTERRUPTED)
    if summary.violations:
        raise SystemExit(1)


def _failing(summary: Summary) -> list[int]:
    """List the seeds with a violation, each once."""
    heads = (v.partition(":")[0].removeprefix("seed ") for v in summary.violations)
    return [int(head) for head in dict.fromkeys(heads) if head.isdigit()]


def replay(seed: int, only_faults: str, only_requests: str, *, as_json: bool) -> None:
    """Run one seed, or the part of it that shrinking left.

    Raises:
        ConfigError: An index that the seed does not have.
        SystemExit: 1 if an invariant was violated.
    """
    plan = make_plan(seed)
    try:
        plan = chosen(plan, _indices(only_faults), _indices(only_requests))
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"--only-faults and --only-requests take indices below {len(plan.faults)} and "
            f"{len(plan.requests)}: {error}"
        ) from error
    report = run_trial(plan)
    if as_json:
        typer.echo(json.dumps(as_line(seed, report), indent=2))
    else:
        for fault in plan.faults:
            typer.echo(f"{fault.at_s:7.3f} s  {fault.kind.value:12} for {fault.for_s:.3f}")
        typer.echo(
            f"{report.requests} requests, {report.tokens} tokens, {report.virtual_s:.1f} virtual s"
        )
        for line in report.violations or ["no violation"]:
            typer.echo(line)
    if report.violations:
        raise SystemExit(1)


def _indices(text: str) -> list[int] | None:
    if text == "-":
        return []
    return [int(part) for part in text.split(",")] if text else None


def _show(summary: Summary, found: dict[str, Any]) -> None:
    console = Console()
    if found["is_interrupted"]:
        console.print(f"interrupted after {summary.seeds} of {found['seeds_wanted']} seeds")
    if not summary.seeds:
        return
    table = Table("fault", "took effect", box=box.SIMPLE)
    for kind, count in sorted(summary.faults.items(), key=lambda item: -item[1]):
        table.add_row(kind, str(count))
    console.print(table)
    console.print(
        f"{summary.seeds} seeds, {summary.virtual_s / 3600:.2f} virtual hours, "
        f"{summary.requests} requests, {summary.tokens} tokens; at least "
        f"{summary.fewest_faults} faults took effect in every seed"
    )
    console.print(f"endings: {dict(summary.endings)}")
    console.print(f"above capacity: {dict(summary.overload_endings)}")
    console.print(
        f"fault attempts {summary.retries}, moves off draining workers {summary.moves}, "
        f"client reconnects {summary.reconnects}"
    )
    if never_reached := found["faults_never_met"] + found["transitions_never_met"]:
        console.print(f"never reached, so not proved by these seeds: {', '.join(never_reached)}")
    for line in summary.violations or ["no violation"]:
        console.print(line, markup=False)
    for line in found["replay"]:
        console.print(f"replay: {line}", markup=False)
