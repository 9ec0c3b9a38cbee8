"""Routers behind one address: which of them has answered, how another is reached, where each is.

Owns how often is asked, and their table. Does not know what is asked for. Routers of one node share
a port, so each connection may reach another one; every answer that is a router's own names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rich.table import Table

from cli.console import table_of

TRIES_PER_ROUTER = 8
"""Connections for each router behind one address, until each of them should have answered."""
MAX_ROUTERS = 64
"""As in the config: what an answer claims beyond it is no number of routers."""
Answer = TypeVar("Answer")


def ask_until(
    is_right: Callable[[Answer, str], bool],
    ask: Callable[[], tuple[Answer, Mapping[str, str]]],
) -> tuple[Answer, str]:
    """Ask until an answer is right, or every router has had its chance.

    Args:
        is_right: Gets an answer, and the name of the router that gave it; empty: it has none.
        ask: Opens a connection of its own, and returns an answer and its headers.

    Returns:
        The first answer that is right, or the last one, with its router.
    """
    asked: set[str] = set()
    num_tries = 0
    while True:
        found, headers = ask()
        num_tries += 1
        router = headers.get("x-baton-router", "")
        asked.add(router)
        num_routers = _num_routers(headers.get("x-baton-num-routers", ""))
        is_last = len(asked) >= num_routers or num_tries >= TRIES_PER_ROUTER * num_routers
        if is_last or is_right(found, router):
            return found, router


def _num_routers(claimed: str) -> int:
    return min(int(claimed), MAX_ROUTERS) if re.fullmatch("[1-9][0-9]{0,3}", claimed) else 1


def routers_table(routers: Sequence[Mapping[str, Any]]) -> Table:
    """Draw where each router listens, and where it alone shows its metrics."""
    numbers = ("pid", "HTTP port", "gRPC port")
    table = table_of("router", *numbers, "metrics", numbers=numbers)
    for router in routers:
        ports = (str(router[name]) for name in ("pid", "http_port", "grpc_port"))
        table.add_row(router["router_id"], *ports, router["metrics_address"])
    return table
