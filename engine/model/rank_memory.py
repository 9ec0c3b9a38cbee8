"""What a rank remembers of a sequence from step to step: its block table, its tokens, their counts.

Owns integers that grow at the end, so that a step costs what is new in it and not what was before.
Does not know pipes, plans or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from core.errors import InternalError
from core.plan import History

Ints = np.ndarray[Any, np.dtype[np.int64]]

FIRST_CAPACITY = 16


class GrowingInts:
    """Numbers in one array, which doubles when it is full."""

    def __init__(self) -> None:
        self._array: Ints = np.empty(FIRST_CAPACITY, dtype=np.int64)
        self._length = 0

    def __len__(self) -> int:
        """Numbers written."""
        return self._length

    def put(self, at: int, values: Sequence[int] | np.ndarray[Any, Any]) -> None:
        """Write `values` at place `at`; they are the last then.

        Raises:
            InternalError: Something is missing before them; nothing was written.
        """
        if not 0 <= at <= self._length:
            raise InternalError(
                f"numbers from {at} on were sent to a rank that knows {self._length}"
            )
        end = at + len(values)
        if end > len(self._array):
            # Doubled, so that n numbers that come one by one are copied 2 n times in all.
            larger: Ints = np.empty(max(end, 2 * len(self._array)), dtype=np.int64)
            larger[:at] = self._array[:at]
            self._array = larger
        self._array[at:end] = values
        # What lay behind is void: a plan sends the table anew from its first block that changed.
        self._length = end

    def view(self) -> Ints:
        """All of them, int64 [length], not copied; good until the next `put`."""
        return self._array[: self._length]


class TokenHistory(Sequence[int]):
    """The tokens that penalties look at, and by token id which were seen and how often put out."""

    def __init__(self, num_prompt_tokens: int, vocabulary_size: int) -> None:
        """Start empty; the first `num_prompt_tokens` to come are the prompt."""
        self.num_prompt_tokens = num_prompt_tokens
        self._token_ids = GrowingInts()
        self._is_seen = np.zeros(vocabulary_size, dtype=np.bool_)
        self._counts = np.zeros(vocabulary_size, dtype=np.int32)

    @classmethod
    def of(cls, history: History, vocabulary_size: int) -> TokenHistory:
        """Read the history of a plan that did not come over the pipe."""
        counted = cls(history.num_prompt_tokens - history.start, vocabulary_size)
        token_ids = history.token_ids[history.start : history.num_tokens]
        counted.extend(np.asarray(token_ids, dtype=np.int64))
        return counted

    def extend(self, token_ids: np.ndarray[Any, Any]) -> None:
        """Add what came since, integers [n]; one that has no logit is nothing to count."""
        # Of the new tokens, those that still belong to the prompt.
        num_prompt = max(0, self.num_prompt_tokens - len(self))
        self._token_ids.put(len(self), token_ids)
        is_known = token_ids < len(self._counts)
        self._is_seen[token_ids[is_known]] = True
        # `counts[ids] += 1` would count a token once, however often it is in `ids`.
        np.add.at(self._counts, token_ids[num_prompt:][is_known[num_prompt:]], 1)

    def distinct(self) -> tuple[Ints, Ints]:
        """Return distinct ids, ascending, int64 [D], and how often the output has each, [D].

        A count of 0 is a token of the prompt alone.
        """
        seen = np.flatnonzero(self._is_seen)
        return seen, self._counts[seen].astype(np.int64)

    def __len__(self) -> int:
        """Tokens known."""
        return len(self._token_ids)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        found: int | list[int] = self._token_ids.view()[index].tolist()
        return found
