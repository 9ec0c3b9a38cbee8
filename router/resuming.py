"""How far a client is in its stream, so that it can resume it at any router.

Owns the position in every choice and its form as an SSE event id, `request-id:12,7`: for each
choice of each prompt, how many output tokens the client has; one more with the tail (text that no
token brought), two more with the end. Does not know streams.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import InvalidRequest
from core.types import ChoiceFinished, RequestEvent, SamplingParams, TextDelta

MAX_POSITIONS = 4096


class ReplyPositions:
    """Positions of one reply; each event that is sent moves them."""

    def __init__(self, request_id: str, num_choices: int, positions: list[int]) -> None:
        """Begin where the client is.

        Args:
            request_id: Of the first prompt's request.
            num_choices: Of each prompt.
            positions: One for each choice of each prompt.
        """
        self._request_id = request_id
        self._num_choices = num_choices
        self._positions = positions

    def note(self, prompt: int, event: RequestEvent) -> None:
        """Count an event as sent."""
        if isinstance(event, TextDelta):
            end = event.position + len(event.token_ids)
            index = prompt * self._num_choices + event.choice
            # Text without a token is the tail that was held back; it counts as one position.
            self._positions[index] = end if event.token_ids else end + 1
        elif isinstance(event, ChoiceFinished):
            index = prompt * self._num_choices + event.choice
            # Past the tail, had there been one: after the end there is nothing to send again.
            self._positions[index] = event.position + 2

    @property
    def event_id(self) -> str:
        """The id that the client sends back as `Last-Event-ID`."""
        return f"{self._request_id}:{','.join(map(str, self._positions))}"


def parse_event_id(text: str) -> tuple[str, list[int]]:
    """Read a `Last-Event-ID`.

    Returns:
        The request id and the positions.

    Raises:
        InvalidRequest: It is none of this server's.
    """
    # From the right: an id of the client's own choice may hold colons.
    request_id, _, numbers = text.rpartition(":")
    parts = numbers.split(",")
    if (
        not request_id
        or len(parts) > MAX_POSITIONS
        # `int` of a very long number would take its time.
        or not all(p.isascii() and p.isdigit() and len(p) < 8 for p in parts)
    ):
        raise InvalidRequest(
            "Last-Event-ID", "is not an event id of this server; send the last one received"
        )
    return request_id, [int(p) for p in parts]


def split_positions(positions: list[int], num_prompts: int) -> list[tuple[int, ...]]:
    """Give each prompt its choices' positions.

    Raises:
        InvalidRequest: Their number is no multiple of the prompts.
    """
    share, rest = divmod(len(positions), num_prompts)
    if rest or not share:
        raise InvalidRequest(
            "Last-Event-ID", f"has {len(positions)} positions, the body has {num_prompts} prompts"
        )
    return [tuple(positions[i * share : (i + 1) * share]) for i in range(num_prompts)]


def check_resume(
    request_id: str,
    positions: Sequence[int],
    tokens: Sequence[Sequence[int]],
    sampling: SamplingParams,
    vocabulary_size: int,
) -> None:
    """Refuse to resume at positions, or from tokens, that the request cannot have.

    Args:
        request_id: The client's; empty if it sent none.
        positions: One for each choice; empty: the request starts anew.
        tokens: The tokens of each choice, if the client sent them.
        sampling: The request's.
        vocabulary_size: Of the model.

    Raises:
        InvalidRequest: Names the field.
    """
    if not positions:
        return
    if not request_id:
        raise InvalidRequest("request_id", "is missing; a stream is resumed by the id it had")
    if len(positions) != sampling.n:
        raise InvalidRequest(
            "resume_from", f"has {len(positions)} positions, the request has n={sampling.n}"
        )
    # Two more than tokens: the tail and the end are positions, too.
    if max(positions) > sampling.max_tokens + 2:
        raise InvalidRequest(
            "resume_from",
            f"has position {max(positions)}, max_tokens is {sampling.max_tokens}; send the same "
            "request",
        )
    if not tokens:
        return
    if len(tokens) != sampling.n:
        raise InvalidRequest(
            "resume_from.tokens", f"has {len(tokens)} choices, the request has n={sampling.n}"
        )
    for choice, position in zip(tokens, positions, strict=True):
        if len(choice) > min(position, sampling.max_tokens) or not all(
            0 <= token_id < vocabulary_size for token_id in choice
        ):
            raise InvalidRequest(
                "resume_from.tokens",
                "has more tokens than positions, or one outside the vocabulary",
            )
