"""What a reply costs its key: charged before it runs, settled when its last request has ended.

Owns the cost of requests and the limits of keys. Does not know servers, or where quotas are kept.

A charge is the prompt and the most output that may come of it: `max_tokens`, for each choice. For a
client that names none it is an estimate; what comes beyond it is charged at the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from core.errors import DeadlineExceeded, InvalidRequest, RateLimited
from core.types import GenerateRequest, RequestEnded
from router.access.identities import Identity
from router.quota_headers import quota_headers
from router.quotas.account import Charge
from router.quotas.ledger import NOTHING, Amount
from router.quotas.quotas import Quotas
from router.request_params import RequestParams
from router.tiers import Tiers

ESTIMATED_OUTPUT_TOKENS = 1024
"""Of a choice whose length the client leaves open."""
ANYBODY = "anybody"
"""Stands for the key on a cluster without keys."""


@dataclass(frozen=True, slots=True)
class ReplyCost:
    """What a reply has cost its key, once all of its requests have ended."""

    charged: Amount
    """Before it ran, beside what was paid."""
    paid: Amount
    """By earlier runs of the same request."""
    used: Amount
    """What was charged and paid beyond it is refunded."""
    num_requests: int
    """Of the reply."""

    def shown(self) -> dict[str, Any]:
        """Return it as JSON shows it."""
        amounts = {"charged": self.charged, "paid": self.paid, "used": self.used}
        tree = {name: amount._asdict() for name, amount in amounts.items()}
        return {**tree, "num_requests": self.num_requests}


class ReplyCharge:
    """What one reply was charged, until its requests have ended."""

    def __init__(
        self,
        quotas: Quotas,
        key: str,
        charge: Charge | None,
        num_requests: int,
        let_go: Callable[[], None],
    ) -> None:
        """Settle `charge`, if there is one, and let go what is held when so many have ended."""
        self._quotas = quotas
        self._key = key
        self._charge = charge
        # Also if nobody ever opens its requests: a client may leave in the moment in between.
        self._let_go = weakref.finalize(self, let_go)
        self._num_requests = num_requests
        self._num_open = num_requests
        self._num_ran = 0
        self._used_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Charged before it runs; 0 for a key that has no quota."""
        return 0 if self._charge is None else self._charge.amount.tokens

    def request_ended(self, ended: RequestEnded | None) -> ReplyCost | None:
        """Count what a request has used; None: it never began.

        Returns:
            What the reply has cost, once the last of its requests has ended; None for a key that
            has no quota.
        """
        used = used_tokens(ended)
        self._used_tokens += used
        self._num_ran += used > 0
        self._num_open -= 1
        if self._num_open:
            return None
        self._let_go()
        charge = self._charge
        if charge is None:
            return None
        total = Amount(min(1, self._num_ran), self._used_tokens)
        self._quotas.settle(self._key, charge, total)
        return ReplyCost(charge.amount, charge.paid, total, self._num_requests)


