"""How far a client is in its stream, so that it can come back, to any router.

Owns the positions of every choice and their form as an SSE event id, `request-id:12,7`: for each
choice, of each prompt in turn, how many output tokens the client has; one more with the tail (text
that no token brought), two more with the end. Does not know streams.
"""

from __future__ import annotations

from core.errors import InvalidRequest
from core.types import ChoiceFinished, RequestEvent, TextDelta

MAX_POSITIONS = 4096


class Progress:
    """Positions of one reply, updated by what is sent."""

    def __init__(self, request_id: str, num_choices: int, positions: list[int]) -> None:
        """Begin where the client is.

        Args:
            request_id: Of the first prompt's request.
            num_choices: Of each prompt.
            positions: One for each choice of each prompt.
        """
        self._request_id, self._num_choices, self._positions = request_id, num_choices, positions

    def note(self, prompt: int, event: RequestEvent) -> None:
        """Count an event as sent."""
        if isinstance(event, TextDelta):
            end = event.position + len(event.token_ids)
            self._positions[prompt * self._num_choices + event.choice] = (
                end if event.token_ids else end + 1
            )
        elif isinstance(event, ChoiceFinished):
            index = prompt * self._num_choices + event.choice
            self._positions[index] = event.position + 2

    @property
    def event_id(self) -> str:
        """What the client sends back as `Last-Event-ID`."""
        return f"{self._request_id}:{','.join(map(str, self._positions))}"


def parse_event_id(text: str) -> tuple[str, list[int]]:
    """Read a `Last-Event-ID`.

    Returns:
        The request id and the positions.

    Raises:
        InvalidRequest: Not one of ours.
    """
    request_id, _, numbers = text.rpartition(":")
    parts = numbers.split(",")
    if (
        not request_id
        or len(parts) > MAX_POSITIONS
        or not all(p.isascii() and p.isdigit() and len(p) < 8 for p in parts)
    ):
        raise InvalidRequest(
            "Last-Event-ID", "is not an event id of this server; send the last one received"
        )
    return request_id, [int(p) for p in parts]


def split_positions(positions: list[int], num_prompts: int) -> list[tuple[int, ...]]:
    """Give each prompt its choices' positions.

    Raises:
        InvalidRequest: They cannot be shared out evenly.
    """
    share, rest = divmod(len(positions), num_prompts)
    if rest or not share:
        raise InvalidRequest(
            "Last-Event-ID", f"has {len(positions)} positions, the body has {num_prompts} prompts"
        )
    return [tuple(positions[i * share : (i + 1) * share]) for i in range(num_prompts)]
