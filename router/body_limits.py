"""How much a body may hold: its depth and its number of values, before any of them is used.

Owns the limits and the count. Does not know fields' meanings.
"""

from __future__ import annotations

from typing import Any

from core.errors import InvalidRequest

MAX_DEPTH = 64
MAX_VALUES = 1 << 14
"""Strings, numbers, lists and objects of one top-level field, token ids aside."""
MAX_TOKEN_IDS = 1 << 18
"""Integers in lists of nothing else."""
MAX_FIELDS = 1024


def check_size(body: dict[str, Any]) -> None:
    """Refuse a body with too much in it.

    Raises:
        InvalidRequest: Names the field.
    """
    if len(body) > MAX_FIELDS:
        raise InvalidRequest("body", f"has {len(body)} fields, the limit is {MAX_FIELDS}")
    num_ids = 0
    for name, value in body.items():
        num_ids += _count(name[:80], value)
        if num_ids > MAX_TOKEN_IDS:
            raise InvalidRequest(
                name[:80], f"has more than {MAX_TOKEN_IDS} token ids; send fewer prompts at once"
            )


def _count(name: str, value: Any) -> int:  # noqa: ANN401 - any JSON
    """Count a field's token ids, and refuse more of anything else than the limits allow."""
    num_ids = 0
    num_values = 0
    level: list[Any] = [value]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidRequest(name, f"is nested too deeply, the limit is {MAX_DEPTH} levels")
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                num_values += len(node)
                below.extend(v for v in node.values() if isinstance(v, (dict, list)))
            elif isinstance(node, list):
                # Prompts of token ids are long and cheap; they have a limit of their own.
                if node and set(map(type, node)) == {int}:
                    num_ids += len(node)
                    continue
                num_values += len(node)
                below.extend(v for v in node if isinstance(v, (dict, list)))
            if num_values > MAX_VALUES:
                raise InvalidRequest(name, f"has more than {MAX_VALUES} values; send fewer")
        level = below
    return num_ids
