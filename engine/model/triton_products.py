"""Linear products on GPUs whose rows do not depend on the batch, in one launch.

Owns one kernel and the shapes of its tiles. Does not know weights or layers.

The library's products choose a kernel, and with it an order of sums, by the number of rows. Here
every output is one accumulator that takes K in ascending order, 16 numbers an instruction, whatever
the number of rows: tiles change which program computes an output and never its bits. Source of the
idea: batch-invariant operators of thinking-machines-lab/batch_invariant_ops.

For 16-bit types; `engine.model.weights` computes fp32 in tiles of one size with the library.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None and (
    torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ
)
"""It comes with torch's CUDA builds; a rank on a CPU spares itself the import."""
SHAPES = (
    (128, 128, 64, 8, 3),
    (64, 64, 128, 4, 3),
    (64, 32, 128, 4, 4),
)
"""Rows, outputs and inputs of a tile, warps and stages, the largest first. Any of them gives the
same bits, which a test on a GPU holds: an output's sum is the same instructions in the same order.
"""
BAND_TILES = 8
"""Rows of tiles whose programs run together, so that they share weights in the cache."""
MIN_TILES = 100
"""About one for each multiprocessor of a large GPU: with fewer the memory's speed is not used."""

if HAS_TRITON:
    import triton
    import triton.language as tl

    # Not compiled anew for numbers of rows that 16 divides.
    @triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator,unused-ignore]
    def _multiply(  # type: ignore[no-untyped-def]
        x_ptr,
        w_ptr,
        bias_ptr,
        y_ptr,
        num_rows,
        num_outputs,
        num_inputs,
        HAS_BIAS: tl.constexpr,
        IS_EVEN: tl.constexpr,
        ROWS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        INPUTS: tl.constexpr,
        BAND: tl.constexpr,
    ):
        """Compute one tile of y = x @ w.T + b; grid (tiles)."""
        tiles_m = tl.cdiv(num_rows, ROWS)
        tiles_n = tl.cdiv(num_outputs, OUTPUTS)
        tile = tl.program_id(0)
        first_m = tile // (BAND * tiles_n) * BAND
        band = min(tiles_m - first_m, BAND)
        tile_m = first_m + tile % (BAND * tiles_n) % band
        tile_n = tile % (BAND * tiles_n) // band
        row = tile_m * ROWS + tl.arange(0, ROWS)
        output = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
        is_row = row < num_rows
        is_output = output < num_outputs
        inner = tl.arange(0, INPUTS)
        x = x_ptr + row.to(tl.int64)[:, None] * num_inputs + inner[None, :]
        w = w_ptr + output.to(tl.int64)[:, None] * num_inputs + inner[None, :]
        y = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for begin in range(0, num_inputs, INPUTS):
            is_x = is_row[:, None]
            is_w = is_output[:, None]
            if not IS_EVEN:
                is_there = begin + inner < num_inputs
                is_x = is_x & is_there[None, :]
                is_w = is_w & is_there[None, :]
            y = tl.dot(
                tl.load(x + begin, mask=is_x, other=0.0),
                tl.trans(tl.load(w + begin, mask=is_w, other=0.0)),
                y,
            )
        if HAS_BIAS:
            y += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
        at = y_ptr + row.to(tl.int64)[:, None] * num_outputs + output[None, :]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Multiply x [rows, in] by weight [out, in] and add bias [out]; all contiguous, of 16 bits.

    Args:
        x: On a GPU.
        weight: Beside it.
        bias: Or none.
        shape: One of `SHAPES`; by default the one for this number of tiles.

    Returns:
        [rows, out] in x's dtype; sums are fp32.
    """
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    rows, outputs, inputs, warps, stages = shape or shape_of(num_rows, num_outputs)
    y = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    _multiply[num_tiles(num_rows, num_outputs, (rows, outputs)),](
        x,
        weight,
        weight if bias is None else bias,
        y,
        num_rows,
        num_outputs,
        num_inputs,
        HAS_BIAS=bias is not None,
        IS_EVEN=num_inputs % inputs == 0,
        ROWS=rows,
        OUTPUTS=outputs,
        INPUTS=inputs,
        BAND=BAND_TILES,
        num_warps=warps,
        num_stages=stages,
    )
    return y


def shape_of(num_rows: int, num_outputs: int) -> tuple[int, ...]:
    """Choose the largest tile of which there are enough, or the smallest."""
    for shape in SHAPES:
        if num_tiles(num_rows, num_outputs, shape) >= MIN_TILES:
            return shape
    return SHAPES[-1]


def num_tiles(num_rows: int, num_outputs: int, shape: tuple[int, ...]) -> int:
    """Count the tiles of a shape (rows, outputs, ...) that cover a result."""
    return -(-num_rows // shape[0]) * -(-num_outputs // shape[1])
