"""Paged attention on GPUs as one kernel, batch-invariant: a row's bits depend on that row alone.

Owns one backend of `engine.model.attention`'s protocol. Does not know streams or the pool's stage.

A program attends some rows of one sequence, with all query heads that share a KV head, to tiles of
64 positions in ascending order with an online softmax (arXiv:1805.02867); K and V are read through
the block table, so nothing is gathered (PagedAttention, arXiv:2309.06180). Every product has the
same shape in every step, and a position that a row does not see changes none of its bits. So
prefill, chunks, decode and re-prefill are bitwise equal, as on the CPU: what a long context would
gain from more than one program a row is not taken yet.

Where `HAS_TRITON` is false nothing here may be called.

Dimension key: as in `engine.model.attention`; G = H / K query heads of a KV head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.model.attention import AttentionInputs, AttentionRules
from engine.model.triton_products import HAS_TRITON

TILE_QUERIES = 64
"""Rows times query heads of a product; one number for decode and prefill, as bits depend on it."""
TILE_POSITIONS = 64

if HAS_TRITON:
    import triton
    import triton.language as tl

    # Not compiled anew for widths of tables that 16 divides.
    @triton.jit(do_not_specialize=["table_stride"])  # type: ignore[untyped-decorator,unused-ignore]
    def _attend(  # type: ignore[no-untyped-def]
        q_ptr,
        kv_ptr,
        out_ptr,
        tiles_ptr,
        tables_ptr,
        table_stride,
        scale,
        softcap,
        NUM_KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        PADDED_GROUP: tl.constexpr,
        HEAD: tl.constexpr,
        PADDED_HEAD: tl.constexpr,
        BLOCK: tl.constexpr,
        WINDOW: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        QUERIES: tl.constexpr,
        POSITIONS: tl.constexpr,
    ):
        """Attend one tile of rows with one KV head; grid (tiles, K)."""
        tile = tiles_ptr + tl.program_id(0) * 4
        kv_head = tl.program_id(1)
        first_row = tl.load(tile)
        num_rows = tl.load(tile + 1)
        table = tables_ptr + tl.load(tile + 2).to(tl.int64) * table_stride
        first_position = tl.load(tile + 3)

        query = tl.arange(0, QUERIES)
        row = query // PADDED_GROUP
        member = query % PADDED_GROUP
        dim = tl.arange(0, PADDED_HEAD)
        is_query = (row < num_rows) & (member < GROUP)
        head = kv_head * GROUP + member
        at = ((first_row + row).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head) * HEAD
        is_used = is_query[:, None] & (dim < HEAD)[None, :]
        q = tl.load(q_ptr + at[:, None] + dim[None, :], mask=is_used, other=0.0)
        position = first_position + row

        top = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        folded = tl.zeros([QUERIES, PADDED_HEAD], tl.float32)
        end = first_position + num_rows
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(first_position - WINDOW + 1, 0) // POSITIONS * POSITIONS
        for start in range(begin, end, POSITIONS):
            column = start + tl.arange(0, POSITIONS)
            # What lies behind the last row may be anything, a NaN too: it is not read.
            is_there = column < end
            block = tl.load(table + column // BLOCK, mask=is_there, other=0)
            slot = block.to(tl.int64) * (2 * BLOCK) + column % BLOCK
            k_at = (slot * NUM_KV_HEADS + kv_head) * HEAD
            v_at = ((slot + BLOCK) * NUM_KV_HEADS + kv_head) * HEAD
            is_kept = is_there[:, None] & (dim < HEAD)[None, :]
            k = tl.load(kv_ptr + k_at[:, None] + dim[None, :], mask=is_kept, other=0.0)
            v = tl.load(kv_ptr + v_at[:, None] + dim[None, :], mask=is_kept, other=0.0)

            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if HAS_SOFTCAP:
                # tanh(x) = 2 sigmoid(2 x) - 1
                scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
            is_seen = column[None, :] <= position[:, None]
            if WINDOW > 0:
                is_seen = is_seen & (column[None, :] > position[:, None] - WINDOW)
            scores = tl.where(is_seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            # A row that has seen nothing yet keeps zeros: -inf less -inf would be a NaN.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp(scores - base[:, None])
            kept = tl.exp(top - base)
            total = total * kept + tl.sum(weights, 1)
            folded = folded * kept[:, None]
            folded += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = new_top

        out = folded / tl.where(total == 0.0, 1.0, total)[:, None]
        target = out_ptr + at[:, None] + dim[None, :]
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=is_used)


class TritonAttention:
    """The backend; it remembers the tiles of the step whose layers are being computed."""

    def __init__(self) -> None:
        """Remember no step."""
        self._step: AttentionInputs | None = None
        self._tiles = torch.empty(0)
        self._tables = torch.empty(0)

    def __call__(
        self, q: Tensor, kv: Tensor, inputs: AttentionInputs, rules: AttentionRules
    ) -> Tensor:
        """See `AttentionBackend`; kv is contiguous."""
        num_heads, head_size = q.shape[1:]
        num_kv_heads = kv.shape[3]
        group = num_heads // num_kv_heads
        padded_group = triton.next_power_of_2(group)
        if self._step is not inputs:
            tiles = tiles_of(inputs, TILE_QUERIES // padded_group)
            self._tiles = torch.from_numpy(tiles).to(q.device)
            self._tables = torch.from_numpy(inputs.block_tables.astype(np.int32)).to(q.device)
            self._step = inputs
        # Rows of padding belong to no sequence and stay zero.
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        _attend[len(self._tiles), num_kv_heads](
            q.contiguous(),
            kv,
            out,
            self._tiles,
            self._tables,
            self._tables.stride(0),
            rules.scale,
            rules.softcap,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            PADDED_GROUP=padded_group,
            HEAD=head_size,
            PADDED_HEAD=max(16, triton.next_power_of_2(head_size)),
            BLOCK=kv.shape[2],
            WINDOW=rules.window,
            HAS_SOFTCAP=rules.softcap > 0,
            QUERIES=TILE_QUERIES,
            POSITIONS=TILE_POSITIONS,
        )
        return out


def tiles_of(inputs: AttentionInputs, rows: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Cut each sequence's rows of a step into tiles of at most `rows`.

    Returns:
        int32 [tiles, 4]: first row, number of rows, sequence, position of the first row.
    """
    starts = inputs.row_starts
    counts = -(-np.diff(starts) // rows)
    sequences = np.repeat(np.arange(len(counts)), counts)
    # Which of its sequence's tiles each one is.
    ordinals = np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)
    first_rows = starts[sequences] + ordinals * rows
    sizes = np.minimum(starts[sequences + 1] - first_rows, rows)
    tiles = [first_rows, sizes, sequences, inputs.positions[first_rows]]
    return np.stack(tiles, axis=1).astype(np.int32)
