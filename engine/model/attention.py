"""Paged attention: one protocol, a dense oracle for any device, a compiled kernel for CPU.

Owns reading K and V through block tables. Does not know projections or sampling.

Dimension key: T token rows, S sequences, M blocks in the longest table, H query heads, K KV heads,
G = H / K, D head size, N blocks in the pool, B tokens per block.

The CPU kernel visits tiles of 16 positions in ascending order with an online softmax
(arXiv:1805.02867), one query row at a time. What a row does never depends on other rows nor on the
block size, so prefill, chunks, decode and re-prefill give bitwise equal results: batch invariance
by construction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numba
import numpy as np
import torch
from torch import Tensor

# No `nnan` or `ninf`: scores may be infinite. `reassoc` lets dot products vectorise.
FASTMATH = {"reassoc", "nsz", "arcp", "contract"}
TILE = 16
"""Positions folded at once; fixed, because the order of sums must not follow the block size."""


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Where each row stands."""

    positions: np.ndarray[Any, Any]
    """int64 [T]."""
    row_starts: np.ndarray[Any, Any]
    """int64 [S + 1]: rows of sequence s are `row_starts[s]` to `row_starts[s + 1]`."""
    block_tables: np.ndarray[Any, Any]
    """int64 [S, M]."""


@dataclass(frozen=True, slots=True)
class AttentionRules:
    """What a layer does to its scores."""

    scale: float
    softcap: float = 0.0
    """0: off."""
    window: int = 0
    """Positions that a row sees, its own included; 0: every earlier one."""


class AttentionBackend(Protocol):
    """Attention over one layer of the pool."""

    def __call__(
        self, q: Tensor, kv: Tensor, inputs: AttentionInputs, rules: AttentionRules
    ) -> Tensor:
        """Attend causally.

        Args:
            q: [T, H, D], rotated.
            kv: One layer of the pool, [N, 2, B, K, D], this step's K and V already written.
            inputs: Rows, positions, block tables.
            rules: Scale, soft cap and window of this layer.

        Returns:
            [T, H, D] in q's dtype.
        """
        ...


