"""A pool on a device with a stage in shared memory: here the CPU plays the device,
so every copy that is missing shows.

Two memories, one for compute and one for transfers, as on a GPU; streams and pinning are CUDA's and
run in `benchmarks/gpu.py`.
"""

import asyncio

import numpy as np
import pytest
import torch
from support.in_process_cluster import InProcessCluster, load
from support.models import TINY

from core.config import EngineConfig
from core.errors import ConfigError
from engine.model.attention import AttentionInputs, AttentionRules, dense_attention
from engine.model.device_attention import gathered_attention
from engine.model.kv_pools import StagedPool, runs_of
from engine.ranks.rank_group import RankGroup

pytestmark = pytest.mark.sampled(2)

PROMPTS = [[(7 * n + 3 * k) % 200 + 5 for k in range(40 + 13 * n)] for n in range(4)]
WISHES = [{}, {"temperature": 0.9, "n": 2, "seed": 3}]


def engine(size=1, chunk=32):
    return EngineConfig(
        block_size_tokens=16, num_blocks=96, max_step_tokens=chunk, tensor_parallel_size=size
    )


async def answers(first, second, **how):
    async with InProcessCluster(TINY, engine=first, decode_engine=second, **how) as cluster:
        rounds = []
        for _ in range(2):  # the second round hits the prefix caches of both sides
            replies = await asyncio.gather(
                *(cluster.ask(p, max_tokens=12, **w) for p in PROMPTS for w in WISHES)
            )
            assert [r.ended.error for r in replies] == [None] * len(replies)
            rounds.append([r.tokens for r in replies])
        return rounds


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("transport", ["inproc", "shm"])
async def test_the_hand_over_through_a_stage_is_exact(sizes, transport):
    first, second = engine(sizes[0]), engine(sizes[1])
    expected = await answers(first, second)
    assert await answers(first, second, transport=transport, staged=True) == expected


@pytest.mark.parametrize("missing", ["load_staged_blocks", "_export"])
async def test_a_copy_that_is_left_out_changes_the_answers(missing, monkeypatch):
    """So the test above can fail."""
    expected = await answers(engine(), engine())
    monkeypatch.setattr(StagedPool, missing, lambda *_: None)
    assert await answers(engine(), engine(), staged=True) != expected


def test_neighbours_are_copied_together():
    assert runs_of([7, 3, 4, 5, 9, 8, 4]) == [(3, 6), (7, 10)]
    assert runs_of([]) == []


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_attention_equals_the_oracle(window, dtype):
    """Decoding rows and chunks mixed; what lies in blocks beyond a
    sequence's end is NaN and must not be felt."""
    generator = torch.Generator().manual_seed(3)
    kv = torch.randn(40, 2, 8, 2, 16, generator=generator).to(dtype)
    lengths, counts = [33, 5, 64, 17], [1, 1, 20, 17]
    tables = np.zeros((4, 8), np.int64)
    for s, length in enumerate(lengths):
        num_blocks = -(-length // 8)
        tables[s, :num_blocks] = np.arange(num_blocks) + 8 * s + 1
        kv[tables[s, num_blocks - 1], :, (length - 1) % 8 + 1 :] = float("nan")
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    inputs = AttentionInputs(positions, np.cumsum([0, *counts]), tables)
    q = torch.randn(sum(counts), 4, 16, generator=generator).to(dtype)
    rules = AttentionRules(0.25, window=window)
    got, expected = (f(q, kv, inputs, rules) for f in (gathered_attention, dense_attention))
    assert not got.isnan().any()
    assert (got - expected).abs().max() < (1e-5 if dtype is torch.float32 else 3e-2)


def test_a_backend_that_cannot_reach_the_device_is_refused_before_a_process_starts():
    spec = load(TINY, "float32")[0]
    with pytest.raises(ConfigError, match="engine.attention cpu cannot read a pool on cuda"):
        RankGroup(spec, EngineConfig(device="cuda", attention="cpu"))


def test_the_kernel_for_gpus_is_refused_on_a_cpu():
    spec, _ = load(TINY, "float32")
    with pytest.raises(ConfigError, match="engine.attention triton needs engine.device cuda"):
        RankGroup(spec, EngineConfig(attention="triton"))
