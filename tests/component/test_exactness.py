"""Disaggregated = colocated = single engine, token for token.
The test that justifies the project."""

import asyncio
import random

import pytest
import torch
from support.in_process_cluster import InProcessCluster, load
from support.models import FAMILIES, TINY, random_model

from core.config import EngineConfig, TransferConfig
from core.plan import SampleSpec, StepItem, StepPlan
from core.session import Role
from core.types import FinishReason, SamplingParams
from engine.model.runner import ModelRunner
from kv_transfer import codec
from simulation.hash_runner import MemoryKV

pytestmark = pytest.mark.sampled(2)

RNG = random.Random(3)
PROMPTS = [
    list(b"def main(argv):\n    "),
    [256, 259, *b"What is the capital of France?", 257, 260],
    [RNG.randrange(256) for _ in range(150)],
]


def bare_engine(prompt, dtype, choice=0, max_tokens=20, temperature=0.0, seed=7, min_tokens=0, **_):
    """The oracle: one sequence, one block table, the whole prompt at once, no scheduler at all."""
    spec, model = load(TINY, dtype)
    layout = spec.layout(16)
    runner = ModelRunner(model, MemoryKV(layout, 32)._shards[0], 32, 16)
    tokens, out, start, fresh = list(prompt), [], 0, list(prompt)
    while len(out) < max_tokens:
        end = start + len(fresh)
        sample = SampleSpec(
            choice,
            len(out),
            seed,
            SamplingParams(temperature=temperature),
            (257,) if len(out) < min_tokens else (),
        )
        item = StepItem(1, start, tuple(fresh), tuple(range(-(-end // 16))), (sample,))
        token = runner.execute(StepPlan(1, (item,)), lambda *_: None).tokens[1, choice].token_id
        out.append(token)
        tokens.append(token)
        start, fresh = end, [token]
        if token in spec.eos_token_ids:
            break
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transport", ["inproc", "grpc", "shm"])
@pytest.mark.parametrize(("block", "chunk"), [(16, 64), (8, 7), (32, 512)])
async def test_disaggregated_equals_colocated_equals_bare_engine(dtype, transport, block, chunk):
    engine = EngineConfig(block_size_tokens=block, num_blocks=2048 // block, max_step_tokens=chunk)
    wishes = [
        (prompt, {"temperature": t, "n": n, "max_tokens": 20, "seed": 11})
        for prompt in PROMPTS for t, n in ((0.0, 1), (0.9, 2))
    ]  # fmt: skip
    got = {}
    for path in ("pd", "local"):
        async with InProcessCluster(TINY, dtype, engine, path=path, transport=transport) as cluster:
            replies = await asyncio.gather(
                *(cluster.ask(prompt, **wish) for prompt, wish in wishes)
            )
            assert all(r.ended.error is None and r.ended.timing.path == path for r in replies)
            if path == "pd":
                for reply in replies:
                    blocks = reply.ended.timing.kv_blocks
                    assert (
                        reply.ended.timing.kv_bytes
                        == blocks * cluster.spec.layout(block).block_bytes
                        > 0
                    )
            got[path] = [r.tokens for r in replies]
    expected = [
        {c: bare_engine(prompt, dtype, choice=c, **wish) for c in range(wish["n"])}
        for prompt, wish in wishes
    ]
    assert got["pd"] == expected
    assert got["local"] == expected


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family_disaggregated_equals_colocated_equals_transformers(tmp_path, family):
    reference = random_model(tmp_path, family)
    prompts = [[RNG.randrange(3, 96) for _ in range(n)] for n in (5, 40, 97)]
    engine = EngineConfig(block_size_tokens=8, num_blocks=128, max_step_tokens=33)
    got = {}
    for path in ("pd", "local"):
        async with InProcessCluster(tmp_path, "float32", engine, path=path) as cluster:
            wishes = [
                {"max_tokens": 16, "ignore_eos": True, "temperature": t, "seed": 5}
                for t in (0.0, 0.8)
            ]
            replies = await asyncio.gather(*(cluster.ask(p, **w) for p in prompts for w in wishes))
            assert all(r.ended.error is None and r.ended.timing.path == path for r in replies)
            got[path] = [r.tokens[0] for r in replies]
    assert got["pd"] == got["local"]
    for prompt, tokens in zip(prompts, got["pd"][::2], strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens == expected[0].tolist()[len(prompt) :]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prefill_block", [8, 4, 32])
async def test_a_forced_preemption_changes_nothing(dtype, prefill_block):
    engine = EngineConfig(block_size_tokens=8, num_blocks=12, max_step_tokens=32)
    roomy = EngineConfig(block_size_tokens=prefill_block, num_blocks=512 // prefill_block)
    prompts = [PROMPTS[0][: 10 + i] for i in range(6)]
    async with InProcessCluster(TINY, dtype, roomy, engine) as cluster:
        replies = await asyncio.gather(
            *(cluster.ask(p, max_tokens=40, ignore_eos=True) for p in prompts)
        )
        assert cluster.of_role(Role.DECODE)[0].scheduler.num_preemptions > 0
        spec = cluster.spec
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.ended.error is None
        expected = bare_engine(prompt, dtype, max_tokens=40)
        assert reply.tokens[0][: len(expected)] == expected or spec.eos_token_ids[0] in expected


@pytest.mark.parametrize("decode_block", [8, 4, 32])
async def test_a_prefill_preempted_mid_transfer_restarts_and_changes_nothing(decode_block):
    engine = EngineConfig(block_size_tokens=8, num_blocks=64, max_step_tokens=8)
    decode = EngineConfig(block_size_tokens=decode_block, num_blocks=512 // decode_block)
    async with InProcessCluster(TINY, "float32", engine, decode) as cluster:
        scheduler = cluster.of_role(Role.PREFILL)[0].scheduler
        plan, hits = scheduler.plan, []

        def preempting(now_s):
            victims = [
                s
                for s in scheduler.running
                if s.num_computed_tokens >= 64 and s.handover.is_partnered
            ]
            if victims and not hits:
                hits.append(victims[0].key)
                scheduler.preempt(victims[0])
            return plan(now_s)

        scheduler.plan = preempting
        reply = await cluster.ask(PROMPTS[2], max_tokens=12, timeout_s=5)
        assert hits and scheduler.num_preemptions == 1
    assert reply.tokens[0] == bare_engine(PROMPTS[2], "float32", max_tokens=12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_prefix_hits_on_either_side_change_nothing(dtype):
    prompt = PROMPTS[2]
    async with InProcessCluster(TINY, dtype) as cluster:
        cold = await cluster.ask(prompt, max_tokens=10)
        warm = await cluster.ask(prompt, max_tokens=10)
        longer = await cluster.ask(prompt + PROMPTS[0], max_tokens=10)
        cluster.of_role(Role.DECODE)[0].pool.drop_cache()
        prefill_only = await cluster.ask(prompt, max_tokens=10)
        cluster.of_role(Role.PREFILL)[0].pool.drop_cache()
        decode_only = await cluster.ask(prompt, max_tokens=10)
    blocks = [r.ended.timing.kv_blocks for r in (cold, warm, prefill_only, decode_only)]
    assert blocks == [10, 1, 10, 1]
    cached = [r.ended.usage.cached_tokens for r in (cold, warm, prefill_only, decode_only)]
    assert cached == [0, 144, 144, 0], "what decode holds was computed again"
    expected = bare_engine(prompt, dtype, max_tokens=10)
    for reply in (cold, warm, prefill_only, decode_only):
        assert reply.tokens[0] == expected
    assert longer.tokens[0] == bare_engine(prompt + PROMPTS[0], dtype, max_tokens=10)


async def test_stop_string_in_the_first_token_ends_at_once():
    async with InProcessCluster(TINY) as cluster:
        first = (await cluster.ask(PROMPTS[0], max_tokens=5)).tokens[0][0]
        reply = await cluster.ask(PROMPTS[0], max_tokens=50, stop=(chr(0x100 + first),))
    assert reply.tokens[0] == [first]
    assert reply.texts.get(0, "") == ""
    assert reply.finish[0].reason is FinishReason.STOP and reply.finish[0].stop_match == chr(
        0x100 + first
    )
    assert reply.ended.usage.completion_tokens == 1


async def test_stop_string_across_tokens_cuts_text_and_usage():
    async with InProcessCluster(TINY) as cluster:
        full = await cluster.ask(PROMPTS[0], max_tokens=20)
        stop = full.texts[0][7:10]
        reply = await cluster.ask(PROMPTS[0], max_tokens=20, stop=(stop,))
    at = full.texts[0].index(stop)
    assert reply.texts[0] == full.texts[0][:at]
    assert reply.ended.usage.completion_tokens == at + 3


async def test_one_token_makes_no_hand_over():
    async with InProcessCluster(TINY) as cluster:
        reply = await cluster.ask(PROMPTS[0], max_tokens=1)
        assert cluster.of_role(Role.PREFILL)[0].agent.num_sent_bytes == 0
    assert reply.tokens[0] == bare_engine(PROMPTS[0], "float32", max_tokens=1)
    assert reply.finish[0].reason is FinishReason.LENGTH


async def test_an_end_of_text_drawn_on_prefill_ends_the_transfer():
    """The first token is final: prefill ends the transfer with Finished, decode releases."""
    async with InProcessCluster(TINY) as cluster:
        full = await cluster.ask(PROMPTS[1], max_tokens=50)
        before_end = PROMPTS[1] + full.tokens[0][:-1]
        reply = await cluster.ask(before_end, max_tokens=50)
    assert reply.tokens[0] == [257]
    assert reply.finish[0].reason is FinishReason.STOP


async def test_logprobs_of_the_first_token_cross_the_hand_over():
    replies = {}
    for path in ("pd", "local"):
        async with InProcessCluster(TINY, path=path) as cluster:
            replies[path] = await cluster.ask(PROMPTS[0], max_tokens=6, logprobs=3)
    assert replies["pd"].logprobs == replies["local"].logprobs
    assert len(replies["pd"].logprobs[0]) == 6
    assert all(len(entry.top) == 3 and entry.logprob <= 0 for entry in replies["pd"].logprobs[0])


async def test_min_tokens_ignore_eos_and_stop_ids():
    async with InProcessCluster(TINY) as cluster:
        plain = await cluster.ask(PROMPTS[1], max_tokens=60)
        longer = await cluster.ask(PROMPTS[1], max_tokens=60, min_tokens=len(plain.tokens[0]) + 3)
        endless = await cluster.ask(PROMPTS[1], max_tokens=40, ignore_eos=True)
        stopped = await cluster.ask(PROMPTS[1], max_tokens=60, stop_token_ids=(plain.tokens[0][4],))
    assert plain.tokens[0][-1] == 257 and plain.finish[0].reason is FinishReason.STOP
    assert len(longer.tokens[0]) >= len(plain.tokens[0]) + 3
    assert len(endless.tokens[0]) == 40 and endless.finish[0].reason is FinishReason.LENGTH
    assert stopped.tokens[0] == plain.tokens[0][: plain.tokens[0].index(plain.tokens[0][4]) + 1]
    assert stopped.finish[0].stop_match == plain.tokens[0][4]


@pytest.mark.parametrize("num_flips", [1, 2])
async def test_a_flipped_byte_on_the_real_wire_is_healed_or_the_attempt_redone(
    num_flips, monkeypatch
):
    """Real gRPC, real agent threads: one flip is asked for again,
    a second in the same part redoes the attempt."""
    encode, flipped = codec.encode_frame, []

    def flipping(number, sub_attempt, entries, payloads):
        data = bytearray(encode(number, sub_attempt, entries, payloads))
        if len(flipped) < num_flips:
            flipped.append(entries[-1])
            data[-7] ^= 0x10
        return bytes(data)

    monkeypatch.setattr(codec, "encode_frame", flipping)
    async with InProcessCluster(
        TINY, transport="grpc", threaded=True, transfer=TransferConfig(frame_bytes=1 << 20)
    ) as cluster:
        reply = await cluster.ask(PROMPTS[0], max_tokens=12)
        resent = cluster.of_role(Role.DECODE)[0].agent.num_resent
    assert len(flipped) == num_flips
    assert reply.ended.error is None
    assert reply.tokens[0] == bare_engine(PROMPTS[0], "float32", max_tokens=12)
    if num_flips == 1:
        assert resent == reply.ended.timing.kv_fragments_resent == 1
        assert reply.ended.timing.attempts == ("0:pd:ok",)


async def test_cancels_at_any_moment_leave_nothing_with_real_threads():
    async with InProcessCluster(TINY, transport="grpc", threaded=True) as cluster:

        async def leave(delay_s):
            request = cluster.request(PROMPTS[2], max_tokens=500, ignore_eos=True)
            task = asyncio.create_task(cluster.orchestrator.run(request, lambda event: None))
            await asyncio.sleep(delay_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        await asyncio.gather(*(leave(0.004 * i) for i in range(40)))