def dense_attention(
    q: Tensor, kv: Tensor, inputs: AttentionInputs, rules: AttentionRules
) -> Tensor:
    """Gather each sequence's whole context and do plain softmax attention in fp32: the oracle."""
    # Rows of padding belong to no sequence and stay zero.
    out = torch.zeros_like(q)
    _, _, block_size, num_kv_heads, head_size = kv.shape
    for s in range(len(inputs.row_starts) - 1):
        begin, end = int(inputs.row_starts[s]), int(inputs.row_starts[s + 1])
        # Slots behind a sequence's last position may hold anything, so its context ends there.
        length = int(inputs.positions[end - 1]) + 1
        table = torch.as_tensor(inputs.block_tables[s, : -(-length // block_size)], device=q.device)
        context = (
            kv[table].transpose(0, 1).reshape(2, -1, num_kv_heads, head_size)[:, :length].float()
        )
        # One KV head serves a group of query heads (arXiv:2305.13245): the oracle copies it.
        k, v = context.repeat_interleave(q.shape[1] // num_kv_heads, dim=2)
        scores = torch.einsum("thd,chd->htc", q[begin:end].float(), k) * rules.scale
        # Gemma 2 bounds its scores before they are masked (arXiv:2408.00118).
        if rules.softcap:
            scores = rules.softcap * torch.tanh(scores / rules.softcap)
        positions = torch.as_tensor(inputs.positions[begin:end], device=q.device)
        columns = torch.arange(length, device=q.device)[None, :]
        is_hidden = columns > positions[:, None]
        if rules.window:
            is_hidden |= columns <= positions[:, None] - rules.window
        weights = scores.masked_fill(is_hidden, -math.inf).softmax(-1)
        out[begin:end] = torch.einsum("htc,chd->thd", weights, v).to(q.dtype)
    return out


# How a stored number becomes fp32: (its unsigned type, magnitude mask and shift, sign mask and
# shift, factor). bf16 is the upper half of fp32; an fp16's bits, shifted into place, are 2**112 too
# small, subnormals included.
_FORMS = {
    torch.float32: (np.uint32, 0xFFFFFFFF, 0, 0, 0, 1.0),
    torch.bfloat16: (np.uint16, 0xFFFF, 16, 0, 0, 1.0),
    torch.float16: (np.uint16, 0x7FFF, 13, 0x8000, 16, 2.0**112),
}


def cpu_attention(q: Tensor, kv: Tensor, inputs: AttentionInputs, rules: AttentionRules) -> Tensor:
    """Attend with the compiled kernel; fp32 sums whatever the dtype of the pool."""
    # Only real rows: nobody reads what padding attends to.
    rows = int(inputs.row_starts[-1])
    # The kernel adds to `out`, so it has to start at zero.
    out = np.zeros(tuple(q.shape), dtype=np.float32)
    attend_rows(q[:rows].float().numpy(), kv, inputs, rules, out)
    return torch.from_numpy(out).to(q.dtype)


def attend_rows(
    q: np.ndarray[Any, Any],
    kv: Tensor,
    inputs: AttentionInputs,
    rules: AttentionRules,
    out: np.ndarray[Any, Any],
) -> None:
    """Attend fp32 queries [t, H, D] into zeroed fp32 `out`, at least as long."""
    unsigned, mask, shift, sign_mask, sign_shift, factor = _FORMS[kv.dtype]
    # Numba knows neither bf16 nor fp16: it gets their bits as integers and widens them itself.
    bits = kv.view(torch.int16 if unsigned is np.uint16 else torch.int32).numpy().view(unsigned)
    form = np.array([mask, shift, sign_mask, sign_shift], dtype=np.uint32)
    numbers = np.array([rules.scale, rules.softcap, factor], dtype=np.float32)
    _attend(
        q,
        bits,
        form,
        numbers,
        rules.window,
        inputs.positions,
        inputs.row_starts,
        inputs.block_tables,
        out,
    )


LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)


@numba.njit(cache=True)
def _exp(x):  # type: ignore[no-untyped-def]
    """e**x for x <= 0 to 4e-7, as straight-line code that becomes vector instructions in a loop.

    A NaN stays one: a damaged key must fail its own sequence, not vanish from the sum. No fast-math
    here: the reduced argument needs its two roundings. Source: Cephes, expf.
    """
    # Below that e**x is no normal fp32 number. A NaN fails the comparison, and so stays one.
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    # x = n ln 2 + r: 2**n is exact, and e**r needs few terms for so small an r.
    n = np.floor(x * LOG2_E + np.float32(0.5))
    # ln 2 in two pieces (Cody and Waite): n * LN2_HIGH is exact, so r keeps its last bits.
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    # 2**n, put together from its exponent bits.
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(fastmath=FASTMATH, inline="always")
def _attend_tile(q, k, v, first, valid, scale, softcap, out, state):  # type: ignore[no-untyped-def]
    """Fold positions `first` to `valid` of a tile (k, v: fp32 [TILE, D]) into one row's output.

    state = [running max, running sum].
    """
    head_size = q.shape[0]
    scores = np.empty(k.shape[0], dtype=np.float32)
    # Online softmax: sums so far are scaled down when a larger score comes.
    top = state[0]
    for j in range(first, valid):
        # A plain 0.0 would make Numba sum in fp64.
        dot = np.float32(0.0)
        for d in range(head_size):
            dot += q[d] * k[j, d]
        score = dot * scale
        if softcap > 0:
            score = softcap * np.tanh(score / softcap)
        scores[j] = score
        top = max(top, score)
    # Nothing was summed before the first tile: the old maximum is -inf, and -inf scales nothing.
    correction = _exp(state[0] - top) if state[1] > 0 else np.float32(0.0)
    total = state[1] * correction
    for d in range(head_size):
        out[d] *= correction
    # The whole tile, with zeros outside: how many numbers are added never depends on the window.
    for j in range(TILE):
        scores[j] = _exp(scores[j] - top) if first <= j < valid else np.float32(0.0)
        total += scores[j]
    # Four positions at once: `out` is read and written a quarter as often.
    for j in range(0, valid, 4):
        a, b, c, e = scores[j], scores[j + 1], scores[j + 2], scores[j + 3]
        for d in range(head_size):
            out[d] += (a * v[j, d] + b * v[j + 1, d]) + (c * v[j + 2, d] + e * v[j + 3, d])
    state[0] = top
    state[1] = total


@numba.njit(cache=True)
def _widen(row, mask, shift, sign_mask, sign_shift, factor, out):  # type: ignore[no-untyped-def]
    """One stored row to fp32: a loop of its own, so that it becomes vector instructions.

    The factor is applied here and not to the sums: products of unscaled fp16 numbers would be
    denormal.
    """
    for d in range(out.shape[0]):
        raw = np.uint32(row[d])
        bits = ((raw & mask) << shift) | ((raw & sign_mask) << sign_shift)
        out[d] = np.uint32(bits).view(np.float32) * factor


@numba.njit(fastmath=FASTMATH, cache=True)
def _attend(  # type: ignore[no-untyped-def]
    q, kv, form, numbers, window, positions, row_starts, block_tables, out
):
    _, _, block_size, num_kv_heads, head_size = kv.shape
    group = q.shape[1] // num_kv_heads
    mask, shift, sign_mask, sign_shift = form[0], form[1], form[2], form[3]
    scale, softcap, factor = numbers[0], numbers[1], numbers[2]
    # Maximum and sum of each row and query head while the tiles of its sequence pass.
    state = np.empty((q.shape[0], group, 2), dtype=np.float32)
    k = np.empty((TILE, head_size), dtype=np.float32)
    v = np.empty((TILE, head_size), dtype=np.float32)
    for s in range(row_starts.shape[0] - 1):
        begin, end = row_starts[s], row_starts[s + 1]
        length = positions[end - 1] + 1
        # What the first row does not see any more, no later row sees.
        oldest = max(0, positions[begin] + 1 - window) if window > 0 else 0
        for h in range(num_kv_heads):
            for t in range(begin, end):
                for g in range(group):
                    state[t, g, 0] = -np.inf
                    state[t, g, 1] = 0.0
            # A tile is widened once and then serves all rows and query heads of its KV head.
            for b in range(oldest // TILE, (length + TILE - 1) // TILE):
                filled = min(TILE, length - b * TILE)
                v[filled:] = 0  # weighed with zero below: a NaN of somebody else's would stay one
                # By position and not by block: a tile holds the same rows whatever the block size.
                for j in range(filled):
                    block = block_tables[s, (b * TILE + j) // block_size]
                    at = (b * TILE + j) % block_size
                    _widen(kv[block, 0, at, h], mask, shift, sign_mask, sign_shift, factor, k[j])
                    _widen(kv[block, 1, at, h], mask, shift, sign_mask, sign_shift, factor, v[j])
                for t in range(begin, end):
                    first = max(0, positions[t] + 1 - window - b * TILE) if window > 0 else 0
                    # Causal: a row sees positions up to its own.
                    valid = min(TILE, positions[t] + 1 - b * TILE)
                    if valid > first:
                        for g in range(group):
                            _attend_tile(
                                q[t, h * group + g],
                                k,
                                v,
                                first,
                                valid,
                                scale,
                                softcap,
                                out[t, h * group + g],
                                state[t, g],
                            )
            for t in range(begin, end):
                for g in range(group):
                    for d in range(head_size):
                        # Once at the end: dividing in every tile would round in every tile.
                        out[t, h * group + g, d] /= state[t, g, 1]
