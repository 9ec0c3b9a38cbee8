"""`baton explain request` and `baton prefix explain`: why a request went or would go somewhere.

Owns what is shown. Does not know how a cost is predicted: it asks a router.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from client.endpoints import Endpoints
from core.errors import ConfigError


def explain_request(url: str, request_id: str, access: Endpoints, *, as_json: bool) -> None:
    """Ask a router and show its answer.

    Raises:
        ConfigError: No router answers, or it does not remember the request.
    """
    found = access.get(url, f"/explain/{quote(request_id, safe='')}")
    if "error" in found:
        raise ConfigError(
            f"the router at {url} remembers no request {request_id}; it remembers the latest that "
            "have ended there"
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found)


def explain_prompt(url: str, body: dict[str, Any], access: Endpoints, *, as_json: bool) -> None:
    """Ask a router about a prompt and show its answer.

    Raises:
        ConfigError: No router answers, or it refuses the prompt.
    """
    found = access.post(url, "/prefix-index/explain", body)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    sizes = ", ".join(
        f"{blocks['num_blocks']} full blocks of {blocks['block_size_tokens']} tokens"
        for blocks in found["blocks"]
    )
    console.print(f"{found['prompt_tokens']} prompt tokens: {sizes or 'no worker is there'}")
    table = Table("worker", "role", "blocks", "tokens", "storage", "expected", box=box.SIMPLE)
    for row in found["workers"]:
        storage = ", ".join(f"{name} {count}" for name, count in row["storage"].items())
        cells = (row["leading_blocks"], row["leading_tokens"], storage, row["expected_blocks"])
        table.add_row(row["worker"], row["role"], *map(str, cells))
    console.print(table if found["workers"] else "no worker is known to hold any of it")
    _show_candidates(console, found)
    if "error" in found:
        console.print(found["error"], markup=False, highlight=False)


def _show(found: dict[str, Any]) -> None:
    console = Console()
    _show_candidates(console, found)
    line = (
        f"{found['outcome']}; {found['prompt_tokens']} prompt tokens, {found['cached_tokens']} "
        f"cached; TTFT {found['ttft_ms']} ms, of which {found['queue_ms']} ms waiting"
    )
    console.print(line, markup=False, highlight=False)


def _show_candidates(console: Console, found: dict[str, Any]) -> None:
    columns = (
        "cached",
        "uncached",
        "queued",
        "fetched",
        "fetch ms",
        "prefill ms",
        "transfer ms",
        "decode ms",
        "total ms",
        "weighed",
    )
    table = Table("path", "worker", *columns, box=box.SIMPLE)
    for c in found.get("candidates", ()):
        tokens = (c["cached_tokens"], c["uncached_tokens"], c["queued_tokens"])
        fetched = f"{c['fetched_tokens']} from {c['source']}" if c["source"] else ""
        kinds = ("fetch", "prefill", "transfer", "decode", "total", "weighed")
        times = (f"{c[f'{kind}_ms']:.1f}" for kind in kinds)
        table.add_row(c["path"], c["worker"], *map(str, tokens), fetched, *times)
    console.print(table)
    decision = found.get("decision")
    if decision is not None:
        workers = dict.fromkeys((decision["prefill_worker"], decision["decode_worker"]))
        line = f"path {decision['path']} on {' and '.join(workers)}: {decision['reason']}"
        console.print(line, markup=False, highlight=False)
        if "source" in decision:
            line = f"{decision['fetched_tokens']} tokens of it come from {decision['source']}"
            if found.get("fetch_outcome"):
                line += f": {found['fetch_outcome']}, {found['fetched_tokens']} in "
                line += f"{found['fetch_ms']} ms"
            console.print(line, markup=False, highlight=False)
