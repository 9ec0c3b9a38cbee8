"""What a request costs its tenant's turns: its tokens, as far as they can be foreseen.

Owns the usual output of each tenant's requests and the usual size of all. Does not know queues or
prices. (Counting service in tokens is Sheng et al., "Fairness in serving large language models",
OSDI 2024; here a tenant's next request counts with the output that its last ones had, so that
nothing is to be put right when it ends.)
"""

from __future__ import annotations

from collections import OrderedDict

MAX_TENANTS = 4_096
"""Those that came last are known."""
NUM_REMEMBERED = 16
"""Requests over which what is usual is taken, about."""


class TokenUse:
    """Of one tier."""

    def __init__(self) -> None:
        """Start without knowing anything: every request counts alike."""
        self._output_tokens: OrderedDict[str, float] = OrderedDict()
        """Of each tenant's requests, on average."""
        self._num_tokens = 0.0
        """Of all requests, prompt and output, on average; 0: not known."""

    def turns(self, tenant: str, num_prompt_tokens: int) -> float:
        """Return how many usual requests one of this tenant counts for."""
        output = self._output_tokens.get(tenant)
        if output is None or not self._num_tokens:
            return 1.0
        return max(1.0, num_prompt_tokens + output) / self._num_tokens

    def ended(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Note what a request had."""
        usual = self._output_tokens.get(tenant, float(num_output_tokens))
        self._output_tokens[tenant] = _moved(usual, num_output_tokens)
        self._output_tokens.move_to_end(tenant)
        if len(self._output_tokens) > MAX_TENANTS:
            self._output_tokens.popitem(last=False)
        num_tokens = max(1, num_prompt_tokens + num_output_tokens)
        self._num_tokens = _moved(self._num_tokens or num_tokens, num_tokens)


def _moved(average: float, value: float) -> float:
    return average + (value - average) / NUM_REMEMBERED
