"""Prompt tokens that a reply reports as cached: those that nobody computed for it."""

import asyncio

import pytest
from support.virtual import PD, ask, expected, run, unit

from core.config import PlacementConfig
from core.session import Role

LOCAL = PlacementConfig(path="local")
SAMPLING = {"max_tokens": 30, "ignore_eos": True}
WHOLE = 56
"""Of 59 tokens in blocks of 4: the last one is always computed."""


def cached(ended):
    assert ended.error is None and ended.timing.cached_tokens == ended.usage.cached_tokens
    return ended.usage.cached_tokens


@pytest.mark.parametrize("rules", [PD, LOCAL], ids=["pd", "local"])
def test_a_prompt_that_comes_again_is_cached_but_for_its_last_tokens(rules):
    async def scenario(cluster):
        return [cached((await ask(cluster, name))[1]) for name in ("first", "second")]

    assert run(scenario, placement=rules) == [0, WHOLE]


def test_choices_share_one_prompt_which_counts_once():
    async def scenario(cluster):
        found = []
        for name in ("first", "second"):
            ended = (await ask(cluster, name, n=3, temperature=1.0))[1]
            found.append((cached(ended), ended.usage.prompt_tokens))
        return found

    assert run(scenario) == [(0, 59), (WHOLE, 59)]


def test_what_decode_holds_is_not_sent_but_was_computed():
    async def scenario(cluster):
        await ask(cluster, "first")
        unit(cluster, Role.PREFILL).pool.drop_cache()
        ended = (await ask(cluster, "second"))[1]
        return cached(ended), ended.timing.kv_blocks

    assert run(scenario) == (0, 1)


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("rules", [PD, LOCAL], ids=["pd", "local"])
def test_after_a_death_a_request_does_not_count_what_it_computed_itself(rules, is_warm):
    """The second attempt finds the prompt where the first one computed it, output included."""

    async def scenario(cluster):
        if is_warm:
            await ask(cluster, "before", max_tokens=2)
        running = asyncio.get_running_loop().create_task(ask(cluster, **SAMPLING))
        await asyncio.sleep(0.2)
        victim = next(
            node
            for node, u in cluster.units.items()
            if u.descriptor.role is Role.DECODE and u.attempts.by_run
        )
        await cluster.kill(victim)
        tokens, ended = await running
        again = (await ask(cluster, "again", max_tokens=2))[1]
        return tokens, cached(ended), len(ended.timing.attempts), cached(again)

    tokens, found, num_attempts, later = run(scenario, prefill=1, decode=2, placement=rules)
    assert tokens == expected(**SAMPLING)
    assert num_attempts == 2 and found == (WHOLE if is_warm else 0)
    assert later == (WHOLE if rules is PD else later)
