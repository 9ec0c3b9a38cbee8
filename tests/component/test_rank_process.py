"""A real rank process: results equal the direct runner, death ends only what was in it."""

import asyncio
import logging
import os
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from support.in_process_cluster import load
from support.models import TINY
from support.process_cluster import is_gone

from core.config import EngineConfig
from core.errors import ModelLoadError, WorkerDied, WorkerLost
from core.plan import History, SampleSpec, StepItem, StepPlan
from core.types import SamplingParams
from engine.checkpoint.model_spec import read_model
from engine.model.runner import ModelRunner
from engine.ranks.rank_group import KILL_TIMEOUT_S, STALL_S, RankGroup, launch_child
from simulation.hash_runner import MemoryKV

pytestmark = pytest.mark.sampled(2)

ENGINE = EngineConfig(num_blocks=16)
PROMPT = tuple(b"import os\n\nclass ")
PENALISED = SamplingParams(
    temperature=0.9,
    logprobs=2,
    presence_penalty=0.3,
    frequency_penalty=0.7,
    repetition_penalty=1.3,
)


def plan(step_id, start, ids, report=False):
    sample = (SampleSpec(0, 0, 1, SamplingParams(temperature=0.7, logprobs=2)),)
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
    ranks._setup["folder"] = str(tmp_path)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        await ranks.start()
    assert ranks.rank_pids() == ()


