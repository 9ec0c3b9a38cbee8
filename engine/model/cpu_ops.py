"""Compiled CPU kernels for what lies between the products: norms, rotary, KV writes, gating.

Owns numba kernels over raw fp32 and bf16 numbers, and their torch-facing wrappers. Does not know
weights' names or layers, nor attention itself (`engine.model.attention`).

One token through a small model is a hundred torch calls of microseconds each; these are five a
layer. A row's result depends on that row alone, and rows of padding are zeroed, never computed.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from engine.model.attention import FASTMATH, AttentionInputs

SQRT_2_OVER_PI = np.float32(0.7978845608028654)
COMPILED_DTYPES = (torch.float32, torch.bfloat16)
Array = np.ndarray[Any, Any]
NO_WEIGHT: Array = np.empty(0, dtype=np.float32)
"""In place of a norm's weight: do not normalise."""


def bits(x: Tensor) -> Array:
    """Raw numbers of a contiguous tensor: uint32 for fp32, uint16 for bf16; not copied."""
    if x.dtype is torch.float32:
        return x.numpy().view(np.uint32)
    return x.view(torch.int16).numpy().view(np.uint16)


def _shift(x: Tensor) -> np.uint32:
    return np.uint32(0 if x.dtype is torch.float32 else 16)  # bf16 is the upper half of fp32


@numba.njit(inline="always")
def _to_fp32(raw, shift):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(raw) << shift).view(np.float32)


@numba.njit(inline="always")
def _from_fp32(value, shift):  # type: ignore[no-untyped-def]
    """Back to the stored dtype, rounded to nearest even, as torch does."""
    raw = np.float32(value).view(np.uint32)
    if shift:
        raw = np.uint32(
            # Just under half of the last bit kept, plus that bit: ties go to even.
            (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        )
    return raw


@numba.njit(fastmath=FASTMATH, cache=True)
def _rms_norm(x, weight, eps, shift, rows, out):  # type: ignore[no-untyped-def]
    size = x.shape[1]
    for t in range(rows):
        total = np.float32(0.0)
        for c in range(size):
            value = _to_fp32(x[t, c], shift)
            total += value * value
        scale = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        for c in range(size):
            out[t, c] = _from_fp32(_to_fp32(x[t, c], shift) * scale * weight[c], shift)
    # Padding has to be finite, because products compute it, and nothing else.
    for t in range(rows, x.shape[0]):
        for c in range(size):
            out[t, c] = 0


@numba.njit(fastmath=FASTMATH, cache=True)
def _gate(x, shift, is_gelu, rows, out):  # type: ignore[no-untyped-def]
    size = x.shape[1] // 2
    for t in range(rows):
        for c in range(size):
            g = _to_fp32(x[t, c], shift)
            if is_gelu:
                # The tanh form of GELU (arXiv:1606.08415), as torch's `approximate="tanh"`.
                inner = SQRT_2_OVER_PI * (g + np.float32(0.044715) * g * g * g)
                g = np.float32(0.5) * g * (np.float32(1.0) + np.tanh(inner))
            else:
                g = g / (np.float32(1.0) + np.exp(-g))
            out[t, c] = _from_fp32(g * _to_fp32(x[t, size + c], shift), shift)
    for t in range(rows, x.shape[0]):
        for c in range(size):
            out[t, c] = 0


@numba.njit(inline="always", fastmath=FASTMATH)
def _norm_and_rotate(row, first, weight, eps, cos, sin, shift, out):  # type: ignore[no-untyped-def]
    """Norm (if there is a weight) and rotate one head into fp32 `out`."""
    size = out.shape[0]
    half = cos.shape[0]
    scale = np.float32(1.0)
    if weight.shape[0]:
        total = np.float32(0.0)
        for d in range(size):
            value = _to_fp32(row[first + d], shift)
            total += value * value
        scale = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        for d in range(size):
            out[d] = _to_fp32(row[first + d], shift) * scale * weight[d]
    else:
        for d in range(size):
            out[d] = _to_fp32(row[first + d], shift)
    # Pairs are (d, d + half), as checkpoints of transformers have them; RoFormer pairs neighbours.
    for d in range(half):
        a, b = out[d], out[d + half]
        out[d] = a * cos[d] - b * sin[d]
        out[d + half] = b * cos[d] + a * sin[d]


@numba.njit(fastmath=FASTMATH, cache=True)
def _rotate_and_store(  # type: ignore[no-untyped-def]
    qkv,
    q_weight,
    k_weight,
    eps,
    cos,
    sin,
    shift,
    positions,
    row_starts,
    tables,
    kv,
    q_out,
):
    block_size, num_kv_heads, head_size = kv.shape[2], kv.shape[3], kv.shape[4]
    num_heads = q_out.shape[1]
    k = np.empty(head_size, dtype=np.float32)
    for s in range(row_starts.shape[0] - 1):
        for t in range(row_starts[s], row_starts[s + 1]):
            position = positions[t]
            # Straight into the pool: K and V of a step exist nowhere else.
            block, at = tables[s, position // block_size], position % block_size
            for h in range(num_heads):
                _norm_and_rotate(
                    qkv[t],
                    h * head_size,
                    q_weight,
                    eps,
                    cos[position],
                    sin[position],
                    shift,
                    q_out[t, h],
                )
                if shift:  # what other backends keep in bf16 is rounded here too
                    for d in range(head_size):
                        q_out[t, h, d] = _to_fp32(_from_fp32(q_out[t, h, d], shift), shift)
            for h in range(num_kv_heads):
                first = (num_heads + h) * head_size
                _norm_and_rotate(
                    qkv[t], first, k_weight, eps, cos[position], sin[position], shift, k
                )
                for d in range(head_size):
                    kv[block, 0, at, h, d] = _from_fp32(k[d], shift)
                    # V is stored as it came, neither normed nor rotated.
                    kv[block, 1, at, h, d] = qkv[t, first + num_kv_heads * head_size + d]


def rms_norm(x: Tensor, weight: Array, eps: float, rows: int) -> Tensor:
    """Normalise the first `rows` rows of [T, C]; weight is fp32 [C], any offset already added."""
    out = torch.empty_like(x)
    _rms_norm(bits(x), weight, np.float32(eps), _shift(x), rows, bits(out))
    return out


def gate(x: Tensor, rows: int, *, is_gelu: bool) -> Tensor:
    """activation(first half) * second half of [T, 2F]."""
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
    _gate(bits(x), _shift(x), is_gelu, rows, bits(out))
    return out


def rotate_and_store(
    qkv: Tensor,
    norm_weights: tuple[Array, Array],
    eps: float,
    rotation: tuple[Array, Array],
    inputs: AttentionInputs,
    kv: Tensor,
    q_out: Array,
) -> None:
    """Write rotated queries to `q_out`, rotated keys and values into the pool's layer.

    Args:
        qkv: [T, (H + 2K) D].
        norm_weights: fp32 [D] for queries and for keys, or `NO_WEIGHT`.
        eps: Of the norms.
        rotation: Cosines and sines by position, fp32 [positions, D' / 2]; D' is rotated.
        inputs: Positions and block tables of the rows.
        kv: One layer of the pool, [N, 2, B, K, D].
        q_out: fp32 [t, H, D].
    """
    _rotate_and_store(
        bits(qkv),
        *norm_weights,
        np.float32(eps),
        *rotation,
        _shift(qkv),
        inputs.positions,
        inputs.row_starts,
        inputs.block_tables,
        bits(kv),
        q_out,
    )
