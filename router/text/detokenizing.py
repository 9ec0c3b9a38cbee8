"""Token ids to text, one token at a time, exact on characters that span tokens.

Owns the incremental decoders of all choices. Does not know stop strings. Decoding takes
microseconds, so it runs on the router's event loop.

A tokenizer decodes whole lists, and the text of the last tokens may change with the next one. Two
methods avoid that here. Tokens that stand for bytes (all tokens of byte-level tokenizers, and the
`<0xXX>` of those with byte fallback) go through an incremental UTF-8 decoder: invalid UTF-8 becomes
U+FFFD at once, and what follows is right again. Other tokens are decoded together with the ones
before them, which decide about spaces, and only the new text is returned.
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
"""Prompt tokens with text that the decoder gets first, so that a leading space is treated as in the
whole text, and an unfinished character continues. One and three tokens would do."""
BROKEN = "\ufffd"
EACH_BYTE = "baton.each_byte"
"""How byte fallback replaces invalid UTF-8: byte by byte. Byte-level decoders do as Python does."""


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
        """Begin after `context`, whose text is not returned again.

        Args:
            model: The tokenizer.
            context: The last tokens before the output.
            skips_special: Hide special tokens.
            completes: Return a character that the context left unfinished even if it stays broken;
                otherwise only if the output finishes it.
        """
        self._model = model
        self._skips_special = skips_special
        # Incremental: tokens split characters, and the rest of one comes with the next token.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(model.broken_bytes)
        self._window: list[int] = []
        self._window_text = ""
        """Text of the window; all of it was returned."""
        for token_id in context:
            self._push(token_id)
        self.unfinished = self._utf8.getstate()[0]
        """Bytes of a character that the context began."""
        shown = self.unfinished.decode("utf-8", model.broken_bytes)
        self._foreign = "" if completes else shown
        """How the context's last bytes show if no character comes of them."""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; may be empty. Never raises."""
        return self._without_foreign(self._push(token_id))

    def flush(self) -> str:
        """Return the rest when the output ends: an incomplete character becomes U+FFFD."""
        return self._without_foreign(self._utf8.decode(b"", final=True))

    def _without_foreign(self, text: str) -> str:
        # What the prompt left unfinished is its own: it is cut from the first text that shows it.
        if not text or not self._foreign:
            return text
        foreign = self._foreign
        self._foreign = ""
        return text.removeprefix(foreign)

    def _push(self, token_id: int) -> str:
        if self._model.is_hidden(token_id, skips_special=self._skips_special):
            return ""
        data = self._model.own_bytes(token_id)
        if data is not None and self._model.is_byte_level:
            return self._utf8.decode(data)
        # A text that begins with an ASCII byte loses a leading space, as one with a word does.
        is_first = not self._window and data is not None and data < b"\x80"
        # A whole token ends what bytes had begun: no later token can complete it.
        if data is None or is_first:
            return self._utf8.decode(b"", final=True) + self._decode_in_window(token_id)
        self._advance(token_id)
        return self._utf8.decode(data)

    def _decode_in_window(self, token_id: int) -> str:
        """Decode a token together with those before it, whose text it does not change."""
        text = self._model.text([*self._window, token_id])
        # Some decoders change earlier text, such as a space before punctuation: then the token
        # alone.
        is_plain = text.startswith(self._window_text)
        new = text[len(self._window_text) :] if is_plain else self._model.text([token_id])
        self._advance(token_id)
        return new

    def _advance(self, token_id: int) -> None:
        """Append a token to the window, after which the next one is decoded."""
        self._window.append(token_id)
        if len(self._window) > CONTEXT_TOKENS:
            del self._window[0]
        # Decoded anew, for the first token of a window shows no leading space.
        self._window_text = self._model.text(self._window)


