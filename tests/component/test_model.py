"""Our transformer against transformers, our attention against the dense oracle,
a row against its batch."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.in_process_cluster import load
from support.models import FAMILIES, TINY, random_model
from transformers import AutoModelForCausalLM

from core.plan import SampleSpec, StepItem, StepPlan
from core.types import SamplingParams
from engine.checkpoint.model_spec import read_model
from engine.model.attention import (
    AttentionInputs,
    AttentionRules,
    _exp,
    cpu_attention,
    dense_attention,
)
from engine.model.model import Model
from engine.model.runner import ModelRunner, _inputs
from engine.model.sharding import Shard
from simulation.hash_runner import MemoryKV

pytestmark = pytest.mark.sampled(2)


def logits_of(model, runner, items, rows):
    """Logits of given rows of one step."""
    inputs = _inputs(tuple(items))
    ids = np.concatenate([np.asarray(i.token_ids, dtype=np.int64) for i in items])
    return model.forward(
        ids, inputs, runner.kv, np.asarray(rows, dtype=np.int64), lambda layer: None
    )


def fresh_runner(spec, model, num_blocks=64, block=16):
    layout = spec.layout(block)
    return ModelRunner(model, MemoryKV(layout, num_blocks)._shards[0], num_blocks, block)


def item(key, start, ids, first_block, block=16):
    end = start + len(ids)
    return StepItem(
        key, start, tuple(ids), tuple(range(first_block, first_block + -(-end // block)))
    )


@pytest.mark.parametrize("attention", ["cpu", "dense", "gathered"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path, name, attention):
    reference = random_model(tmp_path, name)
    spec = read_model(tmp_path)
    torch.set_num_threads(1)
    model = Model(Shard(spec), torch.device("cpu"), attention)
    prompt = [random.Random(5).randrange(96) for _ in range(120)]
    runner = fresh_runner(spec, model)

    ours = logits_of(model, runner, [item(1, 0, prompt, 0)], range(len(prompt)))
    with torch.no_grad():
        theirs = reference(torch.tensor([prompt])).logits[0]
    assert (ours - theirs).abs().max() < 1e-4

    tokens = list(prompt[:20])
    runner = fresh_runner(spec, model)
    start = 0
    for _ in range(30):
        row = logits_of(
            model, runner, [item(1, start, tokens[start:], 0)], [len(tokens) - start - 1]
        )
        start = len(tokens)
        tokens.append(int(row[0].argmax()))
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor([prompt[:20]]),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert tokens == expected[0].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa",
        "mistral-window",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "phi3",
        "mixtral",
        "qwen3-moe",
    ],
)
def test_half_precision_stays_close_to_transformers_in_fp32_on_the_same_weights(
    tmp_path, name, dtype
):
    random_model(
        tmp_path, name, dtype=getattr(torch, dtype), initializer_range=0.1, max_shard_size="50KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    spec = read_model(tmp_path)
    assert spec.dtype == dtype
    model = Model(Shard(spec), torch.device("cpu"), "cpu")
    prompt = [random.Random(5).randrange(96) for _ in range(80)]
    ours = logits_of(model, fresh_runner(spec, model), [item(1, 0, prompt, 0)], range(80))
    dense = Model(Shard(spec), torch.device("cpu"), "dense")
    assert (
        ours - logits_of(dense, fresh_runner(spec, dense), [item(1, 0, prompt, 0)], range(80))
    ).abs().max() < 0.2
    with torch.no_grad():
        theirs = reference(torch.tensor([prompt])).logits[0]
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    assert cosine.min() > (0.999 if dtype == "bfloat16" else 0.99999)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("checkpoint", ["tiny", "wide", "gemma2", "qwen3-moe", "mistral-window"])
def test_logits_are_bitwise_equal_alone_batched_chunked_and_re_prefilled(
    tmp_path, dtype, checkpoint
):
    folder = TINY
    if (
        checkpoint == "wide"
    ):  # sizes at which this CPU's bf16 products do depend on the number of rows
        folder = tmp_path
        random_model(
            folder,
            "llama-gqa",
            hidden_size=448,
            intermediate_size=1216,
            num_attention_heads=7,
            num_key_value_heads=1,
            initializer_range=0.05,
        )
    elif checkpoint != "tiny":
        folder = tmp_path
        random_model(folder, checkpoint, initializer_range=0.1)
    if checkpoint == "tiny":
        spec, model = load(folder, dtype)
    else:
        spec = read_model(folder, dtype)
        model = Model(Shard(spec), torch.device("cpu"), "cpu")
    torch.set_num_threads(1)
    rng = random.Random(1)
    prompt = [rng.randrange(90) for _ in range(100)]
    others = [[rng.randrange(90) for _ in range(n)] for n in (3, 37, 64, 90)]

    alone_runner = fresh_runner(spec, model)
    alone = logits_of(model, alone_runner, [item(1, 0, prompt, 0)], range(100))

    one_by_one = fresh_runner(spec, model)
    rows = [
        logits_of(model, one_by_one, [item(1, i, prompt[i : i + 1], 0)], [0])[0] for i in range(100)
    ]
    assert torch.equal(torch.stack(rows), alone)
    assert torch.equal(one_by_one.kv[:, :7], alone_runner.kv[:, :7])

    for sizes in ((1, 99), (7,) * 15, (50, 50), (33, 1, 66)):
        runner, start, parts = fresh_runner(spec, model), 0, []
        for size in sizes:
            ids = prompt[start : start + size]
            parts.append(logits_of(model, runner, [item(1, start, ids, 0)], range(len(ids))))
            start += size
        assert torch.equal(torch.cat(parts), alone), sizes

    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        runner = fresh_runner(spec, model)
        prompts = [prompt, *others]
        items = [item(i, 0, prompts[i], 10 * i) for i in order]
        begin = sum(len(prompts[i]) for i in order[: order.index(0)])
        assert torch.equal(logits_of(model, runner, items, range(begin, begin + 100)), alone), order


def test_the_kernels_exponential():
    x = np.linspace(-87, 0, 200_001, dtype=np.float32)
    ours = np.array([_exp(v) for v in x[::40]], dtype=np.float64)
    theirs = np.exp(x[::40].astype(np.float64))
    assert (abs(ours - theirs) / theirs).max() < 4e-7 and _exp(np.float32(0)) == 1
    assert np.isnan(_exp(np.float32("nan"))) and 0 < _exp(np.float32("-inf")) < 1e-37


def test_fp16_numbers_of_every_size_are_read_as_they_are():
    """Small ones too: in attention's sums they must not be denormal fp32 numbers."""
    torch.manual_seed(0)
    for size in (1e-7, 1e-5, 1e-3, 1.0, 100.0):
        kv = (torch.randn(4, 2, 16, 2, 32) * size).half()
        q = (torch.randn(1, 4, 32) / size).clamp(-6e4, 6e4)
        inputs = AttentionInputs(np.array([50]), np.array([0, 1]), np.arange(4)[None])
        got, expected = (
            f(q, kv, inputs, AttentionRules(0.1)) for f in (cpu_attention, dense_attention)
        )
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-7 * size), size


