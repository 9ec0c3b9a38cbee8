"""Real processes whose ranks compute on a GPU: the CPU's tokens, handed over and resumed."""

import asyncio

import pytest
import torch
from support.models import TINY
from support.process_cluster import ProcessCluster, config_of

from cluster.local import LocalCluster
from core.errors import ServingError
from engine.checkpoint.model_spec import read_model
from process.shared_memory import available_bytes

ON_CUDA = {
    "pools__prefill__engine__device": "cuda",
    "pools__decode__engine__device": "cuda",
    "placement__path": "pd",
}
NUM_REQUESTS = 16


async def greedy_tokens(config):
    """Tokens of the greedy ones of the requests, asked for alone."""
    async with ProcessCluster(config) as cluster:
        cluster.make_requests(NUM_REQUESTS)
        await cluster.learn()
        return [answer.tokens for answer in cluster.expected[::4]]


@pytest.mark.timeout(300)
async def test_greedy_tokens_are_those_of_the_cpu():
    # Others differ from it where a last bit decides a draw.
    assert await greedy_tokens(config_of(**ON_CUDA)) == await greedy_tokens(config_of())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_streams_survive_deaths_bit_for_bit(dtype):
    async with ProcessCluster(config_of(dtype, **ON_CUDA)) as cluster:
        cluster.make_requests(NUM_REQUESTS)
        await cluster.learn()
        for role in ("decode", "prefill"):
            await kill_until_felt(cluster, role)
        assert await cluster.leaked() == {}


async def kill_until_felt(cluster, role):
    """Kill processes of a role under load, until one of them had requests."""
    num_affected = 0
    while not num_affected:
        cluster.answers.clear()
        load = asyncio.create_task(cluster.load(4.0, NUM_REQUESTS))
        await asyncio.sleep(cluster.rng.uniform(0.6, 2.0))
        await cluster.kill(role)
        await load
        verdict = cluster.verdict()
        assert verdict["wrong"] == [], role
        num_affected = verdict["affected"]
        await cluster.wait_whole(timeout_s=120)


async def test_a_pool_that_does_not_fit_is_refused_with_what_does():
    free_bytes = torch.cuda.mem_get_info()[0]
    layout = read_model(TINY, "float32").layout(16)
    too_many = free_bytes // layout.pool_bytes(1) + 1000
    if (available_bytes() or 0) < 2 * layout.pool_bytes(too_many):
        pytest.skip("the host's memory cannot stage so many blocks")
    config = config_of(**ON_CUDA, pools__decode__engine__num_blocks=too_many)
    with pytest.raises(ServingError, match="blocks"):
        await started(config)


async def test_more_ranks_than_gpus_are_refused_in_words():
    ranks = torch.cuda.device_count() + 1
    if ranks > 2:
        pytest.skip("the tiny model cannot be cut for so many GPUs")
    config = config_of(**ON_CUDA, pools__decode__engine__tensor_parallel_size=ranks)
    with pytest.raises(ServingError, match="one rank a GPU"):
        await started(config)


async def started(config):
    cluster = LocalCluster(config)
    try:
        async with asyncio.timeout(150):
            await cluster.start()
    finally:
        await cluster.stop()
