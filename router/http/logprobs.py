"""Log probabilities as OpenAI's two endpoints and vLLM's field show them.

Owns the names of tokens and the three shapes: legacy (`/v1/completions`), chat, and by token id for
prompts. Does not know replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core.types import Logprob
from router.text.detokenizing import TextModel, TextOffsets

Legacy = dict[str, list[Any]]


class LogprobShapes:
    """The shapes over one vocabulary."""

    def __init__(self, text: TextModel, *, names_ids: bool) -> None:
        """Name the tokens of a vocabulary: by their text, or with `names_ids` by their ids."""
        self._text = text
        self._names_ids = names_ids

    def _name(self, token_id: int, *, is_first: bool = False) -> str:
        if self._names_ids:
            return _id_name(token_id)
        return self._text.token_text(token_id, is_first=is_first)

    def _rivals(self, entry: Logprob) -> dict[str, float]:
        """Return rivals by name; of equal texts the likeliest token keeps it, others go by id."""
        named: dict[str, float] = {}
        for token_id, logprob in entry.ranked:
            name = self._name(token_id)
            # Two tokens may have one text, as broken bytes do: a dictionary would lose one of them.
            named[_id_name(token_id) if name in named else name] = logprob
        return named

    def legacy(self, entries: Sequence[Logprob], offsets: TextOffsets) -> Legacy:
        """Return the shape of `/v1/completions`; `offsets` is at the first of the entries."""
        return {
            "text_offset": [offsets.begin(entry.token_id) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "tokens": [self._name(entry.token_id) for entry in entries],
            "top_logprobs": [self._rivals(entry) for entry in entries],
        }

    def echoed(
        self, prompt: tuple[int, ...], scored: Sequence[Logprob], *, shows_special: bool
    ) -> Legacy:
        """Return the same shape for an echoed prompt, whose first token has no probability."""
        decoder = self._text.decoder((), skips_special=not shows_special)
        offsets = TextOffsets(self._text, decoder)
        first: Legacy = {
            "text_offset": [offsets.begin(prompt[0])],
            # Nothing stands before the first token that could predict it; OpenAI sends null.
            "token_logprobs": [None],
            "tokens": [self._name(prompt[0], is_first=True)],
            "top_logprobs": [None],
        }
        return joined(first, self.legacy(scored, offsets))

    def chat(self, entries: Sequence[Logprob]) -> list[dict[str, Any]]:
        """Return the shape of chat: text and bytes, from which clients can join characters."""
        return [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [self._token(i, p) for i, p in entry.ranked] if entry.top else [],
            }
            for entry in entries
        ]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._text.token_bytes(token_id)
        return {"token": self._name(token_id), "logprob": logprob, "bytes": list(data)}

    def by_id(self, prompt: Sequence[int], scored: Sequence[Logprob]) -> list[Any]:
        """Return vLLM's shape for a prompt: null for the first token, then by token id."""
        if not scored:
            return [None] * bool(prompt)
        return [None, *(self._by_id(entry) for entry in scored)]

    def _by_id(self, entry: Logprob) -> dict[str, Any]:
        # The token itself stands first, as in vLLM, also if it is among the likeliest.
        own_first = {entry.token_id: entry.logprob, **dict(entry.top)}
        return {
            str(i): {"logprob": p, "decoded_token": self._name(i)} for i, p in own_first.items()
        }


def _id_name(token_id: int) -> str:
    return f"token_id:{token_id}"


def joined(first: Legacy, second: Legacy) -> Legacy:
    """Concatenate two."""
    return {name: values + second[name] for name, values in first.items()}
