"""From logits to a token, with randomness that depends on (seed, choice, position) alone.

Owns the draw and the log probabilities. Does not know sequences or batches: a row is drawn alone,
in float64, so its token cannot depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np

from core.plan import NOTHING_TO_DRAW, Penalties, SampleSpec
from core.types import Logprob
from engine.model.rank_memory import TokenHistory

Row = np.ndarray[Any, np.dtype[np.float64]]


def uniform(seed: int, choice: int, position: int) -> float:
    """The number in [0, 1) for one position of one choice: a counter, not a stream of its own."""
    digest = hashlib.blake2b(
        struct.pack("<QII", seed & (2**64 - 1), choice, position), digest_size=8
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(logits: np.ndarray[Any, Any], spec: SampleSpec) -> Logprob:
    """Draw one token from logits, fp32 [V].

    Raises:
        ValueError: A logit is NaN, or nothing is left to draw from.
    """
    is_plain = not (spec.bias or spec.allowed or spec.banned) and spec.penalties is None
    if spec.temperature == 0 and is_plain and spec.num_logprobs is None:
        token_id = int(logits.argmax())  # the first of equals, as below; a NaN counts as largest
        if np.isfinite(logits[token_id]):
            return Logprob(token_id, 0.0)
    row: Row = logits.astype(np.float64)
    if np.isnan(row).any() or not np.isfinite(row.max()):
        raise ValueError("the model's logits are not finite")
    raw = row
    if not is_plain:
        row = _adjusted(row, spec)
        if not np.isfinite(row.max()):
            raise ValueError(NOTHING_TO_DRAW)
    token_id = int(row.argmax()) if spec.temperature == 0 else _sample(row, spec)
    if spec.num_logprobs is None:
        return Logprob(token_id, 0.0)
    return _with_logprobs(raw, token_id, spec.num_logprobs)


def score(logits: np.ndarray[Any, Any], token_id: int, num_top: int) -> Logprob:
    """Score a given token under logits, fp32 [V], with its likeliest rivals."""
    return _with_logprobs(logits.astype(np.float64), token_id, num_top)


def _adjusted(row: Row, spec: SampleSpec) -> Row:
    """Apply bias, then penalties, then the masks: the same result as vLLM's order."""
    row = row.copy()
    for token_id, bias in spec.bias:
        row[token_id] += bias
    if spec.penalties is not None:
        _penalise(row, spec.penalties)
    if spec.allowed:
        kept = np.full_like(row, -np.inf)
        allowed = list(spec.allowed)
        kept[allowed] = row[allowed]
        row = kept
    if spec.banned:
        row[list(spec.banned)] = -np.inf
    return row


def _penalise(row: Row, p: Penalties) -> None:
    """Change a row in place.

    Sources: CTRL, arXiv:1909.05858 (repetition); OpenAI's API (the others).
    """
    history = p.token_ids if isinstance(p.token_ids, TokenHistory) else TokenHistory.of(p, len(row))
    seen, counts = history.distinct()
    if p.repetition != 1.0:
        values = row[seen]
        row[seen] = np.where(values > 0, values / p.repetition, values * p.repetition)
    if p.frequency or p.presence:
        is_output = counts > 0
        row[seen[is_output]] -= p.frequency * counts[is_output] + p.presence


def _sample(row: Row, spec: SampleSpec) -> int:
    """Inverse of the cumulative distribution over tokens sorted by (logit descending, id)."""
    order = np.argsort(-row, kind="stable")
    if 0 < spec.top_k < len(order):
        order = order[: spec.top_k]
    scaled = (row[order] - row[order[0]]) / max(spec.temperature, 1e-6)
    if spec.min_p > 0:
        kept = max(1, int(np.searchsorted(-scaled, -np.log(spec.min_p), side="right")))
        order, scaled = order[:kept], scaled[:kept]
    cumulative = np.cumsum(np.exp(scaled))
    if spec.top_p < 1.0:
        kept = int(np.searchsorted(cumulative, spec.top_p * cumulative[-1], side="left")) + 1
        order, cumulative = order[:kept], cumulative[:kept]
    point = uniform(spec.seed, spec.choice, spec.position) * cumulative[-1]
    return int(order[min(int(np.searchsorted(cumulative, point, side="right")), len(order) - 1)])


def _with_logprobs(row: Row, token_id: int, num_top: int) -> Logprob:
    top = row.max()
    logprobs = row - top - np.log(np.exp(row - top).sum())
    best = np.argsort(-logprobs, kind="stable")[:num_top]
    return Logprob(
        token_id, float(logprobs[token_id]), tuple((int(i), float(logprobs[i])) for i in best)
    )
