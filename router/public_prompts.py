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
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)  # bounded: the setting may name /dev/zero
        prompts: object = json.loads(data) if len(data) <= MAX_FILE_BYTES else None
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"is not JSON: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise _refusal(path, f"has more than {MAX_FILE_BYTES} bytes")
    if not isinstance(prompts, list):
        raise _refusal(path, f"holds a {type(prompts).__name__}, no list")
    if len(prompts) > MAX_PROMPTS:
        raise _refusal(path, f"holds {len(prompts)} prompts")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) or not prompt:
            raise _refusal(path, f"has as prompt {number} an empty text, or no text")
    return tuple(prompts)


def _refusal(path: str, fact: str) -> ConfigError:
    return ConfigError(
        f"router.public_prompts: {path} {fact}; it must be a JSON list of at most {MAX_PROMPTS} "
        f"texts in {MAX_FILE_BYTES} bytes"
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