@pytest.mark.parametrize("collectives", ["shm", "gloo"])
async def test_ranks_of_a_group_give_the_tokens_and_the_kv_of_one(collectives):
    """Real processes: tokens and log probabilities of rank 0's and of
    others' sequences, every byte of KV."""
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
    two = (
        SampleSpec(0, 0, 1, SamplingParams(temperature=0.0, logprobs=2)),
        SampleSpec(1, 0, 1, SamplingParams(temperature=0.9, logprobs=0)),
    )
    items = (
        item,
        StepItem(2, 0, PROMPT[:9], (5, 6), two),
        StepItem(3, 0, PROMPT[3:], (7, 8), two),
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
    ranks = RankGroup(read_model(TINY), EngineConfig(num_blocks=16))
    await ranks.start()
    try:
        os.kill(ranks.rank_pids()[0], signal.SIGKILL)
        async with asyncio.timeout(3):
            await ranks.lost()
        await ranks.restart()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await ranks.lost()  # of the fresh group nothing is to be told
    finally:
        await ranks.stop()


async def test_a_group_of_which_one_rank_cannot_load_ends_at_once_with_its_reason(tmp_path):
    spec = read_model(TINY)
    ranks = RankGroup(spec, EngineConfig(num_blocks=16, tensor_parallel_size=2))
    ranks._setup["folder"] = str(tmp_path)
    async with asyncio.timeout(30):
        with pytest.raises(ModelLoadError, match=r"config\.json"):
            await ranks.start()
    assert ranks.rank_pids() == ()


def test_a_group_that_the_model_cannot_be_split_over_starts_no_process():
    with pytest.raises(ModelLoadError, match="possible: "):
        RankGroup(read_model(TINY), EngineConfig(tensor_parallel_size=3))


class _Lingering:
    """A rank whose end the kernel keeps waiting: it is killed, and nobody learns of its end."""

    def __init__(self, process):
        self.process = process
        self.pid = process.pid
        self.poll = process.poll
        self.kill = process.kill
        self.waits_s = []

    def wait(self, timeout):
        self.waits_s.append(timeout)
        raise subprocess.TimeoutExpired("rank", timeout)


async def test_ranks_that_take_long_to_die_keep_nobody_waiting_and_are_no_bug(caplog):
    """Both are waited for together, once; the group starts again beside them, and stops."""
    caplog.set_level(logging.INFO, logger="baton")
    lingering = []

    async def launch(rank, fds):
        lingering.append(_Lingering(await launch_child(rank, fds)))
        return lingering[-1]

    engine = EngineConfig(num_blocks=16, tensor_parallel_size=2)
    ranks = RankGroup(read_model(TINY), engine, launch)
    await ranks.start()
    try:
        expected = (await ranks.execute(plan(1, 0, PROMPT), lambda *_: None)).tokens
        await ranks.restart()
        assert (await ranks.execute(plan(2, 0, PROMPT), lambda *_: None)).tokens == expected
    finally:
        codes = await ranks.stop()
    assert codes == [None, None] and ranks.rank_pids() == ()
    told = [r.fields for r in caplog.records if r.event == "rank_lingers"]
    assert told == [{"rank_pid": one.pid, "waited_s": KILL_TIMEOUT_S} for one in lingering]
    assert [len(one.waits_s) for one in lingering] == [1, 1, 1, 1]
    (restarted,) = (r.fields for r in caplog.records if r.event == "ranks_restarted")
    assert restarted["exit_codes"] == [None, None]
    assert [one.process.wait(10) for one in lingering] == [-signal.SIGKILL] * 4


def _penalised_step(step_id, tokens, num_prompt, table):
    """One decode step as a scheduler plans it: the sequence's own lists, not copied."""
    history = History(tokens, 0, num_prompt, len(tokens))
    sample = SampleSpec(0, step_id, 1, PENALISED, history=history)
    start = 0 if step_id == 0 else len(tokens) - 1
    return StepPlan(step_id, (StepItem(1, start, tuple(tokens[start:]), table, (sample,)),))


async def test_a_rank_that_is_sent_news_draws_what_a_runner_with_the_whole_history_draws():
    """Over a block border, and after a restart, when the ranks know nothing again."""
    spec, model = load(TINY, "float32")
    direct = ModelRunner(model, MemoryKV(spec.layout(16), 16)._shards[0], 16, 16)
    ranks = RankGroup(spec, ENGINE)
    await ranks.start()
    try:
        for _ in range(2):
            tokens = list(PROMPT)
            table = [3, 4, 5]
            for step_id in range(20):
                plan = _penalised_step(step_id, tokens, len(PROMPT), table)
                got = await ranks.execute(plan, lambda *_: None)
                assert got == direct.execute(plan, lambda *_: None)
                tokens.append(got.tokens[1, 0].token_id)
            await ranks.restart()
    finally:
        await ranks.stop()


async def test_layers_are_counted_in_every_step_and_a_restart_does_not_set_the_count_back():
    ranks = RankGroup(read_model(TINY), ENGINE)
    assert ranks.layers_done == 0
    await ranks.start()
    try:
        reported = []
        await ranks.execute(plan(1, 0, PROMPT), lambda *layer: reported.append(layer))
        assert ranks.layers_done == 4 and reported == []
        await ranks.restart()
        assert ranks.layers_done == 4
        await ranks.execute(plan(2, 0, PROMPT, report=True), lambda *layer: reported.append(layer))
        assert ranks.layers_done == 8 and len(reported) == 4
    finally:
        await ranks.stop()


@pytest.mark.parametrize("size", [1, 2])
async def test_a_token_that_the_model_does_not_have_fails_its_sequence_and_no_other(size):
    """In the ids to compute, and in those to score."""
    spec = read_model(TINY)
    ranks = RankGroup(spec, EngineConfig(num_blocks=16, tensor_parallel_size=size))
    await ranks.start()
    try:
        good = _two(1).items
        expected = await ranks.execute(StepPlan(1, good), lambda *_: None)
        foreign = spec.vocabulary_size
        bad = StepItem(8, 0, (*PROMPT[:4], foreign), (9,), good[1].samples)
        scored = StepItem(9, 0, PROMPT[:4], (10,), (), targets=(1, 2, 3, foreign))
        step = StepPlan(2, (bad, good[0], scored, *good[1:]))
        pids = ranks.rank_pids()
        got = await ranks.execute(step, lambda *_: None)
        why = f"a token id is {foreign}, the model has rows for 0 to {foreign - 1}"
        assert got.failed == {8: why, 9: why} and got.scored == {}
        assert {k: t.token_id for k, t in got.tokens.items()} == {
            k: t.token_id for k, t in expected.tokens.items()
        }
        assert ranks.rank_pids() == pids
    finally:
        await ranks.stop()


async def test_a_bias_on_a_token_that_the_model_does_not_have_fails_its_sequence_alone():
    spec, model = load(TINY, "float32")
    direct = ModelRunner(model, MemoryKV(spec.layout(16), 16)._shards[0], 16, 16)
    good = _two(1).items
    params = SamplingParams(temperature=0.0, logit_bias=((spec.vocabulary_size, 1.0),))
    wish = (SampleSpec(0, 0, 1, params),)
    result = direct.execute(
        StepPlan(1, (StepItem(8, 0, PROMPT, (9, 10), wish), *good)), lambda *_: None
    )
    assert set(result.failed) == {8} and "out of bounds" in result.failed[8]
    assert set(result.tokens) == set(direct.execute(StepPlan(2, good), lambda *_: None).tokens)
