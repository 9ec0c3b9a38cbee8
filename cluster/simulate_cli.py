"""`baton simulate faults` in the terminal: progress, table, JSON, replay and shrinking.

Owns what is shown. Does not know trials. Called by `cluster.cli`.
"""

from __future__ import annotations

import asyncio
import json
import os

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from core.errors import ConfigError
from simulation.loads import make_plan
from simulation.search import MAX_SHRUNK, Summary, as_line, chosen, replay_line, search, shrink
from simulation.trial import run_trial


def simulate_faults(num_seeds: int, first_seed: int, *, as_json: bool) -> None:
    """Search a range of seeds for violations.

    Raises:
        SystemExit: 1 if an invariant was violated, or a fault or transition was never met in 500 seeds.
    """
    progress = Progress(
        TextColumn("seeds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with progress:
        bar = progress.add_task("seeds", total=num_seeds, note="")

        def on_seed(s: Summary) -> None:
            progress.update(bar, completed=s.seeds, note=f"{len(s.violations)} violations")

        summary = asyncio.run(search(first_seed, num_seeds, os.cpu_count() or 1, on_seed))
    found = summary.as_dict()
    found["replay"] = _shrunk(summary)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(summary, found)
    if summary.violations:
        raise SystemExit(1)


def _shrunk(summary: Summary) -> list[str]:
    """Shrink the first failing seeds; each becomes one line that shows the failure again."""
    seeds: dict[int, None] = {}
    for violation in summary.violations:
        head = violation.partition(":")[0].removeprefix("seed ")
        if head.isdigit():
            seeds[int(head)] = None
    return [replay_line(seed, *shrink(seed)) for seed in list(seeds)[:MAX_SHRUNK]]


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
            f"--only-faults and --only-requests take indices below {len(plan.faults)} and {len(plan.orders)}: {error}"
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


def _show(summary: Summary, found: dict[str, object]) -> None:
    console = Console()
    table = Table("fault", "bit", box=box.SIMPLE)
    for kind, count in sorted(summary.faults.items(), key=lambda item: -item[1]):
        table.add_row(kind, str(count))
    console.print(table)
    console.print(
        f"{summary.seeds} seeds, {summary.virtual_s / 3600:.2f} virtual hours, {summary.requests} requests, "
        f"{summary.tokens} tokens; at least {summary.fewest_faults} faults bit in every seed"
    )
    console.print(f"endings: {dict(summary.endings)}")
    console.print(f"above capacity: {dict(summary.overload_endings)}")
    console.print(
        f"fault attempts {summary.retries}, moves off draining workers {summary.moves}, "
        f"client reconnects {summary.reconnects}"
    )
    console.print(f"never met: {found['faults_never_met']} {found['transitions_never_met']}")
    for line in summary.violations or ["no violation"]:
        console.print(line, markup=False)
    for line in found["replay"]:  # type: ignore[attr-defined]
        console.print(f"replay: {line}", markup=False)
