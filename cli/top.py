"""`baton top`: workers, routers, tiers, KV routes, and one router's rates, again and again.

Owns when a router is asked and how the figures are drawn. Does not know how they are found.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.console import plain_console, table_of
from cli.routers import ask_until, routers_table
from cli.top_figures import Snapshot, Window, totals_of
from client.endpoints import Endpoints, refusal
from core.errors import ConfigError

BAR_CELLS = 10
NOTHING = "-"
Show = Callable[[dict[str, Any]], None]


def run_top(
    url: str,
    access: Endpoints,
    *,
    interval_s: float,
    is_once: bool,
    as_json: bool,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Show a router's figures until Ctrl-C, or once, after the interval that rates need.

    One router is watched, the first that answers. If it stops answering it is asked again: it may
    be restarting.

    Raises:
        ConfigError: No router answers the first time.
    """
    window = Window()
    with contextlib.suppress(KeyboardInterrupt):
        window.add(read_snapshot(url, access))
        if is_once:
            wait(interval_s)
            window.add(read_snapshot(url, access, window.router))
            _shown_plainly(as_json=as_json)(window.figures())
            return
        with _shown(as_json=as_json) as show:
            show(window.figures())
            while True:
                wait(interval_s)
                show(_next(window, url, access))


def read_snapshot(url: str, access: Endpoints, router: str = "") -> Snapshot:
    """Ask for all that is shown.

    Args:
        url: Where one router listens, or several: all of them see the same workers, but each
            counts its own requests.
        access: How they are reached.
        router: Whose counts are wanted; another's are returned if it is not there any more.

    Raises:
        ConfigError: No router answers, or it refuses.
    """

    def is_wanted(_: object, name: str) -> bool:
        return name == (router or name)

    exposition, router = ask_until(is_wanted, lambda: access.get_text(url, "/metrics"))
    load, _ = ask_until(is_wanted, lambda: access.get_with_headers(url, "/load"))
    if "tiers" not in load:
        raise refusal(url, load)
    readiness = access.get(url, "/ready")
    replicas, routers = access.get_fields(url, "/replicas", "replicas", "routers")
    routes = access.get_field(url, "/links", "links")
    try:
        totals = totals_of(exposition)
    except ValueError as error:
        raise ConfigError(f"the server at {url}/metrics is no router") from error
    at_s = time.monotonic()
    return Snapshot(at_s, router, readiness, replicas, load["tiers"], routes, totals, routers)


def _next(window: Window, url: str, access: Endpoints) -> dict[str, Any]:
    """Return the newest figures, with an error if there are no newer ones."""
    try:
        window.add(read_snapshot(url, access, window.router))
    except ConfigError as error:
        return {**window.figures(), "error": error.message}
    return window.figures()


# --- where it is shown ----------------------------------------------------------------------------


def _shown_plainly(*, as_json: bool) -> Show:
    if as_json:
        return lambda figures: typer.echo(json.dumps(figures))
    console = plain_console()
    return lambda figures: console.print(draw(figures))


@contextlib.contextmanager
def _shown(*, as_json: bool) -> Iterator[Show]:
    """Yield what shows figures: in place on a terminal, one after the other elsewhere."""
    console = plain_console()
    if as_json or not console.is_terminal:
        yield _shown_plainly(as_json=as_json)
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda figures: live.update(draw(figures), refresh=True)


# --- how it is drawn ------------------------------------------------------------------------------


def draw(figures: dict[str, Any]) -> RenderableType:
    """Draw the figures as tables."""
    notes = [f"  {problem['code']}: {problem['detail']}" for problem in figures["problems"]]
    if "error" in figures:
        notes.insert(0, f"  not up to date: {figures['error']}")
    return Group(
        Text("\n".join([_headline(figures), *notes])),
        _workers(figures["workers"]),
        routers_table(figures["routers"]),
        _tiers(figures["tiers"]),
        _links(figures["links"]),
    )


def _headline(figures: dict[str, Any]) -> str:
    kv_per_s = figures["kv_bytes_per_s"]
    kv = NOTHING if kv_per_s is None else f"{kv_per_s / 1e6:.1f}"
    at_router = f" at {figures['router']}" if figures["router"] else ""
    return (
        f"{', '.join(figures['models'])}{at_router}: {figures['state'].replace('_', ' ')}; "
        f"store {figures['store']}; in the last {figures['window_s']:.0f} s "
        f"{_rate(figures['requests_per_s'])} requests/s, "
        f"{_rate(figures['prompt_tokens_per_s'])} prompt and "
        f"{_rate(figures['output_tokens_per_s'])} output tokens/s, {kv} MB/s of KV"
    )


def _workers(workers: list[dict[str, Any]]) -> Table:
    numbers = ("run", "wait", "tokens to compute", "KV in use", "cached", "preempted/s")
    table = table_of("worker", "role", "tier", "state", *numbers, numbers=numbers)
    for w in sorted(workers, key=lambda w: (w["role"], w["tier"], w["worker_id"])):
        table.add_row(
            w["worker_id"],
            w["role"],
            w["tier"] or "shared",
            w["state"],
            f"{w['running']:,}",
            f"{w['waiting']:,}",
            f"{w['waiting_tokens']:,}",
            _bar(w["used_blocks"], w["total_blocks"]),
            _share(w["cached_blocks"], w["total_blocks"]),
            _rate(w["preemptions_per_s"]),
        )
    return table


def _tiers(tiers: dict[str, dict[str, Any]]) -> Table:
    numbers = ("run", "wait", "refused", "attainment", "requests/s", "output tokens/s")
    table = table_of("tier", *numbers, numbers=numbers)
    for name, tier in tiers.items():
        attainment = tier["attainment"]
        table.add_row(
            name,
            *(f"{tier[key]:,}" for key in ("running", "queued", "refused")),
            NOTHING if attainment is None else f"{attainment:.1%}",
            _rate(tier["requests_per_s"]),
            _rate(tier["output_tokens_per_s"]),
        )
    return table


def _links(links: list[dict[str, Any]]) -> Table:
    """Sum up the routes of each transport: there are as many as pairs of workers."""
    numbers = ("KV routes", "failed", "longest round trip", "slowest")
    table = table_of("transport", *numbers, numbers=numbers)
    for transport in sorted({link["transport"] for link in links}):
        routes = [link for link in links if link["transport"] == transport]
        speeds = [route["gb_per_s"] for route in routes if route["gb_per_s"]]
        table.add_row(
            transport or "none",
            str(len(routes)),
            str(sum(route["error"] is not None for route in routes)),
            f"{max(route['round_trip_ms'] for route in routes):.3f} ms",
            f"{min(speeds):.2f} GB/s" if speeds else "not measured",
        )
    return table


def _rate(per_s: float | None) -> str:
    return NOTHING if per_s is None else f"{per_s:,.1f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else NOTHING


def _bar(part: int, whole: int) -> str:
    num_full = round(BAR_CELLS * part / whole) if whole else 0
    return f"{'█' * num_full}{'░' * (BAR_CELLS - num_full)} {_share(part, whole):>4}"
