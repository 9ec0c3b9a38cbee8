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


def tokens_of(answer):
    """What has to be equal on any device; log probabilities differ in their last bits."""
    return answer.tokens, answer.text, answer.finish


async def expected_tokens(config):
    """Tokens of each request, asked for alone, and nothing failed."""
    async with ProcessCluster(config) as cluster:
        cluster.make_requests(NUM_REQUESTS)
        await cluster.learn()
        return [tokens_of(answer) for answer in cluster.expected]


@pytest.mark.timeout(300)
async def test_tokens_are_those_of_the_cpu_and_survive_deaths():
    expected = await expected_tokens(config_of())
    async with ProcessCluster(config_of(**ON_CUDA)) as cluster:
        cluster.make_requests(NUM_REQUESTS)
        await cluster.learn()
        assert [tokens_of(answer) for answer in cluster.expected] == expected
        for role in ("decode", "prefill"):
            cluster.answers.clear()
            load = asyncio.create_task(cluster.load(4.0, NUM_REQUESTS))
            await asyncio.sleep(1.5)
            await cluster.kill(role)
            await load
            assert [
                a.error or a.disorder for _, a in cluster.answers if a.error or a.disorder
            ] == []
            assert any(answer.is_affected for _, answer in cluster.answers), role
            for index, answer in cluster.answers:
                assert tokens_of(answer) == expected[index]
            await cluster.wait_whole(timeout_s=120)
        assert await cluster.leaked() == {}


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
