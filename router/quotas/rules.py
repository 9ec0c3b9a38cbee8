"""Who is refused, with when to come back and what to do.

Owns the rules over one ledger, and their words. Pure. Does not know stores or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from core.errors import InvalidRequest, RateLimited
from router.quotas.ledger import (
    NOTHING,
    Amount,
    Ledger,
    fits,
    less,
    reset_s,
    share_of,
    total,
    wait_s,
)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Whether routers can compare what they have granted."""

    num_routers: int
    is_share_only: bool
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
    by_second = ledger.by_second(now_ms // 1000)
    used = total(by_second.values())
    over_share = (
        _over_share(ledger, amount, limits, sharing, now_ms) if sharing.is_share_only else None
    )
    if fits(used, amount, limits):
        return over_share
    retry_after_s = wait_s(by_second, amount, limits, now_ms / 1000)
    if over_share is not None:  # it has to fit into both
        retry_after_s = max(retry_after_s, over_share.retry_after_s)
    return RateLimited(
        f"{_over_limit(used, amount, limits)}; {_try_again(retry_after_s)}", retry_after_s
    )


def standing(ledger: Ledger, limits: Amount, sharing: Sharing, now_ms: int) -> Standing:
    """Return how a key stands."""
    second = now_ms // 1000
    left = less(limits, ledger.used(second))
    if sharing.is_share_only:
        share = less(share_of(limits, sharing.num_routers), ledger.own_used(second))
        left = Amount(*map(min, left, share))
    return Standing(limits, left, reset_s(ledger.by_second(second), now_ms / 1000))


def _over_share(
    ledger: Ledger, amount: Amount, limits: Amount, sharing: Sharing, now_ms: int
) -> RateLimited | None:
    """Refuse what this router may not grant by itself; None if it may."""
    by_second = ledger.by_second(now_ms // 1000, ledger.router)
    used = total(by_second.values())
    share = share_of(limits, sharing.num_routers)
    # The first one always passes: the share of a small limit may be less than any request.
    if used == NOTHING or fits(used, amount, share):
        return None
    if fits(NOTHING, amount, share):
        retry_after_s = wait_s(by_second, amount, share, now_ms / 1000)
    else:
        retry_after_s = max(reset_s(by_second, now_ms / 1000))
    if sharing.ends_s is not None:
        retry_after_s = min(retry_after_s, sharing.ends_s)
    return RateLimited(
        "routers cannot compare their counts now, and this one has granted its share of what this "
        f"key may use, {used.requests} requests and {used.tokens} tokens; "
        f"{_try_again(retry_after_s)}",
        retry_after_s,
    )


def _over_limit(used: Amount, amount: Amount, limits: Amount) -> str:
    if limits.requests and used.requests + amount.requests > limits.requests:
        return (
            f"this key has made {used.requests} requests in the last minute, the limit is "
            f"{limits.requests}"
        )
    return (
        f"this key has used {used.tokens} tokens in the last minute and this request may use "
        f"{amount.tokens}, the limit is {limits.tokens}"
    )


def _try_again(retry_after_s: float) -> str:
    # Rounded up, as `Retry-After`: whoever comes sooner is refused again.
    return f"try again in {max(1, ceil(retry_after_s))} s"
