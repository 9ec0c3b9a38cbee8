"""What tokens cost a caller.

Owns the prices of a tier and their arithmetic. Does not know tiers or who pays.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prices:
    """What a million tokens cost a caller, in the operator's currency."""

    prompt_per_mtok: float
    cached_per_mtok: float
    """Those of the prompt that a prefix cache had."""
    output_per_mtok: float

    def cost(self, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> float:
        """Return what a request costs; the cached tokens are among those of the prompt."""
        prompt = (prompt_tokens - cached_tokens) * self.prompt_per_mtok
        cached = cached_tokens * self.cached_per_mtok
        return (prompt + cached + output_tokens * self.output_per_mtok) / 1_000_000
