"""Routers behind one address: which of them has answered, and how another is reached.

Owns how often is asked. Does not know what is asked for. Routers of one node share a port, so each
connection may reach another one; every answer that is a router's own names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

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
