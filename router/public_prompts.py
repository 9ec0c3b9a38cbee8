"""System prompts that an operator has made public: their KV blocks are shared by all tenants.

Owns the file they stand in, their tokens as the chat template renders them, and how much of a
prompt is public. Does not know scopes, nor who asks.

A prompt's time to its first token shows whether its beginning is cached. Only what stands in the
file can be found out so, and that is public: whatever follows it, and any other text, stays in the
tenant's own scope.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from core.errors import ConfigError, ServingError
from core.ports import Tokenizer
from core.types import ChatPrompt

MAX_PROMPTS = 64
MAX_FILE_BYTES = 1 << 20
PROBES = ("0", "Z")
"""Messages with nothing in common: what two prompts with them share is the public text, and what
the template puts around it."""


def read_prompts(path: str) -> tuple[str, ...]:
    """Read a file of public prompts; an empty path is a file without any.

    Raises:
        ConfigError: It cannot be read, or is no list of texts.
    """
    if not path:
        return ()
    name = f"router.public_prompts: {path}"
    try:
        data = Path(path).read_bytes()
        prompts: object = json.loads(data) if len(data) <= MAX_FILE_BYTES else None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error
    if isinstance(prompts, list) and len(prompts) <= MAX_PROMPTS:
        texts = tuple(text for text in prompts if isinstance(text, str) and text)
        if len(texts) == len(prompts):
            return texts
    raise ConfigError(
        f"{name} must hold a JSON list of at most {MAX_PROMPTS} texts in {MAX_FILE_BYTES} bytes"
    )


class PublicPrompts:
    """The public prompts of a router; before `start` there are none."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        """Keep the texts."""
        self._texts = texts
        self._beginnings: tuple[tuple[int, ...], ...] = ()

    async def start(self, tokenizer: Tokenizer) -> None:
        """Find out with which tokens each prompt begins a conversation.

        Raises:
            ConfigError: The chat template refuses one of them.
        """
        found = []
        for number, text in enumerate(self._texts, 1):
            try:
                one, other = [await tokenizer.encode_chat(_talk(text, p)) for p in PROBES]
            except ServingError as error:
                fact = f"router.public_prompts: prompt {number} cannot begin a conversation"
                raise ConfigError(f"{fact}: {error.message}") from error
            pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
            found.append(tuple(token_id for token_id, _ in pairs))
        self._beginnings = tuple(found)

    def num_tokens(self, token_ids: Sequence[int]) -> int:
        """Count the first tokens of a prompt that are exactly a public one's, all of them."""
        return max((len(b) for b in self._beginnings if tuple(token_ids[: len(b)]) == b), default=0)


def _talk(system: str, user: str) -> ChatPrompt:
    return ChatPrompt([{"role": "system", "content": system}, {"role": "user", "content": user}])
