"""From logits to a token, with randomness that depends on (seed, choice, position) alone.

Owns the draw and the log probabilities. Does not know sequences or batches: a row is drawn alone,
in float64, so its token cannot depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np

from core.plan import NOTHING_TO_DRAW, History, SampleSpec
from core.types import Logprob, SamplingParams
from engine.model.rank_memory import TokenHistory

Row = np.ndarray[Any, np.dtype[np.float64]]


def uniform(seed: int, choice: int, position: int) -> float:
    """The number in [0, 1) for one position of one choice: a counter, not a stream of its own."""
    # Two's complement: OpenAI's seeds may be negative, and each must stay one of its own.
    digest = hashlib.blake2b(
        struct.pack("<QII", seed & (2**64 - 1), choice, position), digest_size=8
    ).digest()
    # 53 bits are what a float64 holds: every value is exact, and none is 1.
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(logits: np.ndarray[Any, Any], spec: SampleSpec) -> Logprob:
    """Draw one token from logits, fp32 [V].

    Raises:
        ValueError: A logit is NaN, or nothing is left to draw from.
    """
    params = spec.params
    is_masked = params.allowed_token_ids or spec.banned
    is_plain = not (is_masked or params.logit_bias or spec.history)
    # The commonest draw, without a copy in float64 or a sort.
    if params.temperature == 0 and is_plain and params.logprobs is None:
        token_id = int(logits.argmax())  # the first of equals, as below; a NaN counts as largest
        if np.isfinite(logits[token_id]):
            return Logprob(token_id, 0.0)
    # In fp32 a sum over 150,000 tokens would lose the unlikely ones.
    row: Row = logits.astype(np.float64)
    if np.isnan(row).any() or not np.isfinite(row.max()):
        raise ValueError("the model's logits are not finite")
    # Log probabilities are the model's own, before bias, penalties and masks.
    raw = row
    if not is_plain:
        row = _adjusted(row, spec)
        if not np.isfinite(row.max()):
            raise ValueError(NOTHING_TO_DRAW)
    token_id = int(row.argmax()) if params.temperature == 0 else _sample(row, spec)
    if params.logprobs is None:
        return Logprob(token_id, 0.0)
    return _with_logprobs(raw, token_id, params.logprobs)


def score(logits: np.ndarray[Any, Any], token_id: int, num_top: int) -> Logprob:
    """Score a given token under logits, fp32 [V], with its likeliest rivals."""
    return _with_logprobs(logits.astype(np.float64), token_id, num_top)


def _adjusted(row: Row, spec: SampleSpec) -> Row:
    """Apply bias, then penalties, then the masks: the same result as vLLM's order."""
    row = row.copy()
    for token_id, bias in spec.params.logit_bias:
        row[token_id] += bias
    if spec.history is not None:
        _penalise(row, spec.params, spec.history)
    # After the bias, which must not lift what is not allowed.
    if spec.params.allowed_token_ids:
        kept = np.full_like(row, -np.inf)
        allowed = list(spec.params.allowed_token_ids)
        kept[allowed] = row[allowed]
        row = kept
    if spec.banned:
        row[list(spec.banned)] = -np.inf
    return row


def _penalise(row: Row, params: SamplingParams, history: History) -> None:
    """Change a row in place.

    Sources: CTRL, arXiv:1909.05858 (repetition); OpenAI's API (the others).
    """
    known = history.token_ids
    # On a rank the history is counted already; a plan that took no pipe has plain tokens.
    counted = known if isinstance(known, TokenHistory) else TokenHistory.of(history, len(row))
    seen, counts = counted.distinct()
    repetition = params.repetition_penalty
    if repetition != 1.0:
        values = row[seen]
        # Dividing a negative logit would make the token more likely.
        row[seen] = np.where(values > 0, values / repetition, values * repetition)
    if params.frequency_penalty or params.presence_penalty:
        is_output = counts > 0
        by_count = params.frequency_penalty * counts[is_output]
        row[seen[is_output]] -= by_count + params.presence_penalty


def _sample(row: Row, spec: SampleSpec) -> int:
    """Inverse of the cumulative distribution over tokens sorted by (logit descending, id)."""
    # Stable: equal logits go by token id, whatever the machine sorts with.
    order = np.argsort(-row, kind="stable")
    params = spec.params
    if 0 < params.top_k < len(order):
        order = order[: params.top_k]
    # The largest becomes 0, so that no exponential overflows at any temperature.
    scaled = (row[order] - row[order[0]]) / max(params.temperature, 1e-6)
    # Tokens of at least min_p times the likeliest one's probability (arXiv:2407.01082).
    if params.min_p > 0:
        kept = max(1, int(np.searchsorted(-scaled, -np.log(params.min_p), side="right")))
        order, scaled = order[:kept], scaled[:kept]
    cumulative = np.cumsum(np.exp(scaled))
    # Nucleus: the shortest head that holds top_p of the mass (arXiv:1904.09751).
    if params.top_p < 1.0:
        kept = int(np.searchsorted(cumulative, params.top_p * cumulative[-1], side="left")) + 1
        order, cumulative = order[:kept], cumulative[:kept]
    # The point is scaled to what is left, which spares dividing every probability.
    point = uniform(spec.seed, spec.choice, spec.position) * cumulative[-1]
    return int(order[min(int(np.searchsorted(cumulative, point, side="right")), len(order) - 1)])


def _with_logprobs(row: Row, token_id: int, num_top: int) -> Logprob:
    top = row.max()
    logprobs = row - top - np.log(np.exp(row - top).sum())
    # Of equal ones the lower id first, as in the draw.
    best = np.argsort(-logprobs, kind="stable")[:num_top]
    return Logprob(
        token_id, float(logprobs[token_id]), tuple((int(i), float(logprobs[i])) for i in best)
    )
