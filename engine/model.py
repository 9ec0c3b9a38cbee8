"""One decoder-only transformer for the Llama family, over a paged KV cache.

Owns the forward pass. Does not know scheduling, sampling or where weights come from. Called by
`engine.runner`, in rank processes only.

Dimension key: T token rows (padded, see `engine.weights`), C width, F hidden, H query heads, K KV
heads, D head size, V vocabulary, R rows to sample. Source: LLaMA, arXiv:2302.13971; GQA,
arXiv:2305.13245; rotary embedding, arXiv:2104.09864, stretched as in Llama 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import BACKENDS, AttentionInputs
from engine.model_spec import ModelSpec, RopeScaling
from engine.weights import DTYPES, Linear, load_tensors, padded_rows


class Layer:
    """Weights of one decoder layer. Q, K and V are one product, so are gate and up."""

    def __init__(self, tensors: dict[str, Tensor], index: int) -> None:
        """Pack the layer's weights."""

        def get(name: str) -> Tensor:
            return tensors[f"model.layers.{index}.{name}.weight"]

        self.attention_norm = get("input_layernorm")
        self.mlp_norm = get("post_attention_layernorm")
        self.qkv = Linear(torch.cat([get(f"self_attn.{n}_proj") for n in "qkv"]))
        self.o = Linear(get("self_attn.o_proj"))
        self.gate_up = Linear(torch.cat([get("mlp.gate_proj"), get("mlp.up_proj")]))
        self.down = Linear(get("mlp.down_proj"))


class Model:
    """A loaded model; holds no state between steps."""

    def __init__(self, spec: ModelSpec, device: torch.device, attention: str) -> None:
        """Load and pack the weights.

        Raises:
            ModelLoadError: A weight file cannot be read.
        """
        tensors = load_tensors(spec, device)
        self.spec, self.device, self.dtype = spec, device, DTYPES[spec.dtype]
        self._attend = BACKENDS[attention]
        self._embedding = tensors["model.embed_tokens.weight"]
        self._norm = tensors["model.norm.weight"]
        self._layers = [Layer(tensors, i) for i in range(spec.num_layers)]
        self._head = Linear(self._embedding if spec.is_tied else tensors["lm_head.weight"])
        angles = torch.outer(torch.arange(spec.max_model_len).float(), _frequencies(spec))
        self._cos, self._sin = angles.cos().to(device), angles.sin().to(device)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: np.ndarray[Any, Any],
        inputs: AttentionInputs,
        kv: Tensor,
        sample_rows: np.ndarray[Any, Any],
        on_layer: Callable[[int], None],
    ) -> Tensor:
        """Compute one step.

        Args:
            token_ids: int64 [t], unpadded.
            inputs: Rows, positions and block tables of the same t rows.
            kv: The pool, [layers, N, 2, B, K, D]; this step's slots are written.
            sample_rows: int64 [R], rows whose logits are wanted.
            on_layer: Called after each layer, when its KV is complete.

        Returns:
            Logits, fp32 [R, V].
        """
        num_rows = len(token_ids)
        rows = padded_rows(num_rows, self.dtype, self.device)
        ids = self._index(token_ids, rows)
        positions = self._index(inputs.positions, rows)
        cos, sin = self._cos[positions][:, None, :], self._sin[positions][:, None, :]
        block_size = kv.shape[3]
        at = inputs.positions // block_size
        row_sequence = np.repeat(np.arange(len(inputs.row_starts) - 1), np.diff(inputs.row_starts))
        blocks = torch.as_tensor(inputs.block_tables[row_sequence, at], device=self.device)
        offsets = torch.as_tensor(inputs.positions % block_size, device=self.device)
        x_TC = F.embedding(ids, self._embedding)
        for index, layer in enumerate(self._layers):
            x_TC = x_TC + self._attention(layer, x_TC, cos, sin, kv[index], (blocks, offsets), inputs)
            x_TC = x_TC + self._mlp(layer, x_TC)
            on_layer(index)
        if not len(sample_rows):
            return torch.empty(0, self.spec.vocabulary_size)
        wanted = self._index(sample_rows, padded_rows(len(sample_rows), self.dtype, self.device))
        h_RC = F.rms_norm(x_TC[wanted], (self.spec.width,), self._norm, self.spec.rms_norm_eps)
        return self._head(h_RC)[: len(sample_rows)].float()

    def _index(self, values: np.ndarray[Any, Any], rows: int) -> Tensor:
        padded = np.zeros(rows, dtype=np.int64)
        padded[: len(values)] = values
        return torch.from_numpy(padded).to(self.device)

    def _attention(
        self, layer: Layer, x_TC: Tensor, cos: Tensor, sin: Tensor, kv: Tensor,
        slots: tuple[Tensor, Tensor], inputs: AttentionInputs,
    ) -> Tensor:  # fmt: skip
        spec, rows = self.spec, x_TC.shape[0]
        h_TC = F.rms_norm(x_TC, (spec.width,), layer.attention_norm, spec.rms_norm_eps)
        sizes = [n * spec.head_size for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
        q, k, v = layer.qkv(h_TC).split(sizes, dim=1)
        q_THD = _rotate(q.view(rows, spec.num_heads, spec.head_size), cos, sin)
        k_TKD = _rotate(k.view(rows, spec.num_kv_heads, spec.head_size), cos, sin)
        v_TKD = v.view(rows, spec.num_kv_heads, spec.head_size)
        blocks, offsets = slots
        kv[blocks, 0, offsets] = k_TKD[: len(blocks)]
        kv[blocks, 1, offsets] = v_TKD[: len(blocks)]
        return layer.o(self._attend(q_THD, kv, inputs).reshape(rows, -1))

    def _mlp(self, layer: Layer, x_TC: Tensor) -> Tensor:
        h_TC = F.rms_norm(x_TC, (self.spec.width,), layer.mlp_norm, self.spec.rms_norm_eps)
        gate_TF, up_TF = layer.gate_up(h_TC).chunk(2, dim=1)
        return layer.down(F.silu(gate_TF) * up_TF)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [T, heads, D] by position, half-split form, in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _frequencies(spec: ModelSpec) -> Tensor:
    """Rotary frequencies, fp32 [D / 2]."""
    exponents = torch.arange(0, spec.head_size, 2, dtype=torch.int64).float() / spec.head_size
    frequencies = 1.0 / (spec.rope_theta**exponents)
    return frequencies if spec.rope_scaling is None else _stretch(frequencies, spec.rope_scaling)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long waves are divided by `factor`, short ones kept, those between blended."""
    waves = 2 * math.pi / frequencies
    ratio = scaling.original_max_position_embeddings / waves
    blend = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    low = waves > scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = waves < scaling.original_max_position_embeddings / scaling.high_freq_factor
    return torch.where(low, frequencies / scaling.factor, torch.where(high, frequencies, blended))
