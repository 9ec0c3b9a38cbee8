"""A real rank process: results equal the direct runner, death ends only what was in it."""

import asyncio
import os
import signal

import pytest
from support.house import load
from support.models import TINY

from core.config import EngineConfig
from core.errors import ModelLoadError, WorkerLost
from core.plan import SampleSpec, StepItem, StepPlan
from engine.hash_model import MemoryKV
from engine.model_spec import read_model
from engine.rank_group import RankGroup
from engine.runner import ModelRunner

ENGINE = EngineConfig(num_blocks=16)
PROMPT = tuple(b"import os\n\nclass ")


def plan(step_id, start, ids, report=False):
    sample = (SampleSpec(0, 0, 1, 0.7, 0, 1.0, 2),)
    return StepPlan(step_id, (StepItem(1, start, tuple(ids), (3, 4), sample),), report_layers=report)


async def test_a_rank_gives_the_same_tokens_and_the_same_kv_bytes():
    spec, model = load(TINY, "float32")
    direct_kv = MemoryKV(spec.layout(16), 16)
    direct = ModelRunner(model, direct_kv._shards[0], 16, 16)
    ranks = RankGroup(spec, ENGINE)
    await ranks.start()
    try:
        layers = []
        result = await ranks.execute(plan(1, 0, PROMPT, report=True), lambda step, layer: layers.append((step, layer)))
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
