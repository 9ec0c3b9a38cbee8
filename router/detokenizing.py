"""Token ids to text, one token at a time, exact on characters that span tokens.

Owns the incremental decoders of all choices. Does not know stop strings. Called by
`router.choice_output`. Decoding is microseconds, so it runs on the router's loop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from core.errors import ModelLoadError

CONTEXT_TOKENS = 6
"""Prompt tokens the decoder sees first, so that a leading space is judged as in the whole text."""


class StreamDecoder:
    """The `TextDecoder` of one choice."""

    def __init__(
        self, tokenizer: Tokenizer, context: tuple[int, ...], *, skips_special: bool = True
    ) -> None:
        """Begin after `context`."""
        self._tokenizer, self._skips_special = tokenizer, skips_special
        self._stream = DecodeStream(ids=list(context), skip_special_tokens=skips_special)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this token; may be empty."""
        self._pending.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if not text:
            return ""
        self._pending.clear()
        return str(text)

    def flush(self) -> str:
        """Return what is left when the output ends: an incomplete character shows as U+FFFD."""
        pending, self._pending = self._pending, []
        return (
            str(self._tokenizer.decode(pending, skip_special_tokens=self._skips_special))
            if pending
            else ""
        )


class TextModel:
    """The tokenizer file, loaded once per router."""

    def __init__(self, folder: Path) -> None:
        """Load `tokenizer.json`.

        Raises:
            ModelLoadError: It is missing or malformed.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelLoadError(
                f"{folder.name} holds no tokenizer.json; other tokenizer formats are not read"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except (
            Exception
        ) as error:  # tokenizers raises plain Exception, whatever is wrong with the file
            raise ModelLoadError(f"{folder.name}/tokenizer.json cannot be read: {error}") from error
        decoder = json.loads(path.read_text(encoding="utf-8")).get("decoder") or {}
        kinds = [decoder, *decoder.get("decoders", ())]
        self._is_byte_level = any(kind.get("type") == "ByteLevel" for kind in kinds)

    def decoder(self, prompt: tuple[int, ...], *, skips_special: bool = True) -> StreamDecoder:
        """Make the decoder of one choice."""
        return StreamDecoder(self._tokenizer, prompt[-CONTEXT_TOKENS:], skips_special=skips_special)

    def text(self, token_ids: Sequence[int], *, skips_special: bool = False) -> str:
        """Decode a whole list."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skips_special))

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, for log probabilities."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def name(self, token_id: int) -> str:
        """The token as the vocabulary names it."""
        return str(self._tokenizer.id_to_token(token_id) or "")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes a token stands for, also when they are only a part of a character."""
        name = self.name(token_id)
        if self._is_byte_level and all(c in BYTE_OF_LETTER for c in name):
            return bytes(BYTE_OF_LETTER[c] for c in name)
        if match := BYTE_NAME.fullmatch(name):
            return bytes([int(match[1], 16)])
        return self.token_text(token_id).encode()


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()
BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")
