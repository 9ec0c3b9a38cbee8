"""`baton bench router` in the terminal: progress, table, JSON.

Owns what is shown, and where a run comes from. Does not know how anything is measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.router.measurement import measure_loads
from bench.router.plan import RouterPlan
from core import logs

ROOT = Path(__file__).parents[2]
FIGURES = (
    ("added TTFT, ms", "first_token", "added_ttft_ms"),
    ("of it, to the worker", "first_token", "to_worker_ms"),
    ("of it, back to the client", "first_token", "to_client_ms"),
    ("a refusal, ms", "overload", "refusal_ms"),
    ("TTFT of the admitted meanwhile, ms", "overload", "ttft_ms"),
)
"""What has percentiles: its name in the table, the load, and the key."""


def run_bench_router(plan: RouterPlan, facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Run and report.

    The processes log from level warning on, unless the environment names another level.

    Args:
        plan: What to measure.
        facts: Of this machine, as `baton collect-env` has them.
        as_json: Show JSON and no table.

    Raises:
        ConfigError: Redis is not installed, or CPU time cannot be read.
        ServingError: A process died, or no request was answered.
    """
    # One that comes or goes is no news here, and lines would stand between those of the progress.
    logs.configure("bench", level=os.environ.get(logs.LEVEL_VARIABLE, "warning"))
    console = Console(stderr=True)
    with console.status("") as status:
        found = asyncio.run(measure_loads(plan, lambda name: status.update(f"load: {name}")))
    report = {**_origin(facts), "parameters": _parameters(plan), **found}
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(plan, report)


def _parameters(plan: RouterPlan) -> dict[str, Any]:
    """Return the plan, and what follows from it."""
    return {
        **asdict(plan),
        "stream_tokens": plan.stream_tokens,
        "capacity_per_s": plan.capacity_per_s,
        "overload_per_s": plan.overload_load().rate,
    }


def _origin(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Say which code ran where, and when."""
    return {
        "commit": _commit(),
        "command": " ".join(["baton", *sys.argv[1:]]),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": dict(facts),
    }


def _commit() -> str:
    """Return the commit of this code; empty if it is no checkout."""
    if not (ROOT / ".git").exists():
        return ""  # installed: any checkout above it is another project's
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(  # noqa: S603 - fixed words
            command, capture_output=True, text=True, check=False, cwd=ROOT
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _show(plan: RouterPlan, report: Mapping[str, Any]) -> None:
    console = Console()
    table = Table("", "p50", "p99", box=box.SIMPLE)
    for name, load, key in FIGURES:
        values = [report[load][f"{key}_p{share}"] for share in (50, 99)]
        table.add_row(name, *(_number(value, 2) for value in values))
    console.print(table)
    first_token, streams, overload = (report[n] for n in ("first_token", "streams", "overload"))
    console.print(
        f"{plan.rate:g} requests/s of {plan.prompt_tokens} tokens: {first_token['completed']} of "
        f"{first_token['requests']} answered, router CPU {_cpu(first_token)}"
    )
    console.print(
        f"{plan.streams} streams: {streams['tokens']} tokens, {streams['tokens_per_s']:.0f}/s, "
        f"{_number(streams['tokens_per_s_per_core'], 0)}/s per core of the router"
    )
    console.print(
        f"{plan.overload:g} times the capacity of {plan.max_concurrent} at once: "
        f"{overload['refusals_per_s']:.0f} refusals/s, {overload['answered_per_s']:.0f} answers/s "
        f"of {plan.capacity_per_s:.0f}, router CPU {_cpu(overload)}"
    )
    for load in ("first_token", "streams", "overload"):
        for message, count in report[load]["errors"].items():
            console.print(f"{load}: {count} times {message}", markup=False)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _cpu(load: Mapping[str, Any]) -> str:
    """Describe how much of a core the router used."""
    share = load["router_cpu_s"] / load["took_s"]
    children = load["children_cpu_s"] / load["took_s"]
    return f"{share:.0%} of a core, its child processes {children:.0%}"