class Charging:
    """Charges replies to the keys that ask for them."""

    def __init__(self, quotas: Quotas, tiers: Tiers) -> None:
        """Charge by the limits of `tiers`; `start` begins to share counts with other routers."""
        self._quotas = quotas
        self._tiers = tiers
        self._at_once: Counter[str] = Counter()
        """Tokens that requests of each key may use, from their charge to their end."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Keep this router's counts and those of others equal, if any tier has a limit."""
        if any(self._limits(name) != NOTHING for name in self._tiers.by_name):
            self._task = asyncio.get_running_loop().create_task(self._quotas.run())

    async def stop(self) -> None:
        """Count alone from here on; charges can still be settled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def charge(
        self,
        all_params: Sequence[RequestParams],
        made: Sequence[GenerateRequest],
        *,
        is_resumable: bool = False,
    ) -> ReplyCharge | None:
        """Charge a reply before its requests run, by the limits of its key's own tier.

        Args:
            all_params: What one caller has asked for, in one call.
            made: The requests made of that, one each; at least one.
            is_resumable: The client learns the first one's id, and may come back with it: that is
                the same request, as if the client had named it.

        Returns:
            What hears of every request's end; None for a key without limits.

        Raises:
            InvalidRequest: It would not fit into an empty minute, or beside nothing else.
            RateLimited: It does not fit now.
        """
        first = all_params[0]
        limits = self._limits(first.identity.tier)
        at_once = self._limit_at_once(first.identity.tier)
        if limits == NOTHING and not at_once:
            return None
        key = first.identity.key or ANYBODY
        limit = min(filter(None, (limits.tokens, at_once)), default=0)
        tokens = sum(
            _most_tokens(request, params, limit)
            for params, request in zip(all_params, made, strict=True)
        )
        let_go = self._hold(key, tokens, at_once)
        if limits == NOTHING:
            return ReplyCharge(self._quotas, key, None, len(made), let_go)
        request_id = first.request_id or (made[0].request_id if is_resumable else "")
        try:
            charge = await self._quotas.charge(
                key, limits, Amount(1, tokens), _name_of(request_id, made)
            )
        except BaseException:
            let_go()
            raise
        return ReplyCharge(self._quotas, key, charge, len(made), let_go)

    def _hold(self, key: str, tokens: int, limit: int) -> Callable[[], None]:
        """Count tokens as held at once; what is returned ends that."""
        if not limit:
            return lambda: None
        if tokens > limit:
            raise InvalidRequest(
                "max_tokens",
                f"may use {tokens} tokens with the prompt, the key's limit at once is {limit}; "
                "ask for less output or send fewer prompts",
            )
        held = self._at_once[key]
        if held + tokens > limit:
            raise RateLimited(
                f"requests of this key that run or wait may use {held} tokens, this one {tokens}, "
                f"the limit at once is {limit}; try again when one of them has ended"
            )
        self._at_once[key] += tokens

        def let_go() -> None:
            self._at_once[key] -= tokens
            if not self._at_once[key]:
                del self._at_once[key]

        return let_go

    def headers(self, identity: Identity) -> dict[str, str]:
        """Return how a key stands to its limits, as reply headers; empty for one without."""
        limits = self._limits(identity.tier)
        if limits == NOTHING:
            return {}
        return quota_headers(self._quotas.standing(identity.key or ANYBODY, limits))

    def _limit_at_once(self, tier: str) -> int:
        found = self._tiers.by_name.get(tier)
        return 0 if found is None else found.tokens_at_once

    def _limits(self, tier: str) -> Amount:
        found = self._tiers.by_name.get(tier)
        if found is None:  # nobody's: the call was refused before its key was known
            return NOTHING
        return Amount(found.requests_per_minute, found.tokens_per_minute)


def used_tokens(ended: RequestEnded | None) -> int:
    """Return what a request has used: nothing if it never ran, or failed by our fault."""
    if ended is None:
        return 0
    error = ended.error
    if error is not None:
        is_ours = error.http_status >= HTTPStatus.INTERNAL_SERVER_ERROR
        # A deadline is the client's to choose: up to it, the work was done.
        if not ended.timing.path or (is_ours and not isinstance(error, DeadlineExceeded)):
            return 0
    return ended.usage.prompt_tokens + ended.usage.completion_tokens


def _name_of(request_id: str, made: Sequence[GenerateRequest]) -> str:
    """Name what a client asks for under its id; empty: it gave none.

    Another prompt, or other parameters, under the same id are another request: it would be free.
    """
    if not request_id:
        return ""
    content = hashlib.blake2b(digest_size=16)
    for request in made:
        content.update(repr((len(request.token_ids), request.sampling, request.seed)).encode())
        content.update(array("q", request.token_ids).tobytes())
    return f"{request_id}:{content.hexdigest()}"


def _most_tokens(request: GenerateRequest, params: RequestParams, limit: int) -> int:
    """Return what a request may use at most, or an estimate if its client leaves that open."""
    num_prompt = len(request.token_ids)
    sampling = request.sampling
    if "max_tokens" in params.sampling:
        return num_prompt + sampling.max_tokens * sampling.n
    estimate = num_prompt + min(sampling.max_tokens, ESTIMATED_OUTPUT_TOKENS) * sampling.n
    # An estimate keeps nobody out for good; a prompt that leaves room for no output does.
    return max(num_prompt + 1, min(estimate, limit)) if limit else estimate
