"""`baton explain request` and `baton prefix explain`: why a request went or would go somewhere.

Owns what is shown, and whom to ask. Does not know how a cost is predicted: a router does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from cli.console import plain_console, table_of
from cli.routers import ask_until
from client.endpoints import Endpoints, words_of
from core.errors import ConfigError

MIN_WIDTH = 120
"""Characters of the table of candidates."""


def explain_request(url: str, request_id: str, access: Endpoints, *, as_json: bool) -> None:
    """Ask the router that served a request, and show its answer.

    Raises:
        ConfigError: No router answers, or none that was asked remembers the request.
    """
    path = f"/explain/{quote(request_id, safe='')}"
    found, _ = ask_until(
        lambda answer, _: "error" not in answer, lambda: access.get_with_headers(url, path)
    )
    if "error" in found:
        raise ConfigError(words_of(found))
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
    console = _console()
    sizes = ", ".join(
        f"{blocks['num_blocks']} full blocks of {blocks['block_size_tokens']} tokens"
        for blocks in found["blocks"]
    )
    console.print(f"{found['prompt_tokens']} prompt tokens: {sizes or 'no worker is there'}")
    numbers = ("blocks", "tokens", "expected")
    table = table_of("worker", "role", "blocks", "tokens", "storage", "expected", numbers=numbers)
    for row in found["workers"]:
        storage = ", ".join(f"{name} {count}" for name, count in row["storage"].items())
        cells = (row["leading_blocks"], row["leading_tokens"], storage, row["expected_blocks"])
        table.add_row(row["worker"], row["role"], *map(str, cells))
    console.print(table if found["workers"] else "no worker is known to hold any of it")
    _show_candidates(console, found)
    if "error" in found:
        console.print(found["error"], markup=False, highlight=False)


def _show(found: dict[str, Any]) -> None:
    console = _console()
    _show_candidates(console, found)
    _print(console, _hindsight(found.get("measured")))
    _print(console, _attempts(found["attempts"]))
    _print(console, _course(found))


def _hindsight(measured: dict[str, Any] | None) -> Iterator[str]:
    if measured is None:
        yield "not measured: it had several attempts, was resumed, or ended before its hand-over"
        return
    parts = ", ".join(
        f"{name} {measured[f'{kind}_ms']:.1f}"
        for name, kind in (
            ("queue", "queue"),
            ("of it a fetch", "fetch"),
            ("prompt", "prefill"),
            ("exposed transfer", "transfer"),
        )
        if kind != "fetch" or measured["fetch_ms"]
    )
    yield (
        f"measured {measured['total_ms']:.1f} ms ({parts}), predicted "
        f"{measured['predicted_ms']:.1f} ms: error {measured['error_ms']:+.1f} ms"
    )
    best = measured.get("best_other")
    if best is None:
        yield "no other candidate, so nothing to regret"
    else:
        yield (
            f"best other candidate: {best['path']} on {best['worker']}, {best['total_ms']:.1f} ms "
            f"and {best['delay_ms']:.1f} ms for others: regret {measured['regret_ms']:+.1f} ms"
        )


def _attempts(attempts: list[dict[str, Any]]) -> Iterator[str]:
    for attempt in attempts:
        workers = " and ".join(attempt["workers"]) or "no worker"
        move = " (a move, no fault)" if attempt["is_move"] else ""
        yield (
            f"attempt {attempt['epoch']}: {attempt['path']} on {workers}: "
            f"{attempt['outcome']}{move}"
        )


def _course(found: dict[str, Any]) -> Iterator[str]:
    tenant = f" of tenant {found['tenant']}" if found["tenant"] else ""
    yield (
        f"{found['outcome']}{tenant}, {found['ended_s_ago']:g} s ago at {found['router']}; "
        f"{found['prompt_tokens']} prompt tokens, {found['cached_tokens']} cached; "
        f"{found['output_tokens']} output tokens"
    )
    yield f"tier {found['tier']}: waited {found['permit_wait_ms']:.1f} ms for a permit"
    phases = ", ".join(
        f"{name.replace('_', ' ')} {ms:.1f}" for name, ms in found["phases_ms"].items()
    )
    yield f"TTFT {found['ttft_ms']:.1f} ms, end to end {found['e2e_ms']:.1f} ms: {phases}"
    charge = found["charge"]
    if charge is None:
        yield "charged to no quota"
    else:
        charged, used = (
            f"{charge[kind]['requests']} requests and {charge[kind]['tokens']} tokens"
            for kind in ("charged", "used")
        )
        yield f"quota: {charged} charged, {used} used, by the whole reply"


def _show_candidates(console: Console, found: dict[str, Any]) -> None:
    candidates = found.get("candidates", [])
    kinds = ("fetch", "prefill", "transfer", "decode", "total", "delay")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("path", "worker"):
        table.add_column(name, no_wrap=True)
    for name in (
        "cached",
        "uncached",
        "queued",
        "fetched",
        *(f"{kind} ms" for kind in kinds),
        "weighed",
    ):
        table.add_column(name, justify="right")
    for c in candidates:
        tokens = (c[f"{kind}_tokens"] for kind in ("cached", "uncached", "queued", "fetched"))
        times = (f"{c[f'{kind}_ms']:.1f}" for kind in (*kinds, "weighed"))
        table.add_row(c["path"], c["worker"], *map(str, tokens), *times)
    console.print(table)
    lines = [
        f"{c['path']} on {c['worker']}: {c['fetched_tokens']} tokens would come from {c['source']}"
        for c in candidates
        if c["source"]
    ]
    decision = found.get("decision")
    if decision is not None:
        workers = dict.fromkeys((decision["prefill_worker"], decision["decode_worker"]))
        lines.append(f"path {decision['path']} on {' and '.join(workers)}: {decision['reason']}")
        if "source" in decision:
            line = f"{decision['fetched_tokens']} tokens of it come from {decision['source']}"
            if found.get("fetch_outcome"):
                line += f": {found['fetch_outcome']}, {found['fetched_tokens']} in "
                line += f"{found['fetch_ms']} ms"
            lines.append(line)
    _print(console, lines)


def _console() -> Console:
    """Make one with room for every column: figures that are cut short would be wrong ones."""
    console = plain_console()
    console.width = max(console.width, MIN_WIDTH)
    return console


def _print(console: Console, lines: Iterable[str]) -> None:
    """Print lines whole: whoever searches them finds what is in them."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
