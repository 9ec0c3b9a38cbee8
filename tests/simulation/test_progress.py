"""A worker that computes is alive however long its step; one that stands still is not."""

import asyncio

import pytest
from support.virtual import ask, run

from core.config import EngineConfig, PlacementConfig
from core.session import Role

ENGINE = EngineConfig(block_size_tokens=16, num_blocks=64, max_step_tokens=512, max_sequences=16)
PROMPT = tuple(range(1, 90)) * 6
SLOW = {"step_s": 0.01, "token_s": 0.008, "max_model_len": 600, "engine": ENGINE, "decode": 3}


def on(path):
    return {**SLOW, "placement": PlacementConfig(path=path)}


@pytest.mark.parametrize("path", ["pd", "local"])
def test_a_step_that_makes_progress_is_no_hang_however_long_it_takes(path):
    """512 tokens take 4.1 s, each layer less than the 3 s after which a worker is hung."""
    longest_s = 0.0

    async def scenario(cluster):
        nonlocal longest_s

        def timed(runner, execute):
            async def timed_execute(plan, on_layer):
                nonlocal longest_s
                began_at = cluster.clock.now_s()
                result = await execute(plan, on_layer)
                longest_s = max(longest_s, cluster.clock.now_s() - began_at)
                return result

            return timed_execute

        for runner in cluster.runners.values():
            runner.execute = timed(runner, runner.execute)
        return await ask(cluster, prompt=PROMPT, max_tokens=3, ignore_eos=True)

    tokens, ended = run(scenario, **on(path))
    assert longest_s > 4
    assert ended.error is None and len(tokens[0]) == 3
    assert ended.timing.attempts == (f"0:{path}:ok",)


@pytest.mark.parametrize("path", ["pd", "local"])
def test_a_step_that_stands_still_is_found_and_the_request_moves(path):
    async def scenario(cluster):
        asking = asyncio.get_running_loop().create_task(
            ask(cluster, prompt=PROMPT[:40], max_tokens=30, ignore_eos=True)
        )
        await asyncio.sleep(0.1)
        stuck = next(
            name
            for name, unit in cluster.units.items()
            if unit.descriptor.role is Role.DECODE and unit.attempts.by_run
        )
        runner = cluster.runners[stuck]
        runner.stuck_for_s = 3600.0
        began_at = cluster.clock.now_s()
        tokens, ended = await asking
        took_s = cluster.clock.now_s() - began_at
        assert runner.num_bitten == 1
        await cluster.kill(stuck)
        return tokens, ended, took_s

    tokens, ended, took_s = run(scenario, **on(path), prefill=2)
    assert ended.error is None and len(tokens[0]) == 30
    assert ended.timing.attempts[0] == f"0:{path}:worker_lost"
    assert 3 < took_s < 15
