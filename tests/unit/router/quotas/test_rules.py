"""Whom the rules over one ledger refuse, and what they tell."""

from math import ceil

import pytest

from router.quotas.ledger import Amount, Ledger
from router.quotas.rules import Sharing, refusal

LIMITS = Amount(0, 1000)
TOGETHER = Sharing(2, is_share_only=False)
SHARE_ONLY = Sharing(2, is_share_only=True)


def ledger_with(tokens):
    """One in which this router has charged so much in second 10, which counts until 71."""
    made = Ledger("a")
    made.charge(10, Amount(1, tokens))
    return made


@pytest.mark.parametrize(("sharing", "tokens"), [(TOGETHER, 1000), (SHARE_ONLY, 500)])
@pytest.mark.parametrize(("now_ms", "told_s"), [(20_600, 51), (20_400, 51), (21_000, 50)])
def test_a_message_names_the_wait_of_retry_after_and_never_a_shorter_one(
    sharing, tokens, now_ms, told_s
):
    error = refusal(ledger_with(tokens), Amount(1, 1), LIMITS, sharing, now_ms)
    assert error.message.endswith(f"try again in {told_s} s")
    assert ceil(error.retry_after_s) == told_s


def test_who_is_over_the_limit_is_told_of_that_and_not_of_a_share():
    error = refusal(ledger_with(1000), Amount(1, 1), LIMITS, SHARE_ONLY, 20_000)
    assert "used 1000 tokens" in error.message and "share" not in error.message


def test_a_share_ends_when_routers_can_compare_again():
    sharing = Sharing(2, is_share_only=True, ends_s=1.5)
    error = refusal(ledger_with(500), Amount(1, 1), LIMITS, sharing, 20_000)
    assert error.retry_after_s == 1.5 and error.message.endswith("try again in 2 s")


def test_a_client_is_told_when_its_request_fits_into_limit_and_share():
    """Into the limit at 71, when a second has left the window, into the share at 91."""
    ledger = ledger_with(100)
    ledger.charge(30, Amount(1, 400))
    other = Ledger("b")
    other.charge(10, Amount(1, 500))
    ledger.merge(other.slots, {})
    error = refusal(ledger, Amount(1, 200), LIMITS, SHARE_ONLY, 31_000)
    assert "used 1000 tokens" in error.message
    assert error.retry_after_s == 91 - 31 and error.message.endswith("try again in 60 s")
    assert refusal(ledger, Amount(1, 200), LIMITS, SHARE_ONLY, 90_999) is not None
    assert refusal(ledger, Amount(1, 200), LIMITS, SHARE_ONLY, 91_000) is None


def test_what_no_share_holds_waits_until_all_of_it_is_free():
    ledger = ledger_with(1)
    ledger.charge(15, Amount(1, 1))
    error = refusal(ledger, Amount(1, 501), LIMITS, SHARE_ONLY, 20_000)
    assert error.retry_after_s == 15 + 61 - 20
    assert refusal(Ledger("a"), Amount(1, 501), LIMITS, SHARE_ONLY, 20_000) is None
