"""Kernels for GPUs against the oracles, interpreted: indices, masks and sums, not speed or bits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.model.attention import AttentionInputs, AttentionRules, dense_attention
from engine.model.triton_attention import TritonAttention, tiles_of
from engine.model.triton_products import SHAPES, product

# The interpreter has no bf16.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2}


def step_of(heads, lengths, counts, block, dtype):
    """q, a pool and inputs of a step whose sequences are `lengths` long and compute the last
    `counts` rows; what lies behind a sequence is NaN, and three rows are padding."""
    num_heads, num_kv_heads, head_size = heads
    generator = torch.Generator().manual_seed(3)
    width = -(-max(lengths) // block)
    kv_shape = (len(lengths) * width + 1, 2, block, num_kv_heads, head_size)
    kv = torch.randn(kv_shape, generator=generator).to(dtype)
    order = torch.randperm(kv_shape[0] - 1, generator=generator).numpy() + 1
    tables = np.zeros((len(lengths), width + 1), np.int64)
    for s, length in enumerate(lengths):
        num_blocks = -(-length // block)
        tables[s, :num_blocks] = order[s * width : s * width + num_blocks]
        kv[tables[s, num_blocks - 1], :, (length - 1) % block + 1 :] = float("nan")
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    q = torch.randn(sum(counts) + 3, num_heads, head_size, generator=generator).to(dtype)
    return q, kv, AttentionInputs(positions, np.cumsum([0, *counts]), tables)


@pytest.mark.parametrize(
    ("heads", "dtype", "block", "window", "softcap"),
    [
        ((4, 2, 16), torch.float32, 8, 0, 0.0),
        ((14, 2, 64), torch.float32, 16, 20, 5.0),
        ((3, 1, 24), torch.float16, 8, 20, 0.0),
        ((4, 4, 32), torch.float16, 16, 0, 5.0),
        ((8, 1, 40), torch.float32, 32, 70, 0.0),
    ],
)
def test_attention_equals_the_oracle(heads, dtype, block, window, softcap):
    """Decoding rows and chunks mixed, tables out of order, groups and head sizes of no power of
    two."""
    q, kv, inputs = step_of(heads, [33, 5, 64, 150, 1], [1, 1, 20, 70, 1], block, dtype)
    rules = AttentionRules(heads[2] ** -0.5, softcap, window)
    ours = TritonAttention()(q, kv, inputs, rules)
    theirs = dense_attention(q, kv, inputs, rules)
    assert not ours.isnan().any()
    assert (ours.float() - theirs.float()).abs().max() < TOLERANCE[dtype]


def test_a_backend_takes_the_next_step_as_its_own():
    backend = TritonAttention()
    rules = AttentionRules(0.25)
    for lengths, counts in (([40, 9], [1, 1]), ([70], [70])):
        q, kv, inputs = step_of((4, 2, 16), lengths, counts, 8, torch.float32)
        theirs = dense_attention(q, kv, inputs, rules)
        for _ in range(2):  # each layer of the step
            assert (backend(q, kv, inputs, rules) - theirs).abs().max() < 2e-5


def test_tiles_stay_within_their_sequence():
    positions = np.concatenate([np.arange(10, 19), np.arange(3, 4), np.arange(0, 8)])
    inputs = AttentionInputs(positions, np.array([0, 9, 10, 18]), np.zeros((3, 1), np.int64))
    assert tiles_of(inputs, 4).tolist() == [
        [0, 4, 0, 10],
        [4, 4, 0, 14],
        [8, 1, 0, 18],
        [9, 1, 1, 3],
        [10, 4, 2, 0],
        [14, 4, 2, 4],
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [(1, 96, 64), (70, 130, 112), (129, 40, 320)],
)
def test_products_of_every_shape_equal_torchs(shape, rows, outputs, inputs):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, inputs, generator=generator).half()
    weight = (0.1 * torch.randn(outputs, inputs, generator=generator)).half()
    for bias in (None, torch.randn(outputs, generator=generator).half()):
        theirs = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        assert (product(x, weight, bias, shape) - theirs).abs().max() < 5e-3
