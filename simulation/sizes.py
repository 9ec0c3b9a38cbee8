"""How large a session's message is on the wire, near enough and cheap.

Owns the estimate, which never falls below the encoded size of what grows without bound: tokens, log
probabilities, prompts. Does not know the codec.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from core.session import OfferPrefix, StepFrame, Submit, TokenDelta
from core.types import Logprob
from transport.sequenced import Numbered

HEAD_BYTES = 64
DELTA_BYTES = 96
TOKEN_BYTES = 2
LOGPROB_BYTES = 15
"""A token id of up to two bytes, a double and their tags; the same for each rival."""


def message_bytes(message: Any) -> int:  # noqa: ANN401 - any session message
    """Estimate one message, with or without its number."""
    # Estimated, not encoded: the simulation sends millions of messages as objects.
    inner = message.message if isinstance(message, Numbered) else message
    match inner:
        case StepFrame(_, deltas, ended):
            return HEAD_BYTES + DELTA_BYTES * len(ended) + sum(map(_delta_bytes, deltas))
        case Submit():
            num_tokens = len(inner.request.token_ids) + sum(map(len, inner.emitted))
            return HEAD_BYTES + DELTA_BYTES + TOKEN_BYTES * num_tokens
        case OfferPrefix():
            return HEAD_BYTES + DELTA_BYTES + TOKEN_BYTES * len(inner.token_ids)
        case _:
            return HEAD_BYTES


def _delta_bytes(delta: TokenDelta) -> int:
    scores = _scores_bytes(delta.logprobs) + _scores_bytes(delta.prompt_logprobs)
    return DELTA_BYTES + TOKEN_BYTES * len(delta.token_ids) + scores


def _scores_bytes(scores: Iterable[Logprob]) -> int:
    return sum(LOGPROB_BYTES * (1 + len(score.top)) for score in scores)
