"""What a client asked for, and of which model, before anything is checked.

Owns the parameters that both servers fill in, and the rules for names that clients choose. Does
not know HTTP or gRPC, nor how a request is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import InvalidRequest
from core.ids import MAX_REQUEST_ID_CHARACTERS
from core.trace import TraceContext
from core.types import MAX_CHOICES, ChatPrompt
from router.access.identities import ANYBODY, Identity

MAX_KEY_CHARACTERS = 512
"""Of a key that steers a request."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the router knows of the model, without torch.

    `default_sampling` is from `generation_config.json`.
    """

    name: str
    vocabulary_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    default_sampling: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    max_prompt_bytes: int = 0
    """Longer text cannot fit, however it is tokenized; 0: no such limit is known."""


@dataclass(frozen=True, slots=True)
class RequestParams:
    """What a client asked for, not validated yet.

    `sampling` has only the given fields: an absent one means the model's default.
    """

    prompt: str | Sequence[int] | ChatPrompt
    sampling: dict[str, Any]
    model: str = ""
    request_id: str = ""
    """Identifies the request, its seed and its stream. Empty: the router makes one."""
    correlation_id: str = ""
    """The caller's name for the action it belongs to; many requests may share it."""
    time_limit_s: float | None = None
    bad_words: Sequence[str] = ()
    truncate_prompt_tokens: int | None = None
    """Keep so many; -1: as many as fit."""
    keeps_left: bool = False
    """Truncate at the end instead of the beginning."""
    adds_special_tokens: bool = True
    cache_salt: str = ""
    prompt_cache_key: str = ""
    """Prompts with one key probably share a prefix."""
    session_id: str = ""
    """Prompts of one session probably continue one another."""
    prompt_cache_retention: str = ""
    service_tier: str = ""
    """Asked for in the body; empty: the key's."""
    tier_header: str = ""
    """Asked for in the header."""
    echoes: bool = False
    """The prompt is shown before the output."""
    trace: TraceContext | None = None
    identity: Identity = ANYBODY
    resume_from: tuple[int, ...] = ()
    """For a client that resumes: its position in each choice (`router.resuming`)."""
    resume_tokens: tuple[tuple[int, ...], ...] = ()
    """The tokens it has, if it sends them."""


def num_choices(params: RequestParams) -> int:
    """Return how many choices are asked for, at most the limit: a larger `n` is refused later."""
    n: int = params.sampling.get("n", 1)
    return min(n, MAX_CHOICES)


def correlation_id_of(value: str) -> str:
    """Return a caller's id if it may be echoed and logged, else an empty string."""
    return value if _is_text(value, MAX_REQUEST_ID_CHARACTERS) else ""


def _is_text(value: str, limit: int) -> bool:
    return len(value) <= limit and value.isascii() and (value.isprintable() or not value)


def check_text(name: str, value: str, limit: int) -> None:
    """Refuse a name that cannot be logged and echoed.

    Raises:
        InvalidRequest: It is too long, or not printable ASCII.
    """
    if not _is_text(value, limit):
        raise InvalidRequest(
            name, f"has {len(value)} characters, must be at most {limit} printable ASCII ones"
        )
