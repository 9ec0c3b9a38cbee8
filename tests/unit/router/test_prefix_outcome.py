"""What became of a prompt's beginning that was expected at a worker."""

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from core.prefix_changes import StorageTier
from router.prefix_outcome import STALE_CAUSES, Expectation, TokenOutcome

POOL, DISK = StorageTier.POOL, StorageTier.DISK
SIZE = 16


def expectation(num_tokens=161, published=(), num_expected=0, num_elsewhere=0):
    return Expectation(
        worker="w",
        block_hashes=(),
        block_size_tokens=SIZE,
        num_tokens=num_tokens,
        tiers=published,
        num_expected=max(num_expected, len(published)),
        num_elsewhere=num_elsewhere,
    )


def tokens(outcome):
    return {name.value: count for name, count in outcome.tokens.items() if count}


def never() -> int:
    raise AssertionError("what was found needs no second look at the view")


def test_what_was_expected_and_found_is_a_hit_by_the_tier_in_which_it_was_known():
    found = expectation(published=[POOL] * 4 + [DISK] * 3).outcome(8 * SIZE, never)
    assert tokens(found) == {"hit": 128, "not_cached": 33} and found.cause is None
    assert found.hit_tokens == {"pool": 64, "disk": 48, "unpublished": 16}


def test_the_last_token_is_expected_of_nobody():
    found = expectation(num_tokens=160, published=[POOL] * 10).outcome(9 * SIZE, never)
    assert tokens(found) == {"hit": 144, "not_cached": 16} and found.cause is None


def test_what_was_not_found_had_gone_or_was_never_there_or_had_not_come():
    """Seven blocks were published and nine expected; so many are found, so many are left."""
    expected = expectation(published=[POOL] * 7, num_expected=9)
    for num_found, num_now, cause, num_lost in (
        (9, 9, None, 0),
        (8, 8, TokenOutcome.UNFINISHED, 1),
        (7, 7, TokenOutcome.UNFINISHED, 2),
        (3, 3, TokenOutcome.EVICTED, 6),
        (3, 0, TokenOutcome.EVICTED, 6),
        (3, 4, TokenOutcome.STALE, 6),
        (0, 7, TokenOutcome.STALE, 9),
    ):
        found = expected.outcome(num_found * SIZE, partial(int, num_now))
        assert found.cause is cause, (num_found, num_now)
        assert sum(found.tokens[name] for name in STALE_CAUSES) == num_lost * SIZE


def test_what_another_worker_holds_beyond_that_is_elsewhere():
    found = expectation(published=[POOL] * 2, num_elsewhere=6).outcome(2 * SIZE, never)
    assert tokens(found) == {"hit": 32, "elsewhere": 64, "not_cached": 65}


@given(
    num_tokens=st.integers(1, 400),
    num_published=st.integers(0, 30),
    num_expected=st.integers(0, 30),
    num_elsewhere=st.integers(0, 30),
    num_found=st.integers(0, 600),
    num_now=st.integers(0, 30),
)
def test_outcomes_add_up_to_the_prompt(
    num_tokens, num_published, num_expected, num_elsewhere, num_found, num_now
):
    expected = expectation(num_tokens, [DISK] * num_published, num_expected, num_elsewhere)
    found = expected.outcome(num_found, partial(int, num_now))
    assert sum(found.tokens.values()) == num_tokens and min(found.tokens.values()) >= 0
    assert sum(found.hit_tokens.values()) == found.tokens[TokenOutcome.HIT]
    assert min(found.hit_tokens.values()) >= 0
    assert (found.cause is None) == (not any(found.tokens[name] for name in STALE_CAUSES))
