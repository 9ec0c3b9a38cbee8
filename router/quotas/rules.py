"""Who is refused, with when to come back and what to do.

Owns the rules over one ledger, and their words. Pure. Does not know stores or requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidRequest, RateLimited
from router.quotas.ledger import (
    NOTHING,
    Amount,
    Ledger,
    fits,
    less,
    reset_s,
    share_of,
    wait_s,
)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Whether routers can compare what they have granted."""

    num_routers: int
    is_alone: bool
    """They cannot: each grants no more than its share."""
    ends_s: float | None = None
    """When they will again, if that is known."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a key stands to its limits now."""

    limits: Amount
    left: Amount
    reset_s: tuple[float, float]
    """When all requests, and all tokens, will have left the window."""


def check_ever_fits(amount: Amount, limits: Amount) -> None:
    """Refuse what would not fit into an empty minute.

    Raises:
        InvalidRequest: Names the numbers.
    """
    if not fits(NOTHING, amount, limits):
        raise InvalidRequest(
            "max_tokens",
            f"is too large for this key: prompt and output may be {amount.tokens} tokens, the "
            f"limit is {limits.tokens} a minute; ask for less output, or shorten the prompt",
        )


def refusal(
    ledger: Ledger, amount: Amount, limits: Amount, sharing: Sharing, now_ms: int
) -> RateLimited | None:
    """Return the error for a charge that does not fit now; None if it does."""
    second, now_s = now_ms // 1000, now_ms / 1000
    counted = ledger.by_second(second)
    if not fits(ledger.used(second), amount, limits):
        late_s = wait_s(counted, amount, limits, now_s)
        return RateLimited(_over(ledger.used(second), amount, limits, late_s), late_s)
    own = ledger.own_used(second)
    share = share_of(limits, sharing.num_routers)
    # The first one always passes: the share of a small limit may be less than any request.
    if not sharing.is_alone or own == NOTHING or fits(own, amount, share):
        return None
    mine = ledger.by_second(second, ledger.router)
    late_s = (
        wait_s(mine, amount, share, now_s)
        if fits(NOTHING, amount, share)
        else max(reset_s(mine, now_s))
    )
    if sharing.ends_s is not None:
        late_s = min(late_s, sharing.ends_s)
    return RateLimited(
        "routers cannot compare their counts now, and this one has granted its share of what this "
        f"key may use, {own.requests} requests and {own.tokens} tokens; {_come_back(late_s)}",
        late_s,
    )


def standing(ledger: Ledger, limits: Amount, sharing: Sharing, now_ms: int) -> Standing:
    """Return how a key stands."""
    second = now_ms // 1000
    left = less(limits, ledger.used(second))
    if sharing.is_alone:
        share = less(share_of(limits, sharing.num_routers), ledger.own_used(second))
        left = Amount(*map(min, left, share))
    return Standing(limits, left, reset_s(ledger.by_second(second), now_ms / 1000))


def _over(used: Amount, amount: Amount, limits: Amount, late_s: float) -> str:
    if limits.requests and used.requests + amount.requests > limits.requests:
        fact = (
            f"this key has made {used.requests} requests in the last minute, the limit is "
            f"{limits.requests}"
        )
    else:
        fact = (
            f"this key has used {used.tokens} tokens in the last minute and this request may use "
            f"{amount.tokens}, the limit is {limits.tokens}"
        )
    return f"{fact}; {_come_back(late_s)}"


def _come_back(late_s: float) -> str:
    return f"try again in {max(1, round(late_s))} s"
