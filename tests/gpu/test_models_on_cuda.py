"""Our transformer on a GPU: against transformers on the CPU, and a row against its batch."""

import random

import numpy as np
import pytest
import torch
from support.models import FAMILIES, random_model

from core.plan import StepItem
from engine.checkpoint.model_spec import read_model
from engine.model.model import Model
from engine.model.runner import _inputs
from engine.model.sharding import Shard

BLOCK = 16
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1216,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
"""Sizes at which the library's products do depend on the number of rows."""


class OneSequence:
    """A model on a GPU with a pool of its own, fed one sequence, beside others or alone."""

    def __init__(self, folder, attention, dtype="float32"):
        spec = read_model(folder, dtype)
        self.model = Model(Shard(spec), torch.device("cuda"), attention)
        shape = (spec.num_layers, 64, 2, BLOCK, spec.num_kv_heads, spec.head_size)
        self.kv = torch.zeros(shape, dtype=self.model.dtype, device="cuda")

    def logits(self, start, ids, beside=0):
        """Logits of all its rows of one step, on the CPU; so many others decode in the step."""
        table = tuple(range(1, 1 - (-(start + len(ids)) // BLOCK)))
        others = [StepItem(2 + n, 15, (n,), (48 + n % 16,)) for n in range(beside)]
        inputs = _inputs((StepItem(1, start, tuple(ids), table), *others))
        token_ids = np.asarray([*ids, *range(beside)])
        rows = np.arange(len(ids))
        return self.model.forward(token_ids, inputs, self.kv, rows, lambda layer: None).cpu()


@pytest.mark.parametrize("attention", ["triton", "gathered", "dense"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path, name, attention):
    reference = random_model(tmp_path, name)
    prompt = [random.Random(5).randrange(96) for _ in range(120)]
    ours = OneSequence(tmp_path, attention).logits(0, prompt)
    with torch.no_grad():
        theirs = reference(torch.tensor([prompt])).logits[0]
        expected = reference.generate(
            torch.tensor([prompt[:20]]),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert (ours - theirs).abs().max() < 1e-3

    # In chunks, so that a step attends to what earlier steps stored.
    sequence = OneSequence(tmp_path, attention)
    sequence.logits(0, prompt[:13])
    tokens = prompt[:20]
    start = 13
    for _ in range(30):
        row = sequence.logits(start, tokens[start:])[-1]
        start = len(tokens)
        tokens.append(int(row.argmax()))
    assert tokens == expected[0].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gemma2", "qwen3-moe", "mistral-window"])
def test_logits_are_bitwise_equal_alone_batched_chunked_and_decoded_again(tmp_path, name, dtype):
    random_model(tmp_path, name, **WIDE)
    sequence = OneSequence(tmp_path, "triton", dtype)
    prompt = [random.Random(5).randrange(96) for _ in range(300)]
    whole = sequence.logits(0, prompt)
    kv = sequence.kv.clone()
    assert torch.equal(sequence.logits(0, prompt, beside=33), whole)
    for begin, end, beside in ((0, 16, 0), (16, 150, 7), (150, 290, 40)):
        assert torch.equal(sequence.logits(begin, prompt[begin:end], beside), whole[begin:end])
    for at in range(290, 300):
        assert torch.equal(sequence.logits(at, [prompt[at]], at % 40)[0], whole[at])
    assert torch.equal(sequence.kv[:, 1:19], kv[:, 1:19])
