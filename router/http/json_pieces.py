"""JSON of replies that may be large, encoded piece by piece.

Owns the division into pieces: the standard encoder holds the GIL for the length of one call, so a
reply with very many log probabilities is never one call. Does not know replies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_LEVELS = 5
"""Reply, choices, choice, log probabilities, and their list: an entry of it is small."""
PLAIN = json.JSONEncoder(separators=(",", ":"))
UTF8 = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def dumps(node: Any, encoder: json.JSONEncoder = PLAIN) -> str:  # noqa: ANN401 - any JSON
    """Encode a node with `encoder`, in many small calls."""
    return "".join(_pieces(node, encoder, MAX_LEVELS))


def _pieces(node: Any, encoder: json.JSONEncoder, num_levels: int) -> Iterator[str]:  # noqa: ANN401
    if not num_levels or not node or not isinstance(node, (dict, list)):
        yield encoder.encode(node)
    elif isinstance(node, dict):
        before = "{"
        for name, value in node.items():
            yield f"{before}{encoder.encode(name)}:"
            yield from _pieces(value, encoder, num_levels - 1)
            before = ","
        yield "}"
    else:
        before = "["
        for value in node:
            yield before
            yield from _pieces(value, encoder, num_levels - 1)
            before = ","
        yield "]"