@pytest.mark.parametrize("half", [0, 1], ids=["keys", "values"])
def test_a_step_with_non_finite_logits_fails_only_its_own_sequence(half):
    spec, model = load(TINY, "float32")
    runner = fresh_runner(spec, model)
    runner.execute(
        StepPlan(1, (item(1, 0, [1, 2, 3], 0), item(2, 0, [1, 2, 3], 1))), lambda *_: None
    )
    runner.kv[0, 0, half] = float("nan")
    sample = (SampleSpec(0, 0, 1, SamplingParams(temperature=0.0)),)
    items = tuple(
        StepItem(i.sequence_key, 3, (4,), i.block_table, sample)
        for i in (item(1, 0, [1] * 4, 0), item(2, 0, [1] * 4, 1))
    )
    result = runner.execute(StepPlan(2, items), lambda *_: None)
    assert list(result.failed) == [1] and "finite" in result.failed[1]
    assert list(result.tokens) == [(2, 0)]


@pytest.mark.parametrize("token_id", [264, 99999, -1])
@pytest.mark.parametrize("is_target", [False, True])
def test_an_id_that_the_model_has_no_row_for_fails_only_its_own_sequence(token_id, is_target):
    spec, model = load(TINY, "float32")
    assert spec.vocabulary_size == 264
    sample = (SampleSpec(0, 0, 1, SamplingParams(temperature=0.0)),)

    def step(middle, target):
        runner = fresh_runner(spec, model)
        items = tuple(
            StepItem(key, 0, (1, token, 3), (block,), sample, targets=targets)
            for key, token, block, targets in (
                (1, middle, 0, (2, target)), (2, 2, 1, (2, 3)), (3, 2, 2, ()),
            )
        )  # fmt: skip
        return runner.execute(StepPlan(1, items), lambda *_: None)

    good = step(2, 3)
    got = step(2, token_id) if is_target else step(token_id, 3)
    assert (
        list(got.failed) == [1] and f"{token_id}, the model has rows for 0 to 263" in got.failed[1]
    )
    assert 1 not in got.scored and got.scored[2] == good.scored[2]
    assert all(got.tokens[key, 0] == good.tokens[key, 0] for key in (2, 3))


def test_the_tiny_model_fits_its_promise():
    files = [f for f in (TINY.parent).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 8 << 20
    spec = read_model(TINY)
    assert (
        spec.num_layers,
        spec.hidden_size,
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_size,
    ) == (
        4,
        192,
        8,
        2,
        32,
    )
    assert spec.vocabulary_size % 8 == 0
    assert Path(TINY.parent / "baton-tiny-draft" / "config.json").exists()
