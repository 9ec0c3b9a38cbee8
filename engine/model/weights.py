"""Safetensors to tensors, and linear products whose rows do not depend on the batch.

Owns loading and the two product recipes. Does not know the model's structure.

Batch invariance on CPU (ADR 2 has the measurements): fp32 products with prepacked oneDNN weights
are bitwise equal for every number of rows from 2 up; bf16 ones are not on every CPU (AMX changes
its summation with the number of rows), but are for a fixed number of rows. So fp32 is padded to 4
rows, bf16 is computed in tiles of exactly 32 rows. Weights of a dtype of which the CPU has no
products are kept as fp32: sums are fp32 and every result is rounded, as on a GPU. That is fp16 on
every CPU, and bf16 on those without AVX-512. On a GPU (ADR 19) 16-bit types have a kernel of their
own, and fp32 the library's in tiles of one size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import ModelLoadError
from engine.model.sharding import ROWS, Cut, Shard
from engine.model.triton_products import HAS_TRITON, product

TILE_ROWS = 32
DEVICE_TILE_ROWS = 128
MIN_ROWS = 4
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default
"""The overload itself: looking it up by arguments costs microseconds a call."""
HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_BF16_PRODUCTS = not HAS_ONEDNN or torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Without oneDNN torch has slow ones of its own."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tensors(shard: Shard, device: torch.device) -> dict[str, Tensor]:
    """Load a rank's part of every expected tensor in the spec's dtype; the rest is never read.

    Raises:
        ModelLoadError: A file cannot be read.
    """
    spec = shard.spec
    tensors: dict[str, Tensor] = {}
    by_file: dict[str, list[str]] = {}
    for name in filter(shard.has, spec.expected_tensors()):
        # File by file, so that each is opened once.
        by_file.setdefault(spec.tensor_files[name], []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(spec.folder / file, framework="pt", device="cpu") as opened:
                for name in names:
                    tensors[name] = _read(opened, name, shard.cut(name)).to(
                        device=device, dtype=DTYPES[spec.dtype]
                    )
        except SafetensorError as error:
            raise ModelLoadError(f"{file} cannot be read: {error}") from error
    return tensors


def _read(opened: Any, name: str, cut: Cut | None) -> Tensor:  # noqa: ANN401 - it has no types
    if cut is None:
        whole: Tensor = opened.get_tensor(name)
        return whole
    # Slices come straight from the file: a rank never holds the whole tensor.
    source = opened.get_slice(name)
    parts = [
        source[r.start : r.stop] if cut.axis == ROWS else source[:, r.start : r.stop]
        for r in cut.ranges
    ]
    return torch.cat(parts, dim=cut.axis)


def is_widened(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether products of this dtype are computed in fp32 and rounded."""
    if device.type != "cpu":
        return False
    return dtype is torch.float16 or (dtype is torch.bfloat16 and not HAS_BF16_PRODUCTS)


def padded_rows(num_rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows to compute so that products of this dtype are batch-invariant."""
    if device.type != "cpu":
        return num_rows if is_one_launch(dtype, device) else _in_tiles(num_rows, DEVICE_TILE_ROWS)
    # Without oneDNN no kernel is known to be invariant, so fp32 is tiled, too.
    if HAS_ONEDNN and (dtype is torch.float32 or is_widened(dtype, device)):
        return max(num_rows, MIN_ROWS)
    return _in_tiles(num_rows, TILE_ROWS)


def _in_tiles(num_rows: int, tile_rows: int) -> int:
    return -(-num_rows // tile_rows) * tile_rows


def is_one_launch(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether products are computed by a kernel of ours, for any number of rows."""
    return device.type == "cuda" and HAS_TRITON and dtype is not torch.float32


class Linear:
    """y = x @ w.T + b. Source of the prepacked calls: torch's own inductor lowering."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Prepack a weight [out, in] for this device."""
        is_cpu = weight.device.type == "cpu"
        self._dtype = weight.dtype
        self._is_widened = is_widened(weight.dtype, weight.device)
        if self._is_widened:
            weight, bias = weight.float(), None if bias is None else bias.float()
        self._is_packed = is_cpu and HAS_ONEDNN
        self._is_one_launch = is_one_launch(weight.dtype, weight.device)
        is_whole = self._is_one_launch or (self._is_packed and weight.dtype is torch.float32)
        self._tile_rows = 0 if is_whole else TILE_ROWS if is_cpu else DEVICE_TILE_ROWS
        self._bias = bias
        # A private copy: prepacking may keep a reference, and the embedding must stay plain.
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.clone(), None)
            if self._is_packed
            else weight
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [rows, in], rows from `padded_rows`, to [rows, out]."""
        if self._is_widened:
            return self._product(x.float()).to(self._dtype)
        if self._tile_rows in {0, x.shape[0]}:
            return self._product(x)
        # Tiles of one size have one kernel, and with it one order of sums.
        return torch.cat([self._product(tile) for tile in x.split(self._tile_rows)])

    def _product(self, x: Tensor) -> Tensor:
        if self._is_one_launch:
            return product(x.contiguous(), self._weight, self._bias)
        if self._is_packed:
            y: Tensor = _linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)


class Norm:
    """Root mean square norm; with an offset, Gemma's 1 + weight in fp32."""

    def __init__(self, weight: Tensor, eps: float, *, has_offset: bool) -> None:
        """Keep the weight [size] in the form it is used in."""
        self._eps = eps
        self._has_offset = has_offset
        self._weight = weight.float() + 1.0 if has_offset else weight
        self.numpy_weight = self._weight.float().cpu().numpy()
        """fp32 [size], any offset added: the form compiled kernels take."""

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        # Gemma multiplies in fp32 and rounds last, Llama rounds first: other last bits in bf16.
        if self._has_offset:
            return F.rms_norm(x.float(), self._weight.shape, self._weight, self._eps).to(x.dtype)
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)
