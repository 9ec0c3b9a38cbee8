"""The output of one choice: positions in order, tokens to text, stop strings.

Owns which positions the client has, the text held back because it might begin a stop string, and
the choice's end. Does not know workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from core.errors import InvalidRequest, InvariantViolation, WorkerLost
from core.session import TokenDelta
from core.types import (
    ChoiceFinished,
    FinishReason,
    GenerateRequest,
    RequestEvent,
    SamplingParams,
    TextDelta,
)


class TextDecoder(Protocol):
    """Turns token ids into text, one at a time."""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; may be empty."""
        ...

    def flush(self) -> str:
        """Return the rest when the output ends."""
        ...


NewDecoder = Callable[[GenerateRequest], TextDecoder]


class ChoiceOutput:
    """One choice, from its first position to its end."""

    def __init__(
        self,
        choice: int,
        sampling: SamplingParams,
        decoder: TextDecoder,
        skip: int = 0,
        hidden_stops: tuple[tuple[int, str], ...] = (),
    ) -> None:
        """Start at position 0.

        Args:
            choice: Its number in the request.
            sampling: The request's.
            decoder: Fresh.
            skip: How much the client has already: positions; one more with the tail, which is text
                that no token brought; two more with the end. It is not sent again.
            hidden_stops: Stop tokens that stand for stop strings (see `GenerateRequest`).
        """
        self.choice = choice
        self.token_ids: list[int] = []
        self.finished: ChoiceFinished | None = None
        self._stop = sampling.stop
        self._includes_stop = sampling.include_stop
        self._decoder = decoder
        self._min_tokens = sampling.min_tokens
        self._hidden_stops = dict(hidden_stops)
        self._held = ""
        self._skip = skip
        self._claimed: tuple[int, int] | None = None
        """Position and id of the last token that a resuming client claims to have."""

    def restore(self, token_ids: tuple[int, ...]) -> None:
        """Start from the tokens that a resuming client sent.

        All but the last are trusted: that one is computed and compared.

        Raises:
            InvalidRequest: They go on after a stop string.
        """
        if token_ids:
            self._decode(token_ids[:-1], shows_last=True)
            if self.finished is not None:
                raise InvalidRequest(
                    "resume_from.tokens", "go on after a stop string, which no output does"
                )
            self._claimed = (len(token_ids) - 1, token_ids[-1])

    def accept(self, delta: TokenDelta) -> list[RequestEvent]:
        """Take a delta; positions that are already here are dropped if they are equal.

        Returns:
            The events for the client.

        Raises:
            InvariantViolation: A position arrived twice, with different tokens.
            InvalidRequest: A resuming client sent another token than was computed.
            WorkerLost: Positions are missing; the attempt is repeated.
        """
        # A worker computes on until it hears of a stop string: deltas after the end are normal.
        if self.finished is not None:
            return []
        known = len(self.token_ids)
        if delta.position > known:
            raise WorkerLost(
                f"positions {known} to {delta.position - 1} of choice {self.choice} are missing"
            )
        # Both workers announce the first token, and a new stream or attempt repeats positions.
        overlap = tuple(self.token_ids[delta.position : delta.position + len(delta.token_ids)])
        if overlap != delta.token_ids[: len(overlap)]:
            raise InvariantViolation(
                f"choice {self.choice} position {delta.position}: tokens {overlap} were "
                f"delivered, now {delta.token_ids} came"
            )
        fresh = delta.token_ids[len(overlap) :]
        self._check_claim(known, fresh)
        text, used = self._decode(
            # The stop token ended the output; its text is no part of it unless asked for.
            fresh,
            shows_last=delta.finish is not FinishReason.STOP or self._includes_stop,
        )
        tail = ""
        if self.finished is None and delta.finish is not None:
            # An incomplete character at the end becomes text here, and may complete a stop string.
            tail = self._release(self._decoder.flush())
            if self.finished is None:
                tail += self._held
                stop_id = delta.stop_token_id
                stop = None if stop_id is None else self._hidden_stops.get(stop_id)
                tail += stop if stop and self._includes_stop else ""
                self.finished = ChoiceFinished(self.choice, delta.finish, stop or stop_id)
        events: list[RequestEvent] = []
        # What a resuming client has was decoded all the same: later text depends on it.
        first = min(max(self._skip - known, 0), len(used))
        if used[first:]:
            logprobs = delta.logprobs[len(overlap) :][first : len(used)]
            events.append(TextDelta(self.choice, known + first, used[first:], text, logprobs))
        # One position more than tokens: this client has the tail as well.
        has_tail = self._skip > len(self.token_ids)
        if tail and not has_tail:
            events.append(TextDelta(self.choice, len(self.token_ids), (), tail))
        if self.finished is not None:
            events.append(
                replace(
                    self.finished,
                    position=len(self.token_ids),
                    is_new=self._skip < len(self.token_ids) + 2,
                )
            )
        return events

    def _check_claim(self, known: int, fresh: tuple[int, ...]) -> None:
        if self._claimed is None or not fresh:
            return
        position, token_id = self._claimed
        self._claimed = None
        # At another position it was computed in an earlier delta of this stream, and compared.
        if position == known and fresh[0] != token_id:
            raise InvalidRequest(
                "resume_from.tokens",
                f"says token {token_id} at position {position} of choice {self.choice}, which is "
                "wrong",
            )

    def _decode(self, fresh: tuple[int, ...], *, shows_last: bool) -> tuple[str, tuple[int, ...]]:
        """Append tokens; the last one adds text only with `shows_last`.

        Returns:
            The text, and the tokens up to the choice's end.
        """
        text = ""
        for index, token_id in enumerate(fresh):
            self.token_ids.append(token_id)
            if index < len(fresh) - 1 or shows_last:
                piece = self._release(self._decoder.push(token_id))
                text += piece if len(self.token_ids) > self._skip else ""
            if self.finished is not None:
                return text, fresh[: index + 1]
        return text, fresh

    def _release(self, piece: str) -> str:
        """Return text that cannot be part of a stop string any more; finish at a match.

        Text of the first `min_tokens` tokens is never part of one.
        """
        if not self._stop or len(self.token_ids) <= self._min_tokens:
            return piece
        self._held += piece
        # The first in the text, and of two that begin together the longer one: whatever the order
        # in which the client listed them.
        matches = [(self._held.find(s), -len(s), s) for s in self._stop if s in self._held]
        if matches:
            at, _, stop = min(matches)
            end = at + len(stop) if self._includes_stop else at
            out = self._held[:end]
            self._held = ""
            self.finished = ChoiceFinished(self.choice, FinishReason.STOP, stop)
            return out
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        out = self._held[:cut]
        self._held = self._held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    # Quadratic in the stop string's length, which is bounded; an automaton would be built for every
    # request.
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
