"""How many tokens the next step may compute, so that no step looks like a hang.

Owns the budget: the configured one, or less while steps take too long. Does not know sequences.
"""

from __future__ import annotations

from engine.scheduling.block_tables import Limits

MAX_STEP_S = 0.5
TARGET_STEP_S = 0.4
MIN_STEP_TOKENS = 16


class StepBudget:
    """The token budget of the next step."""

    def __init__(self, limits: Limits) -> None:
        """Start with the configured budget."""
        self._limits = limits
        self.num_tokens = limits.max_step_tokens
        self.token_s = 0.0
        """What a token of a prompt takes (seconds), as measured; 0: not yet."""

    def fit(self, num_tokens: int, took_s: float) -> None:
        """Learn from a step.

        Args:
            num_tokens: Tokens of the step that just ended.
            took_s: How long it took (seconds).
        """
        # In a small step the share that does not grow with its tokens would count for each.
        if num_tokens >= MIN_STEP_TOKENS:
            token_s = took_s / num_tokens
            self.token_s += (token_s - self.token_s) / 4 if self.token_s else token_s
        if took_s > MAX_STEP_S:
            # Long steps take time in proportion to their tokens, nearly.
            fitting = int(num_tokens * TARGET_STEP_S / took_s)
            # Never below what lets every running sequence decode one token, and a prompt go on.
            floor = min(self._limits.max_step_tokens, self._limits.max_sequences + MIN_STEP_TOKENS)
            self.num_tokens = max(min(self.num_tokens, fitting), floor)
        # Only a step that was full shows that more would fit.
        elif took_s < TARGET_STEP_S / 2 and num_tokens >= self.num_tokens:
            self.num_tokens = min(self.num_tokens * 2, self._limits.max_step_tokens)
