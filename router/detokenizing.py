"""Token ids to text, one token at a time, exact on characters that span tokens.

Owns the incremental decoders of all choices. Does not know stop strings. Called by
`router.choice_output`. Decoding is microseconds, so it runs on the router's loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from core.errors import ModelLoadError

CONTEXT_TOKENS = 6
"""Prompt tokens the decoder sees first, so that a leading space is judged as in the whole text."""


class StreamDecoder:
    """The `TextDecoder` of one choice."""

    def __init__(self, tokenizer: Tokenizer, context: tuple[int, ...], *, skips_special: bool = True) -> None:
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
        return str(self._tokenizer.decode(pending, skip_special_tokens=self._skips_special)) if pending else ""


class TextModel:
    """The tokenizer file, loaded once per router."""

    def __init__(self, folder: Path) -> None:
        """Load `tokenizer.json`.

        Raises:
            ModelLoadError: It is missing or malformed.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelLoadError(f"{folder.name} holds no tokenizer.json; other tokenizer formats are not read")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception, whatever is wrong with the file
            raise ModelLoadError(f"{folder.name}/tokenizer.json cannot be read: {error}") from error

    def decoder(self, prompt: tuple[int, ...], *, skips_special: bool = True) -> StreamDecoder:
        """Make the decoder of one choice."""
        return StreamDecoder(self._tokenizer, prompt[-CONTEXT_TOKENS:], skips_special=skips_special)

    def text(self, token_ids: Sequence[int], *, skips_special: bool = False) -> str:
        """Decode a whole list."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skips_special))

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, for log probabilities."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))
