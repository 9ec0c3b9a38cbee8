"""Our transformer on a GPU against transformers on the CPU, for every family."""

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


class OneSequence:
    """A model on a GPU with a pool of its own, fed one sequence."""

    def __init__(self, folder, attention):
        spec = read_model(folder)
        self.model = Model(Shard(spec), torch.device("cuda"), attention)
        shape = (spec.num_layers, 64, 2, BLOCK, spec.num_kv_heads, spec.head_size)
        self.kv = torch.zeros(shape, device="cuda")

    def logits(self, start, ids):
        """Logits of all rows of one step, on the CPU."""
        table = tuple(range(-(-(start + len(ids)) // BLOCK)))
        inputs = _inputs((StepItem(1, start, tuple(ids), table),))
        rows = np.arange(len(ids))
        return self.model.forward(np.asarray(ids), inputs, self.kv, rows, lambda layer: None).cpu()


@pytest.mark.parametrize("attention", ["gathered", "dense"])
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
