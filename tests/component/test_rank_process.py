"""A real rank process: results equal the direct runner, death ends only what was in it."""

import asyncio
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from support.house import load
from support.models import TINY
from support.rig import is_gone

from core.config import EngineConfig
from core.errors import ModelLoadError, WorkerDied, WorkerLost
from core.plan import SampleSpec, StepItem, StepPlan
from engine.hash_model import MemoryKV
from engine.model_spec import read_model
from engine.rank_group import STALL_S, RankGroup
from engine.runner import ModelRunner

ENGINE = EngineConfig(num_blocks=16)
PROMPT = tuple(b"import os\n\nclass ")


def plan(step_id, start, ids, report=False):
    sample = (SampleSpec(0, 0, 1, 0.7, 0, 1.0, 2),)
    return StepPlan(
        step_id, (StepItem(1, start, tuple(ids), (3, 4), sample),), report_layers=report
    )


async def test_a_rank_gives_the_same_tokens_and_the_same_kv_bytes():
    spec, model = load(TINY, "float32")
    direct_kv = MemoryKV(spec.layout(16), 16)
    direct = ModelRunner(model, direct_kv._shards[0], 16, 16)
    ranks = RankGroup(spec, ENGINE)
    await ranks.start()
    try:
        layers = []
        result = await ranks.execute(
            plan(1, 0, PROMPT, report=True), lambda step, layer: layers.append((step, layer))
        )
        expected = direct.execute(plan(1, 0, PROMPT), lambda *_: None)
        assert result == expected
        assert layers == [(1, layer) for layer in range(4)]
        for layer in range(4):
            assert bytes(ranks.kv.view(layer, 3, 0)) == bytes(direct_kv.view(layer, 3, 0))
    finally:
        await ranks.stop()


async def test_a_killed_rank_is_reported_at_once_and_can_be_restarted():
    ranks = RankGroup(read_model(TINY), ENGINE)
    await ranks.start()
    try:
        first_pid = ranks.rank_pids()[0]
        os.kill(first_pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="KV cache is lost"):
            async with asyncio.timeout(1):
                await ranks.execute(plan(1, 0, PROMPT), lambda *_: None)
        await ranks.restart()
        assert ranks.rank_pids()[0] != first_pid
        assert (await ranks.execute(plan(2, 0, PROMPT), lambda *_: None)).step_id == 2
    finally:
        await ranks.stop()


async def test_a_model_that_cannot_be_loaded_is_an_error_with_a_name(tmp_path):
    spec = read_model(TINY)
    ranks = RankGroup(spec, ENGINE)
    ranks._order["folder"] = str(tmp_path)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        await ranks.start()
    assert ranks.rank_pids() == ()


@pytest.mark.parametrize("collectives", ["shm", "gloo"])
async def test_ranks_of_a_group_give_the_tokens_and_the_kv_of_one(collectives):
    """Real processes: tokens and log probabilities of rank 0's and of others' sequences, every byte of KV."""
    spec, model = load(TINY, "float32")
    direct_kv = MemoryKV(spec.layout(16), 16)
    expected = ModelRunner(model, direct_kv._shards[0], 16, 16).execute(_two(1), lambda *_: None)
    for size in (2, 4):
        engine = EngineConfig(num_blocks=16, tensor_parallel_size=size, collectives=collectives)
        ranks = RankGroup(spec, engine)
        await ranks.start()
        try:
            assert len(set(ranks.rank_pids())) == size
            layers = []
            got = await ranks.execute(_two(1), lambda step, layer: layers.append(layer))
            assert layers == list(range(4))
            assert {k: t.token_id for k, t in got.tokens.items()} == {
                k: t.token_id for k, t in expected.tokens.items()
            }
            for key, token in got.tokens.items():
                assert token.logprob == pytest.approx(expected.tokens[key].logprob, abs=1e-4)
            for layer in range(4):
                whole = _heads(direct_kv, spec, layer, 3, 0, 2)
                for rank in range(size):
                    head = rank * 2 // size
                    part = _heads(ranks.kv, spec, layer, 3, rank, 1)
                    np.testing.assert_allclose(part[:, :, 0], whole[:, :, head], atol=1e-5)
        finally:
            await ranks.stop()


