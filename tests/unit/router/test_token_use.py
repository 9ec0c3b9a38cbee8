"""Turns by tokens: who asks for longer answers has fewer of them."""

import asyncio

import pytest
from support.admission import in_tier

from core.config import TierConfig
from router.admission import Admission
from router.token_use import MAX_TENANTS, TokenUse


def test_until_something_has_ended_every_request_is_one_turn():
    use = TokenUse()
    assert use.turns("a", 5_000) == 1.0
    use.ended("a", 10, 10)
    assert use.turns("b", 5_000) == 1.0


def test_a_request_counts_with_the_output_that_its_tenants_last_ones_had():
    use = TokenUse()
    for _ in range(200):
        use.ended("short", 20, 10)
        use.ended("long", 20, 70)
    assert round(use.turns("long", 20) / use.turns("short", 20), 1) == 3.0
    assert use.turns("long", 80) / use.turns("short", 20) > 4.9
    assert 0.9 < (use.turns("long", 20) + use.turns("short", 20)) / 2 < 1.1


def test_what_changes_is_learned():
    use = TokenUse()
    for output in [10] * 100 + [100] * 100:
        use.ended("a", 0, output)
        use.ended("b", 0, 10)
    assert use.turns("a", 0) / use.turns("b", 0) > 9


def test_nothing_is_free_and_nothing_grows():
    use = TokenUse()
    for number in range(MAX_TENANTS + 5):
        use.ended(f"t{number}", 0, 0)
    assert use.turns(f"t{MAX_TENANTS}", 0) == 1.0
    assert len(use._output_tokens) == MAX_TENANTS and "t4" not in use._output_tokens


@pytest.mark.parametrize("num_clients", [4, 2], ids=["4", "2"])
async def test_tenants_share_a_tier_by_tokens_and_not_by_requests(num_clients):
    """Of two clients one runs: a tenant with one request waiting leaves the queue each time."""
    admission, tokens = Admission(1, 99, 60.0, tiers={"one": TierConfig()}), {"s": 0, "l": 0}
    output = {"s": 9, "l": 39}
    ends = asyncio.Event()

    async def client(tenant):
        while not ends.is_set():
            async with admission.permit(
                in_tier("one", tenant), count_output=lambda: output[tenant]
            ):
                tokens[tenant] += 1 + output[tenant]
                await asyncio.sleep(0)
            if sum(tokens.values()) > 40_000:
                ends.set()

    await asyncio.gather(*(client(tenant) for tenant in "sl" * num_clients))
    assert 0.9 < tokens["s"] / tokens["l"] < 1.1
