"""What can fit: the context window, the workers' pools, the scores of a prompt.

Owns the refusals of what no worker could ever hold, and their words. Does not know parameters or
text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.errors import InvalidRequest, PromptTooLong
from core.session import WorkerDescriptor
from core.types import SamplingParams


class RequestLimits:
    """The limits on requests to one model."""

    def __init__(
        self,
        max_model_len: int,
        max_prompt_logprobs: int,
        read_workers: Callable[[str], Sequence[WorkerDescriptor]],
    ) -> None:
        """Limit requests.

        Args:
            max_model_len: Prompt plus output (tokens).
            max_prompt_logprobs: Numbers that the scores of one prompt may be.
            read_workers: Lists the live workers that a tier may use, whose room limits a request.
        """
        self._max_model_len = max_model_len
        self._max_prompt_logprobs = max_prompt_logprobs
        self._read_workers = read_workers

    def _limits(self, tier: str, num_choices: int) -> list[tuple[int, str]]:
        """List the limits on prompt plus output (tokens), each with how to raise it."""
        limits = [(self._max_model_len, "")]
        for d in self._read_workers(tier):
            num_tokens = max(0, d.num_blocks - num_choices) * d.block_size_tokens
            remedy = f" A worker's pool holds {d.num_blocks} KV blocks; raise engine.num_blocks."
            limits.append((num_tokens, remedy))
        return limits

    def room(self, tier: str, num_prompt_tokens: int, num_choices: int) -> int:
        """Return the longest output (tokens) that the context and the smallest pool can hold."""
        return max(1, min(self._limits(tier, num_choices))[0] - num_prompt_tokens)

    def check_scores(self, token_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Refuse a prompt with more scores than one reply may have.

        Raises:
            InvalidRequest: Says how many there would be.
        """
        if sampling.prompt_logprobs is None:
            return
        num_scores = len(token_ids) * (sampling.prompt_logprobs + 1)
        limit = self._max_prompt_logprobs
        if num_scores > limit:
            raise InvalidRequest(
                "prompt_logprobs",
                f"of {len(token_ids)} prompt tokens would be {num_scores} numbers, the limit is "
                f"{limit}; ask for fewer, shorten the prompt or raise router.max_prompt_logprobs",
            )

    def check_length(
        self, tier: str, token_ids: Sequence[int], sampling: SamplingParams, prompt_field: str
    ) -> None:
        """Refuse what no worker could ever hold.

        Args:
            tier: The request's: it goes to no worker of others' own pools.
            token_ids: The prompt.
            sampling: The request's.
            prompt_field: What the client calls the prompt.

        Raises:
            PromptTooLong: In the words by which OpenAI's clients recognize it.
        """
        limit, remedy = min(self._limits(tier, sampling.n))
        total = len(token_ids) + sampling.max_tokens
        if total > limit:
            raise too_long(
                limit,
                f"you requested {total} tokens ({len(token_ids)} in the {prompt_field}, "
                f"{sampling.max_tokens} in the completion). Please reduce the length of the "
                f"{prompt_field} or completion.{remedy}",
            )


def check_prompt(token_ids: Sequence[int], tier: str, limit_tokens: int) -> None:
    """Refuse a prompt that is longer than its tier takes; 0: no limit.

    Raises:
        PromptTooLong: Names the tier and its limit.
    """
    if limit_tokens and len(token_ids) > limit_tokens:
        raise PromptTooLong(
            f"the prompt has {len(token_ids)} tokens, tier {tier} takes at most {limit_tokens}; "
            "shorten it, or ask for another tier"
        )


def too_long(limit_tokens: int, fact: str) -> PromptTooLong:
    """Make the error with OpenAI's wording, by which clients recognize it."""
    return PromptTooLong(
        f"This model's maximum context length is {limit_tokens} tokens. However, {fact}"
    )