async def test_an_id_without_a_row_ends_its_sequence_and_no_rank():
    """Split, the vocabulary has no rank that would miss the row: each takes it for another's."""
    spec, _ = load(TINY, "float32")
    ranks = RankGroup(spec, EngineConfig(num_blocks=16, tensor_parallel_size=2))
    await ranks.start()
    try:
        pids, (one, two, three) = ranks.rank_pids(), _two(1).items
        bad = replace(two, token_ids=(*two.token_ids[:-1], spec.vocabulary_size))
        good = await ranks.execute(_two(1), lambda *_: None)
        got = await ranks.execute(StepPlan(2, (one, bad, three)), lambda *_: None)
        assert list(got.failed) == [2] and "has rows for" in got.failed[2]
        assert got.tokens[3, 0].token_id == good.tokens[3, 0].token_id
        assert ranks.rank_pids() == pids
    finally:
        await ranks.stop()


def _two(step_id):
    item = plan(step_id, 0, PROMPT).items[0]
    greedy = (SampleSpec(0, 0, 1, 0.0, 0, 1.0, 2), SampleSpec(1, 0, 1, 0.9, 0, 1.0, 0))
    items = (
        item,
        StepItem(2, 0, PROMPT[:9], (5, 6), greedy),
        StepItem(3, 0, PROMPT[3:], (7, 8), greedy),
    )
    return StepPlan(step_id, items, report_layers=True)


def _heads(kv, spec, layer, block, shard, num_heads):
    return np.frombuffer(kv.view(layer, block, shard), np.float32).reshape(
        2, 16, num_heads, spec.head_size
    )


async def test_one_rank_killed_or_stopped_is_the_end_of_its_group_and_a_new_one_serves():
    """The second is killed, the first is stopped."""
    ranks = RankGroup(read_model(TINY), EngineConfig(num_blocks=16, tensor_parallel_size=2))
    await ranks.start()
    try:
        expected = (await ranks.execute(plan(1, 0, PROMPT), lambda *_: None)).tokens
        pids = ranks.rank_pids()
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(WorkerDied):
            async with asyncio.timeout(3):
                await ranks.execute(plan(2, 0, PROMPT), lambda *_: None)
        await ranks.restart()
        assert not set(pids) & set(ranks.rank_pids())
        assert all(is_gone(pid) for pid in pids)
        assert (await ranks.execute(plan(3, 0, PROMPT), lambda *_: None)).tokens == expected
        os.kill(ranks.rank_pids()[0], signal.SIGSTOP)
        async with asyncio.timeout(STALL_S + 3):
            with pytest.raises(WorkerDied):
                await ranks.execute(plan(4, 0, PROMPT), lambda *_: None)
        await ranks.restart()
        assert (await ranks.execute(plan(5, 0, PROMPT), lambda *_: None)).tokens == expected
    finally:
        await ranks.stop()


async def test_a_rank_that_dies_between_steps_is_reported_without_a_step():
    ranks, lost = RankGroup(read_model(TINY), EngineConfig(num_blocks=16)), asyncio.Event()
    await ranks.start()
    ranks.on_lost = lost.set
    try:
        os.kill(ranks.rank_pids()[0], signal.SIGKILL)
        async with asyncio.timeout(3):
            await lost.wait()
    finally:
        await ranks.stop()


async def test_a_group_of_which_one_rank_cannot_load_ends_at_once_with_its_reason(tmp_path):
    spec = read_model(TINY)
    ranks = RankGroup(spec, EngineConfig(num_blocks=16, tensor_parallel_size=2))
    ranks._order["folder"] = str(tmp_path)
    async with asyncio.timeout(30):
        with pytest.raises(ModelLoadError, match=r"config\.json"):
            await ranks.start()
    assert ranks.rank_pids() == ()


def test_a_group_that_the_model_cannot_be_split_over_starts_no_process():
    with pytest.raises(ModelLoadError, match="possible: "):
        RankGroup(read_model(TINY), EngineConfig(tensor_parallel_size=3))
