"""Every sampling field is exact across hand-over, chunking and preemption, first token included."""

import asyncio
import random
from typing import Any

import pytest
import torch
from support.in_process_cluster import InProcessCluster
from support.models import TINY, random_model
from transformers import AutoModelForCausalLM, NoBadWordsLogitsProcessor

from core.config import EngineConfig
from core.errors import InvalidRequest
from core.session import Role

pytestmark = pytest.mark.sampled(2)

PROMPT = list(b"for item in items:\n    print(item)\nfor item in items:\n    ")
SMALL = EngineConfig(block_size_tokens=8, num_blocks=128, max_step_tokens=19)
CASES: dict[str, dict[str, Any]] = {
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"temperature": 0.8, "frequency_penalty": 1.2},
    "repetition": {"repetition_penalty": 1.4},
    "bias": {"logit_bias": ((101, 8.0), (32, -100.0))},
    "allowed": {"temperature": 1.0, "allowed_token_ids": tuple(range(97, 123))},
    "bad words": {"bad_words": ((105, 116), (101,))},
    "logprobs": {"temperature": 0.7, "logprobs": 5, "n": 2},
    "prompt logprobs": {"prompt_logprobs": 2, "logprobs": 0, "n": 2},
    "all": {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": ((110, 2.0),),
        "bad_words": ((32, 32),),
        "min_tokens": 20,
        "logprobs": 3,
    },
}


async def ask(path, engine=SMALL, decode=None, copies=1, **case):
    async with InProcessCluster(TINY, "float32", engine, decode, path=path) as cluster:
        case = {"max_tokens": 24, "seed": 9, **case}
        replies = await asyncio.gather(*(cluster.ask(PROMPT, **case) for _ in range(copies)))
        assert all(r.ended.error is None and r.ended.timing.path == path for r in replies)
        return replies, sum(u.progress().load.num_preemptions for u in cluster.units)


@pytest.mark.parametrize("name", CASES)
async def test_the_same_tokens_and_log_probabilities_whoever_computes_them(name):
    case = CASES[name]
    (alone,), _ = await ask("local", EngineConfig(block_size_tokens=16, num_blocks=64), **case)
    (apart,), _ = await ask("pd", **case)
    tight = EngineConfig(
        block_size_tokens=8, num_blocks=max(26, 15 * case.get("n", 1)), max_step_tokens=32
    )
    squeezed, num_preemptions = await ask(
        "pd", EngineConfig(block_size_tokens=8, num_blocks=256), tight, copies=4, **case
    )
    assert num_preemptions > 0
    for other in (apart, *squeezed):
        assert (
            other.tokens == alone.tokens
            and other.logprobs == alone.logprobs
            and other.texts == alone.texts
        )
        assert other.prompt == alone.prompt
    if case.get("logprobs") is not None:
        assert all(len(alone.logprobs[c]) == len(alone.tokens[c]) for c in alone.tokens)


async def test_the_fields_do_what_they_say():
    (plain,), _ = await ask("pd")
    text = bytes(plain.tokens[0])
    (biased,), _ = await ask("pd", **CASES["bias"])
    assert 32 in plain.tokens[0] and 32 not in biased.tokens[0]
    (allowed,), _ = await ask("pd", **CASES["allowed"])
    assert set(allowed.tokens[0]) <= set(range(97, 123))
    pair = (text[3], text[4])
    (clean,), _ = await ask("pd", bad_words=(pair,))
    assert (
        all(tuple(clean.tokens[0][i : i + 2]) != pair for i in range(23))
        and clean.tokens[0][:4] == plain.tokens[0][:4]
    )
    (fresh,), _ = await ask("pd", presence_penalty=2.0, frequency_penalty=2.0)
    assert len(set(fresh.tokens[0])) > len(set(plain.tokens[0]))


async def test_bad_words_are_those_of_transformers(tmp_path):
    reference = random_model(tmp_path, "llama-gqa")
    prompt = [random.Random(4).randrange(3, 96) for _ in range(30)]
    plain = reference.generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    output = plain[0].tolist()[30:]
    words = [[output[0]], output[3:5], output[5:8]]
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=None)
    expected = reference.generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[processor],
    )
    async with InProcessCluster(tmp_path, "float32", SMALL, path="pd") as cluster:
        case = {"bad_words": tuple(map(tuple, words)), "max_tokens": 12, "ignore_eos": True}
        reply = await cluster.ask(prompt, **case)
    assert reply.tokens[0] == expected[0].tolist()[30:]


@pytest.mark.parametrize("path", ["pd", "local"])
async def test_prompt_log_probabilities_are_those_of_transformers_also_after_a_prefix_hit(path):
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.log_softmax(reference(torch.tensor([PROMPT])).logits[0], -1)
    async with InProcessCluster(TINY, "float32", SMALL, path=path) as cluster:
        await cluster.ask(PROMPT, max_tokens=2)
        reply = await cluster.ask(PROMPT, max_tokens=2, prompt_logprobs=3)
        assert reply.ended.usage.cached_tokens == 0  # what is cached has no logits to score
        again = await cluster.ask(PROMPT, max_tokens=2)
        assert again.ended.usage.cached_tokens > 0
        assert (
            cluster.of_role(Role.PREFILL if path == "pd" else Role.DECODE)[
                0
            ].scheduler.num_preemptions
            == 0
        )
    assert [e.token_id for e in reply.prompt] == PROMPT[1:]
    for row, entry in zip(expected, reply.prompt, strict=False):
        assert abs(float(row[entry.token_id]) - entry.logprob) < 1e-4
        assert [i for i, _ in entry.top] == row.argsort(descending=True, stable=True)[:3].tolist()


@pytest.mark.parametrize("path", ["pd", "local"])
async def test_a_request_that_leaves_no_token_to_draw_is_the_clients_mistake_and_harms_nobody(path):
    async with InProcessCluster(TINY, "float32", SMALL, path=path) as cluster:
        cases = [
            {"allowed_token_ids": (97,), "bad_words": ((97,),)},
            {"allowed_token_ids": (97,), "bad_words": ((97, 97),)},
            {"allowed_token_ids": (257,), "min_tokens": 3},
            {},
        ]
        replies = await asyncio.gather(
            *(cluster.ask(PROMPT, max_tokens=8, **case) for case in cases)
        )
    for reply in replies[:3]:
        assert (
            isinstance(reply.ended.error, InvalidRequest)
            and reply.ended.error.field == "allowed_token_ids"
        )
    assert replies[3].ended.error is None and len(replies[3].tokens[0]) == 8
