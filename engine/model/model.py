"""One decoder-only transformer for every family of `engine.checkpoint`, over a paged KV cache.

Owns the forward pass. Does not know scheduling, sampling or where weights come from.

Dimension key: T token rows (padded, see `engine.model.weights`), C hidden size, H query heads, K KV
heads, D head size, V vocabulary, R rows to sample, N blocks in the pool, B tokens per block.
Sources: LLaMA, arXiv:2302.13971; GQA, arXiv:2305.13245; rotary embedding, arXiv:2104.09864,
stretched as in Llama 3.1; what families add to it stands in `engine.checkpoint.families`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import InvariantViolation
from engine.checkpoint.families import Rope
from engine.checkpoint.model_spec import ModelSpec
from engine.model import cpu_ops
from engine.model.attention import (
    AttentionBackend,
    AttentionInputs,
    AttentionRules,
    attend_rows,
    cpu_attention,
    dense_attention,
)
from engine.model.collectives import Alone, Collectives
from engine.model.device_attention import gathered_attention
from engine.model.mlp import GatedMlp, GetWeight, Mlp, SparseMlp
from engine.model.sharding import Shard
from engine.model.triton_attention import TritonAttention
from engine.model.weights import DTYPES, Linear, Norm, load_tensors, padded_rows

BACKENDS: dict[str, AttentionBackend] = {
    "dense": dense_attention,
    "cpu": cpu_attention,
    "gathered": gathered_attention,
}
Attend = Callable[["Layer", Tensor, Tensor], Tensor]
"""(layer, QKV [T, (H + 2K) D], its pool) to the attention's output [T, H D]; writes K and V."""


class Layer:
    """Weights of one decoder layer. Q, K and V are one product, so are gate and up."""

    def __init__(
        self, spec: ModelSpec, tensors: dict[str, Tensor], index: int, *, is_compiled: bool
    ) -> None:
        """Pack the layer's weights, or this rank's part of them."""
        traits = spec.traits

        def get(name: str) -> Tensor:
            return tensors[f"model.layers.{index}.{name}"]

        def linear(parts: tuple[str, ...], *, has_bias: bool) -> Linear:
            # The bias of a sum over ranks is rank 0's alone.
            has_bias = has_bias and f"model.layers.{index}.{parts[0]}.bias" in tensors
            bias = torch.cat([get(f"{part}.bias") for part in parts]) if has_bias else None
            return Linear(torch.cat([get(f"{part}.weight") for part in parts]), bias)

        def norm(name: str) -> Norm:
            return Norm(get(f"{name}.weight"), spec.rms_norm_eps, has_offset=traits.has_norm_offset)

        self.rope = traits.layers[index].rope
        self.rules = AttentionRules(
            traits.attention_scale, traits.attention_softcap, traits.layers[index].window
        )
        self.attention_norm = norm("input_layernorm")
        self.attention_post_norm = (
            norm("post_attention_layernorm") if traits.has_post_norms else None
        )
        self.mlp_norm = norm(
            "pre_feedforward_layernorm" if traits.has_post_norms else "post_attention_layernorm"
        )
        self.mlp_post_norm = norm("post_feedforward_layernorm") if traits.has_post_norms else None
        self.q_norm = norm("self_attn.q_norm") if traits.has_qk_norm else None
        self.k_norm = norm("self_attn.k_norm") if traits.has_qk_norm else None
        qkv = (
            ("self_attn.qkv_proj",)
            if traits.has_fused_projections
            else tuple(f"self_attn.{n}_proj" for n in "qkv")
        )
        self.qkv = linear(qkv, has_bias=traits.has_qkv_bias)
        self.o = linear(("self_attn.o_proj",), has_bias=traits.has_o_bias)
        self.qk_norm_weights = (
            self.q_norm.numpy_weight if self.q_norm else cpu_ops.NO_WEIGHT,
            self.k_norm.numpy_weight if self.k_norm else cpu_ops.NO_WEIGHT,
        )
        self.mlp: Mlp = _mlp(spec, index, get, linear, is_compiled=is_compiled)


def _mlp(
    spec: ModelSpec, index: int, get: GetWeight, linear: Callable[..., Linear], *, is_compiled: bool
) -> Mlp:
    traits = spec.traits
    if traits.experts is not None and traits.layers[index].is_sparse:
        return SparseMlp(traits.experts, get, traits.activation, is_compiled=is_compiled)
    gate_up = (
        ("mlp.gate_up_proj",) if traits.has_fused_projections else ("mlp.gate_proj", "mlp.up_proj")
    )
    has_bias = traits.has_mlp_bias
    down = linear(("mlp.down_proj",), has_bias=has_bias)
    return GatedMlp(
        linear(gate_up, has_bias=has_bias), down, traits.activation, is_compiled=is_compiled
    )