class TextOffsets:
    """Where each token's text begins in the output (characters), for log probabilities."""

    def __init__(self, model: TextModel, decoder: StreamDecoder, start: int = 0) -> None:
        """Begin at `start`, with a fresh decoder."""
        self._model = model
        self._decoder = decoder
        self._end = start

    def begin(self, token_id: int) -> int:
        """Take the next token; return where it, or the character that it continues, begins."""
        begin = self._end
        text = self._decoder.push(token_id)
        self._end += len(text)
        own = self._model.token_text(token_id)
        # The text may begin with the end of a character that earlier tokens began.
        return self._end - len(own) if text.endswith(own) and own else begin


class TextModel:
    """The tokenizer file, loaded once per router."""

    def __init__(self, folder: Path) -> None:
        """Load `tokenizer.json`.

        Raises:
            ModelLoadError: It is missing or malformed.
        """
        path = folder / "tokenizer.json"
        # SentencePiece and tiktoken files need libraries of their own; models ship this one beside
        # them.
        if not path.is_file():
            raise ModelLoadError(
                f"{folder.name} holds no tokenizer.json; other tokenizer formats are not supported"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception for any fault of the file
            raise ModelLoadError(f"{folder.name}/tokenizer.json cannot be read: {error}") from error
        decoder = json.loads(path.read_text(encoding="utf-8")).get("decoder") or {}
        kinds = [decoder, *decoder.get("decoders", ())]
        names = {kind.get("type") for kind in kinds}
        self.is_byte_level = "ByteLevel" in names
        self._falls_back = "ByteFallback" in names
        self.broken_bytes = EACH_BYTE if self._falls_back else "replace"
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        """Special tokens by their text; a decoder hides them by default."""
        self._hidden_ids = frozenset(self.special_ids.values())
        self._anchor = self._find_anchor()
        self._anchor_text = self.text(self._anchor)

    def _find_anchor(self) -> tuple[int, ...]:
        """Find a token with text: decoded after it, other tokens keep their leading space."""
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
        """Return a prompt's text without a character that its end began: the output ends it."""
        decoder = self.decoder(prompt, skips_special=False)
        if self._falls_back:  # where each byte is a token, and one broken byte breaks all beside it
            return self.text(prompt[: len(prompt) - len(decoder.unfinished)])
        shown = decoder.unfinished.decode("utf-8", self.broken_bytes)
        return self.text(prompt).removesuffix(shown)

    def is_hidden(self, token_id: int, *, skips_special: bool) -> bool:
        """Return True for a token without text: a hidden special one, or an id without a name."""
        return (skips_special and token_id in self._hidden_ids) or not self.name(token_id)

    def own_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes that a token stands for in any context; None if it is text."""
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
        """Return the text of one token, for log probabilities.

        Args:
            token_id: A part of a character becomes U+FFFD.
            is_first: Whether it opens a text, where it may lose its leading space.
        """
        data = self.own_bytes(token_id)
        if data is not None:
            return data.decode("utf-8", self.broken_bytes)
        text = self.text([*self._anchor, token_id])
        if is_first or not text.startswith(self._anchor_text):
            return self.text([token_id])
        return text[len(self._anchor_text) :]

    def name(self, token_id: int) -> str:
        """Return the vocabulary's name of a token."""
        return str(self._tokenizer.id_to_token(token_id) or "")

    def beyond(self, vocabulary_size: int) -> dict[int, str]:
        """Return tokens that have no row in a model of this vocabulary size, by id."""
        names = self._tokenizer.get_vocab(with_added_tokens=True).items()
        return {i: name for name, i in sorted(names, key=lambda x: x[1]) if i >= vocabulary_size}

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token, which may be only a part of a character."""
        data = self.own_bytes(token_id)
        return self.token_text(token_id).encode() if data is None else data


def _byte_letters() -> dict[str, int]:
    """Return GPT-2's letters for bytes: printable bytes are themselves, others follow U+0100."""
    # GPT-2's alphabet: a printable byte is its own letter, the others come in order from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()
BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")
