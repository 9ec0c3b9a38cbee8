"""What became of a prompt's beginning: expected at a worker, and found there or not.

Owns the comparison and the names of its results, which the metrics count. Does not know who is
asked, nor how blocks are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from core.block_hash import BlockHash
from core.ids import WorkerId
from core.prefix_changes import StorageTier

UNPUBLISHED = "unpublished"
"""Tier of what a worker found and had not published: it was computed a moment before."""
HIT_TIERS = (*(tier.label for tier in StorageTier), UNPUBLISHED)


class TokenOutcome(StrEnum):
    """What became of a prompt token; those of a prompt add up to its length."""

    HIT = "hit"
    EVICTED = "evicted"
    """The worker had it when the router looked, and has told since that it is gone."""
    UNFINISHED = "unfinished"
    """Another prompt was to bring it there, and was not done, or ended early."""
    STALE = "stale"
    """The view has it there still: it is late, has gaps, or holds what is not true."""
    ELSEWHERE = "elsewhere"
    """Another worker had it; this one was cheaper all the same."""
    NOT_CACHED = "not_cached"
    """Nobody in this scope was known to have it. Who has it in another scope cannot be known."""


STALE_CAUSES = (TokenOutcome.EVICTED, TokenOutcome.UNFINISHED, TokenOutcome.STALE)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a router thinks a worker holds of a prompt that it sends there."""

    worker: WorkerId
    block_hashes: Sequence[BlockHash]
    block_size_tokens: int
    num_tokens: int
    """Of the prompt."""
    tiers: Sequence[StorageTier]
    """Of each leading block that the worker has published."""
    num_expected: int
    """Leading blocks, with those that prompts on their way will bring."""
    num_elsewhere: int
    """Leading blocks that the best of all workers holds."""

    def tokens(self, num_blocks: int) -> int:
        """Tokens of so many leading blocks that need not be computed: never the last one."""
        size = self.block_size_tokens
        return min(num_blocks, (self.num_tokens - 1) // size) * size

    def outcome(self, num_found_tokens: int, count_published: Callable[[], int]) -> PromptOutcome:
        """Compare with what the worker found.

        Args:
            num_found_tokens: Of the prompt, as the worker reports.
            count_published: Counts the leading blocks that the view has at the worker after its
                answer; called only if it found less than was expected.
        """
        found = min(num_found_tokens, self.num_tokens)
        tokens: Counter[TokenOutcome] = Counter({TokenOutcome.HIT: found})
        expected = self.tokens(self.num_expected)
        cause = None
        if found < expected:
            cause = self._cause(found, count_published)
            tokens[cause] = expected - found
        known = max(found, expected)
        tokens[TokenOutcome.ELSEWHERE] = max(0, self.tokens(self.num_elsewhere) - known)
        left = self.num_tokens - known - tokens[TokenOutcome.ELSEWHERE]
        tokens[TokenOutcome.NOT_CACHED] = left
        num_blocks = found // self.block_size_tokens
        hits = Counter(self.tiers[:num_blocks])
        by_tier = {tier.label: count * self.block_size_tokens for tier, count in hits.items()}
        by_tier[UNPUBLISHED] = found - sum(by_tier.values())
        return PromptOutcome(tokens, by_tier, cause)

    def _cause(self, found: int, count_published: Callable[[], int]) -> TokenOutcome:
        if self.tokens(len(self.tiers)) <= found:
            return TokenOutcome.UNFINISHED
        if self.tokens(count_published()) <= found:
            return TokenOutcome.EVICTED
        return TokenOutcome.STALE


@dataclass(frozen=True, slots=True)
class PromptOutcome:
    """What became of one prompt."""

    tokens: Mapping[TokenOutcome, int]
    hit_tokens: Mapping[str, int] = field(default_factory=dict)
    """Those that were found, by the storage tier in which the router knew them."""
    cause: TokenOutcome | None = None
    """Why the worker held less than was expected; None: it did not."""
