"""`baton status`: whether the cluster serves, what is missing, every worker, router and tier.

Owns what is shown and the exit code. Does not know how readiness is found: it asks a router.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer
from rich.table import Table

from cli.console import plain_console, table_of
from cli.routers import routers_table
from client.endpoints import Endpoints

EXIT_CODES = {"ready": 0, "not_ready": 1, "degraded": 3}
"""Beside 2, which every command returns when nobody answers."""


def run_status(url: str, access: Endpoints, *, as_json: bool) -> int:
    """Ask a router, show its answer, and return the exit code.

    Raises:
        ConfigError: No router answers.
    """
    readiness = access.get(url, "/ready")
    replicas, routers = access.get_fields(url, "/replicas", "replicas", "routers")
    tiers = access.get_field(url, "/load", "tiers")
    if as_json:
        tree = {**readiness, "replicas": replicas, "routers": routers, "tiers": tiers}
        typer.echo(json.dumps(tree, indent=2))
    else:
        _show(readiness, replicas, routers, tiers)
    return EXIT_CODES[readiness["state"]]


def _show(
    readiness: dict[str, Any],
    replicas: list[dict[str, Any]],
    routers: list[dict[str, Any]],
    tiers: dict[str, dict[str, int]],
) -> None:
    console = plain_console()
    console.print(_workers(replicas))
    console.print(routers_table(routers))
    console.print(_tiers(tiers))
    for line in _lines(readiness):
        console.print(line, highlight=False)


def _workers(replicas: list[dict[str, Any]]) -> Table:
    numbers = ("run", "wait", "free blocks")
    table = table_of("role", "tier", "pid", "ranks", "address", "state", *numbers, numbers=numbers)
    for r in sorted(replicas, key=lambda r: (r["role"], r["tier"], r["pid"])):
        load = r["load"]
        # Cached blocks are given up whenever blocks are needed.
        num_free = load["free_blocks"] + load["cached_blocks"]
        table.add_row(
            r["role"],
            r["tier"] or "shared",
            str(r["pid"]),
            " ".join(map(str, r["rank_pids"])),
            r["address"],
            r["state"],
            str(load["running"]),
            str(load["waiting"]),
            f"{num_free}/{load['total_blocks']}",
        )
    return table


def _tiers(tiers: dict[str, dict[str, int]]) -> Table:
    """Draw the tiers of the router that answers: each counts its own."""
    numbers = ("run", "wait", "overflowed", "refused")
    keys = ("running", "queued", "overflowed", "refused")
    table = table_of("tier", *numbers, numbers=numbers)
    for name, counts in tiers.items():
        # A router of an earlier version does not count them all.
        table.add_row(name, *(str(counts.get(key, 0)) for key in keys))
    return table


def _lines(readiness: dict[str, Any]) -> Iterator[str]:
    state = readiness["state"].replace("_", " ")
    for name, model in readiness["models"].items():
        pools = ", ".join(
            f"{pool} {counts['ready']} of {counts['configured']}"
            for pool, counts in model.items()
            if isinstance(counts, dict)
        )
        canary = "" if model["canary_ms"] is None else f"; canary {model['canary_ms']:,.0f} ms"
        yield f"{name}: {state}; {pools}; store {readiness['store']}{canary}"
    for problem in readiness["problems"]:
        yield f"  {problem['code']}: {problem['detail']}"
