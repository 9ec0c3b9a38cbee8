"""Token ids to text, one token at a time, exact on characters that span tokens.

Owns the incremental decoders of all choices. Does not know stop strings. Decoding is microseconds,
so it runs on the router's loop.

A tokenizer decodes whole lists, and what it says of the last tokens may change with the next one.
Two things settle that here. Tokens that stand for bytes (all tokens of byte-level tokenizers, and
the `<0xXX>` of those with byte fallback) go through an incremental UTF-8 decoder: what is no valid
UTF-8 becomes U+FFFD, at once, and what follows is right again. Other tokens are decoded with the
ones before them, for the sake of spaces, and only what is new is passed on.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from core.errors import ModelLoadError
from core.types import GenerateRequest

CONTEXT_TOKENS = 6
"""Prompt tokens with a text that the decoder sees first, so that a leading space is judged as in
the whole text, and a character goes on: one and three are needed."""
BROKEN = "\ufffd"
EACH_BYTE = "baton.each_byte"
"""How byte fallback replaces what is no UTF-8: byte by byte.
A byte-level decoder: as Python does."""


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return BROKEN * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


class StreamDecoder:
    """The `TextDecoder` of one choice."""

    def __init__(
        self,
        model: TextModel,
        context: tuple[int, ...],
        *,
        skips_special: bool = True,
        completes: bool = False,
    ) -> None:
        """Begin after `context`, whose text is not told again.

        `completes`: a character that the context left unfinished is told here, whatever becomes of
        it; otherwise only if the output finishes it.
        """
        self._model, self._skips_special = model, skips_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(model.broken_bytes)
        self._window: list[int] = []
        self._told = ""
        """Text of the window; all of it was passed on."""
        for token_id in context:
            self._push(token_id)
        self.unfinished = self._utf8.getstate()[0]
        """Bytes of a character that the context began."""
        shown = self.unfinished.decode("utf-8", model.broken_bytes)
        self._foreign = "" if completes else shown
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


class TextOffsets:
    """Where each token's text begins in the output (characters), for log probabilities."""

    def __init__(self, model: TextModel, decoder: StreamDecoder, start: int = 0) -> None:
        """Begin at `start` with a decoder that has been given nothing yet."""
        self._model, self._decoder, self._end = model, decoder, start

    def begin(self, token_id: int) -> int:
        """Take the next token and say where it begins; inside a character: where that begins."""
        begin = self._end
        text = self._decoder.push(token_id)
        self._end += len(text)
        own = self._model.token_text(token_id)
        return self._end - len(own) if text.endswith(own) and own else begin


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
        self._anchor = self._find_anchor()
        self._anchor_text = self.text(self._anchor)

    def _find_anchor(self) -> tuple[int, ...]:
        """Find a token with text, after which others are decoded, so that they keep their space."""
        if self.is_byte_level:
            return ()
        for token_id in range(self._tokenizer.get_vocab_size(with_added_tokens=True)):
            text = self.text([token_id])
            if text and self.text([token_id, token_id]).startswith(text):
                return (token_id,)
        return ()

    def decoder(
        self, prompt: tuple[int, ...], *, skips_special: bool = True, completes: bool = False
    ) -> StreamDecoder:
        """Make the decoder of one choice; `completes` as in `StreamDecoder`."""
        shown = (
            token_id
            for token_id in reversed(prompt)
            if not self.is_hidden(token_id, skips_special=skips_special)
        )
        context = tuple(itertools.islice(shown, CONTEXT_TOKENS))[::-1]
        return StreamDecoder(self, context, skips_special=skips_special, completes=completes)

    def decoder_of(self, request: GenerateRequest) -> StreamDecoder:
        """Make the decoder of one choice of a request."""
        skips_special = request.sampling.skip_special_tokens
        return self.decoder(
            request.token_ids, skips_special=skips_special, completes=request.echoes
        )

    def echo(self, prompt: tuple[int, ...]) -> str:
        """Text of a prompt but for a character that its end began: the output tells that."""
        decoder = self.decoder(prompt, skips_special=False)
        if self._falls_back:  # where each byte is a token, and one broken byte breaks all beside it
            return self.text(prompt[: len(prompt) - len(decoder.unfinished)])
        shown = decoder.unfinished.decode("utf-8", self.broken_bytes)
        return self.text(prompt).removesuffix(shown)

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

    def token_text(self, token_id: int, *, is_first: bool = False) -> str:
        """Text of one token, for log probabilities.

        Args:
            token_id: Of any token; a part of a character shows as U+FFFD.
            is_first: Whether it opens a text, where it may lose the space that it begins with.
        """
        data = self.own_bytes(token_id)
        if data is not None:
            return data.decode("utf-8", self.broken_bytes)
        text = self.text([*self._anchor, token_id])
        if is_first or not text.startswith(self._anchor_text):
            return self.text([token_id])
        return text[len(self._anchor_text) :]

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
    """GPT-2's letters for bytes: printable ones are themselves, others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()
BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")
