"""Paged attention for devices: the context gathered through block tables, the products torch's own.

Owns one backend of `engine.model.attention`'s protocol. Does not know kernels of its own: outside
the CPU the library's are the better ones.

All sequences with one row (decoding) are one padded call, each longer one (a prompt's chunk) a call
of its own. Sums follow the kernel torch picks for the shape, so rows are not bitwise the same in
every batch: this is for devices that `engine.model.triton_attention` does not reach.

Dimension key: as in `engine.model.attention`; L positions of the longest context.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.attention import AttentionInputs, AttentionRules, dense_attention


def gathered_attention(
    q: Tensor, kv: Tensor, inputs: AttentionInputs, rules: AttentionRules
) -> Tensor:
    """See `AttentionBackend`; soft caps, which torch's kernels lack, go to the oracle."""
    if rules.softcap:
        return dense_attention(q, kv, inputs, rules)
    # Padding attends to nothing.
    out = torch.zeros_like(q)
    counts = np.diff(inputs.row_starts)
    # All that decode in one call: they differ in length alone, and the mask sees to that.
    single = np.flatnonzero(counts == 1)
    if len(single):
        rows = torch.as_tensor(inputs.row_starts[single], device=q.device)
        out[rows] = _attend(q[rows][:, :, None], kv, inputs, single, rules)[:, :, 0]
    for s in np.flatnonzero(counts > 1):
        begin, end = int(inputs.row_starts[s]), int(inputs.row_starts[s + 1])
        queries = q[begin:end].transpose(0, 1)[None]
        out[begin:end] = _attend(queries, kv, inputs, np.array([s]), rules)[0].transpose(0, 1)
    return out


def _attend(
    q: Tensor,
    kv: Tensor,
    inputs: AttentionInputs,
    sequences: np.ndarray[tuple[int], np.dtype[np.int64]],
    rules: AttentionRules,
) -> Tensor:
    """Attend rows q [S, H, t, D] of some sequences, t the same for all, to their contexts."""
    block_size = kv.shape[2]
    num_rows = q.shape[2]
    starts = inputs.row_starts[sequences]
    positions = inputs.positions[starts[:, None] + np.arange(num_rows)]
    # As long as the longest of them; the mask hides what the shorter ones have not.
    length = int(positions.max()) + 1
    tables = torch.as_tensor(
        inputs.block_tables[sequences, : -(-length // block_size)], device=q.device
    )
    context = kv[tables].transpose(1, 2).flatten(2, 3)[:, :, :length]  # [S, 2, L, K, D]
    k, v = (part.transpose(1, 2) for part in context.unbind(1))
    seen = torch.as_tensor(positions, device=q.device)[:, None, :, None]
    columns = torch.arange(length, device=q.device)
    mask = columns <= seen
    if rules.window:
        mask &= columns > seen - rules.window
    # What lies behind a sequence's own end is somebody else's, and may be a NaN: weighed with zero
    # it would stay one.
    is_unseen = ~mask.any(dim=2)[:, :, :, None]
    k, v = k.masked_fill(is_unseen, 0.0), v.masked_fill(is_unseen, 0.0)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=rules.scale, enable_gqa=True
    )
