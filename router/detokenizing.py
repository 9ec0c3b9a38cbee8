"""Token ids to text, one token at a time, exact on characters that span tokens.

Owns the incremental decoders of all choices. Does not know stop strings. Called by
`router.choice_output`. Decoding is microseconds, so it runs on the router's loop.

A tokenizer decodes whole lists, and what it says of the last tokens may change with the next one.
Two things settle that here. Tokens that stand for bytes (all tokens of byte-level tokenizers, and
the `<0xXX>` of those with byte fallback) go through an incremental UTF-8 decoder: what is no valid
UTF-8 becomes U+FFFD, at once, and what follows is right again. Other tokens are decoded with the
ones before them, for the sake of spaces, and only what is new is passed on.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from core.errors import ModelLoadError

CONTEXT_TOKENS = 6
"""Prompt tokens the decoder sees first, so that a leading space is judged as in the whole text."""
BROKEN = "\ufffd"
EACH_BYTE = "baton.each_byte"
"""How byte fallback replaces what is no UTF-8: byte by byte. A byte-level decoder: as Python does."""


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return BROKEN * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


class StreamDecoder:
    """The `TextDecoder` of one choice."""

    def __init__(
        self, model: TextModel, context: tuple[int, ...], *, skips_special: bool = True
    ) -> None:
        """Begin after `context`: its text is not told again, nor what it left of a character."""
        self._model, self._skips_special = model, skips_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(model.broken_bytes)
        self._window: list[int] = []
        self._told = ""
        """Text of the window; all of it was passed on."""
        for token_id in context:
            self._push(token_id)
        unfinished = self._utf8.getstate()[0]
        self._foreign = unfinished.decode("utf-8", model.broken_bytes)
        """What the context's own last bytes show as if no character comes of them."""

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this token; may be empty. Never raises."""
        return self._without_foreign(self._push(token_id))

    def flush(self) -> str:
        """Return what is left when the output ends: an incomplete character shows as U+FFFD."""
        return self._without_foreign(self._utf8.decode(b"", final=True))

    def _without_foreign(self, text: str) -> str:
        if not text or not self._foreign:
            return text
        foreign, self._foreign = self._foreign, ""
        return text.removeprefix(foreign)

    def _push(self, token_id: int) -> str:
        if self._model.is_hidden(token_id, skips_special=self._skips_special):
            return ""
        data = self._model.own_bytes(token_id)
        if data is not None and self._model.is_byte_level:
            return self._utf8.decode(data)
        # A text that begins with a byte loses a space as it would if it began with a word.
        is_first = not self._window and data is not None and data < b"\x80"
        if data is None or is_first:
            return self._utf8.decode(b"", final=True) + self._after_the_others(token_id)
        self._move_on(token_id)
        return self._utf8.decode(data)

    def _after_the_others(self, token_id: int) -> str:
        """Decode a token together with those before it; nothing of theirs changes by it."""
        text = self._model.text([*self._window, token_id])
        is_plain = text.startswith(self._told)
        new = text[len(self._told) :] if is_plain else self._model.text([token_id])
        self._move_on(token_id)
        return new

    def _move_on(self, token_id: int) -> None:
        """Let a token be what the next one is decoded after."""
        self._window.append(token_id)
        if len(self._window) > CONTEXT_TOKENS:
            del self._window[0]
        self._told = self._model.text(self._window)


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
        names = {kind.get("type") for kind in kinds}
        self.is_byte_level = "ByteLevel" in names
        self._falls_back = "ByteFallback" in names
        self.broken_bytes = EACH_BYTE if self._falls_back else "replace"
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        """Special tokens by their text; a decoder leaves them out unless it is told not to."""
        self._hidden_ids = frozenset(self.special_ids.values())

    def decoder(self, prompt: tuple[int, ...], *, skips_special: bool = True) -> StreamDecoder:
        """Make the decoder of one choice."""
        return StreamDecoder(self, prompt[-CONTEXT_TOKENS:], skips_special=skips_special)

    def is_hidden(self, token_id: int, *, skips_special: bool) -> bool:
        """Whether a token has no text: a special one that is left out, or an id without a name."""
        return (skips_special and token_id in self._hidden_ids) or not self.name(token_id)

    def own_bytes(self, token_id: int) -> bytes | None:
        """Bytes a token stands for whatever is around it; None: it is a piece of text."""
        name = self.name(token_id)
        if self.is_byte_level:
            try:
                return bytes(map(BYTE_OF_LETTER.__getitem__, name))
            except KeyError:
                return name.encode()  # a token that was added as plain text
        match = BYTE_NAME.fullmatch(name) if self._falls_back else None
        return bytes([int(match[1], 16)]) if match else None

    def text(self, token_ids: Sequence[int], *, skips_special: bool = False) -> str:
        """Decode a whole list."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skips_special))

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, for log probabilities."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def name(self, token_id: int) -> str:
        """The token as the vocabulary names it."""
        return str(self._tokenizer.id_to_token(token_id) or "")

    def beyond(self, vocabulary_size: int) -> dict[int, str]:
        """Tokens for which a model of this vocabulary size has no row, by id."""
        names = self._tokenizer.get_vocab(with_added_tokens=True).items()
        return {i: name for name, i in sorted(names, key=lambda x: x[1]) if i >= vocabulary_size}

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes a token stands for, also when they are only a part of a character."""
        data = self.own_bytes(token_id)
        return self.token_text(token_id).encode() if data is None else data


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()
BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")
