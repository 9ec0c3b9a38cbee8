"""How many connections one turn of the event loop accepts, and when it accepts none.

Owns the rule. Does not know sockets or time.

Whoever is being answered needs a little of every turn; each newcomer, refused or not, needs about
as much as many tokens. So turns that newcomers make long get fewer of them, and are followed by a
rest of the same length: at many times a router's capacity those who were admitted keep half of the
loop, and the rest wait in the kernel's queue, where they cost nothing.
"""

from __future__ import annotations

MAX_ACCEPTS = 64
"""In one turn, however short turns are."""
LONG_TURN_S = 0.005
MAX_REST_S = 0.1
"""One very long turn says nothing of those after it."""


class AcceptPace:
    """Halves the number after a long turn, doubles it after a short one."""

    def __init__(self) -> None:
        """Begin as if turns were short."""
        self.num_accepts = MAX_ACCEPTS
        """Most connections to accept in this turn; at least one."""

    def turn_took(self, turn_s: float) -> float:
        """Note how long everybody else's work took in the turn after an accept.

        Returns:
            How long to accept nobody (seconds); 0: go on.
        """
        if turn_s <= LONG_TURN_S:
            self.num_accepts = min(MAX_ACCEPTS, 2 * self.num_accepts)
            return 0.0
        self.num_accepts = max(1, self.num_accepts // 2)
        return min(turn_s, MAX_REST_S)