class Model:
    """A loaded model, or one rank's part of it; holds no state between steps."""

    def __init__(
        self, shard: Shard, device: torch.device, attention: str, ranks: Collectives | None = None
    ) -> None:
        """Load and pack the weights.

        Args:
            shard: Which part.
            device: Where.
            attention: Name of a backend.
            ranks: The group, if the model is split.

        Raises:
            ModelLoadError: A weight file cannot be read.
        """
        spec = shard.spec
        tensors = load_tensors(shard, device)
        self.shard = shard
        self.ranks = ranks or Alone()
        self.spec = spec
        self.device = device
        self.dtype = DTYPES[spec.dtype]
        self._attend = TritonAttention() if attention == "triton" else BACKENDS[attention]
        self._is_compiled = (
            attention == "cpu" and device.type == "cpu" and self.dtype in cpu_ops.COMPILED_DTYPES
        )
        self._embedding = tensors["model.embed_tokens.weight"]
        # Rounded to the model's dtype before it is used, as in Gemma's training.
        self._embedding_scale = torch.tensor(
            spec.traits.embedding_scale, dtype=self.dtype, device=device
        )
        has_offset = spec.traits.has_norm_offset
        self._norm = Norm(tensors["model.norm.weight"], spec.rms_norm_eps, has_offset=has_offset)
        self._layers = [
            Layer(spec, tensors, i, is_compiled=self._is_compiled) for i in range(spec.num_layers)
        ]
        self._head = Linear(self._embedding if spec.is_tied else tensors["lm_head.weight"])
        # For every position at once: a table costs a step less than its sines and cosines.
        positions = torch.arange(spec.max_model_len).float()
        angles = [
            torch.outer(positions, _frequencies(rope, spec.traits.rotary_size))
            for rope in spec.traits.ropes
        ]
        self._rotations = [(a.cos().to(device), a.sin().to(device)) for a in angles]
        self._numpy_rotations = (
            [(a.cos().numpy(), a.sin().numpy()) for a in angles] if self._is_compiled else []
        )

    @torch.inference_mode()
    def forward(
        self,
        token_ids: np.ndarray[Any, Any],
        inputs: AttentionInputs,
        kv: Tensor,
        sample_rows: np.ndarray[Any, Any],
        on_layer: Callable[[int], None],
        owners: Sequence[int] = (),
    ) -> Tensor:
        """Compute one step.

        Args:
            token_ids: int64 [t], unpadded.
            inputs: Rows, positions and block tables of the same t rows.
            kv: The pool, [layers, N, 2, B, K, D]; this step's slots are written.
            sample_rows: int64 [R], rows whose logits are wanted.
            on_layer: Called after each layer, when its KV is complete on every rank.
            owners: Rank that wants each row's logits; by default all are this rank's.

        Returns:
            Logits, fp32 [R of this rank, V].

        Raises:
            InvariantViolation: An id has no row in the embedding.
        """
        num_rows = len(token_ids)
        if not 0 <= token_ids.min() <= token_ids.max() < self.spec.vocabulary_size:
            raise InvariantViolation(  # with the vocabulary split nobody would miss the row
                f"a token id is not from 0 to {self.spec.vocabulary_size - 1}"
            )
        # Padding makes products independent of the batch; it is token 0, and nobody reads it.
        ids = self._index(token_ids, padded_rows(num_rows, self.dtype, self.device))
        attend = (
            self._compiled_attention(inputs)
            if self._is_compiled
            else self._torch_attention(inputs, kv.shape[3], len(ids))
        )
        x_TC = self._embed(ids, num_rows)
        if self.spec.traits.embedding_scale != 1.0:
            x_TC = x_TC * self._embedding_scale
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(self._normed(layer.attention_norm, x_TC, num_rows))
            # Two sums a layer are all that ranks exchange (Megatron-LM, arXiv:1909.08053).
            y_TC = self.ranks.sum(layer.o(attend(layer, qkv, kv[index])), num_rows)
            x_TC = x_TC + self._normed(layer.attention_post_norm, y_TC, num_rows)
            y_TC = self.ranks.sum(
                layer.mlp(self._normed(layer.mlp_norm, x_TC, num_rows), num_rows), num_rows
            )
            x_TC = x_TC + self._normed(layer.mlp_post_norm, y_TC, num_rows)
            # After the sums, not after attention: only then has every rank written this layer.
            on_layer(index)
        if not len(sample_rows):
            return torch.empty(0, self.spec.vocabulary_size)
        return self._logits(x_TC, sample_rows, owners)

    def _embed(self, ids: Tensor, num_rows: int) -> Tensor:
        """Look up ids; with the vocabulary split, a rank has zeros for what is not its own."""
        mine = self.shard.vocabulary
        if self.shard.size == 1:
            return F.embedding(ids, self._embedding)
        # All but one rank have zeros for a row, so this sum rounds nothing.
        is_mine = (ids >= mine.start) & (ids < mine.stop)
        rows = F.embedding((ids - mine.start).clamp(0, len(mine) - 1), self._embedding)
        return self.ranks.sum(rows * is_mine[:, None], num_rows)

    def _normed(self, norm: Norm | None, x: Tensor, rows: int) -> Tensor:
        if norm is None:
            return x
        return (
            cpu_ops.rms_norm(x, norm.numpy_weight, self.spec.rms_norm_eps, rows)
            if self._is_compiled
            else norm(x)
        )

    def _logits(
        self, x_TC: Tensor, sample_rows: np.ndarray[Any, Any], owners: Sequence[int]
    ) -> Tensor:
        # The largest product of all: only rows that are drawn from or scored go through it.
        wanted = self._index(sample_rows, padded_rows(len(sample_rows), self.dtype, self.device))
        logits = self._head(self._normed(self._norm, x_TC[wanted], len(wanted)))[
            : len(sample_rows)
        ].float()
        widths = [len(self.shard.vocabulary_of(rank)) for rank in range(self.shard.size)]
        logits = self.ranks.exchange(logits, owners, widths)
        cap = self.spec.traits.final_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _index(self, values: np.ndarray[Any, Any], rows: int) -> Tensor:
        padded = np.zeros(rows, dtype=np.int64)
        padded[: len(values)] = values
        return torch.from_numpy(padded).to(self.device)

    def _compiled_attention(self, inputs: AttentionInputs) -> Attend:
        """Attention of one step with the compiled kernels."""
        spec = self.spec
        rows = int(inputs.row_starts[-1])
        num_heads = self.shard.num_heads
        q = np.empty((rows, num_heads, spec.head_size), dtype=np.float32)

        def attend(layer: Layer, qkv: Tensor, kv: Tensor) -> Tensor:
            cpu_ops.rotate_and_store(
                qkv,
                layer.qk_norm_weights,
                spec.rms_norm_eps,
                self._numpy_rotations[layer.rope],
                inputs,
                kv,
                q,
            )
            out = np.zeros((qkv.shape[0], num_heads, spec.head_size), dtype=np.float32)
            attend_rows(q, kv, inputs, layer.rules, out)
            return torch.from_numpy(out).view(qkv.shape[0], -1).to(self.dtype)

        return attend

    def _torch_attention(self, inputs: AttentionInputs, block_size: int, rows: int) -> Attend:
        """Attention of one step with torch operations, on any device and in any dtype."""
        spec = self.spec
        num_heads = self.shard.num_heads
        num_kv_heads = self.shard.num_kv_heads
        positions = self._index(inputs.positions, rows)
        rotations = [
            (cos[positions][:, None, :], sin[positions][:, None, :]) for cos, sin in self._rotations
        ]
        row_sequence = np.repeat(np.arange(len(inputs.row_starts) - 1), np.diff(inputs.row_starts))
        at = inputs.positions // block_size
        blocks = torch.as_tensor(inputs.block_tables[row_sequence, at], device=self.device)
        offsets = torch.as_tensor(inputs.positions % block_size, device=self.device)
        sizes = [n * spec.head_size for n in (num_heads, num_kv_heads, num_kv_heads)]

        def attend(layer: Layer, qkv: Tensor, kv: Tensor) -> Tensor:
            q, k, v = qkv.split(sizes, dim=1)
            q_THD = q.view(rows, num_heads, spec.head_size)
            k_TKD = k.view(rows, num_kv_heads, spec.head_size)
            if layer.q_norm is not None and layer.k_norm is not None:
                q_THD, k_TKD = layer.q_norm(q_THD), layer.k_norm(k_TKD)
            q_THD = _rotate(q_THD, *rotations[layer.rope])
            k_TKD = _rotate(k_TKD, *rotations[layer.rope])
            v_TKD = v.view(rows, num_kv_heads, spec.head_size)
            # Written before they are read: a row attends to itself, too.
            kv[blocks, 0, offsets] = k_TKD[: len(blocks)]
            kv[blocks, 1, offsets] = v_TKD[: len(blocks)]
            return self._attend(q_THD, kv, inputs, layer.rules).reshape(rows, -1)

        return attend


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of [T, heads, D] by position, half-split form, in fp32."""
    size = 2 * cos.shape[-1]
    a, b = x[..., :size].float().chunk(2, dim=-1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return rotated if size == x.shape[-1] else torch.cat((rotated, x[..., size:]), dim=-1)


def _frequencies(rope: Rope, rotary_size: int) -> Tensor:
    """Rotary frequencies, fp32 [rotary_size / 2]."""
    # As transformers computes them: another order of operations has other last bits.
    exponents = torch.arange(0, rotary_size, 2, dtype=torch.int64).float() / rotary_size
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    return _stretch(frequencies, rope) if rope.kind == "llama3" else frequencies


def _stretch(frequencies: Tensor, scaling: Rope) -> Tensor:
    """Llama 3.1: long waves are divided by `factor`, short ones kept, those between blended."""
    waves = 2 * math.pi / frequencies
    ratio = scaling.original_max_position_embeddings / waves
    blend = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    low = waves > scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = waves < scaling.original_max_position_embeddings / scaling.high_freq_factor
    return torch.where(low, frequencies / scaling.factor, torch.where(high, frequencies, blended))
