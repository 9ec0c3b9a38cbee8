"""The two halves of the field's MLPs: gated dense, and a sparse mixture of gated experts.

Owns the products between attention and the next layer. Does not know attention or the KV cache.

Dimension key: T token rows (padded), C hidden size, F intermediate size, E experts, n rows of one
expert. Sources: SwiGLU, arXiv:2002.05202; sparse experts with renormalised top-k routing,
arXiv:2401.04088.

A row's output must not depend on its neighbours. So every expert computes a padded number of rows,
and a row adds up its experts in ascending order of the expert, whoever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint.families import Experts
from engine.model import cpu_ops
from engine.model.weights import Linear, padded_rows

Activation = Callable[[Tensor], Tensor]
GetWeight = Callable[[str], Tensor]
"""Weight of one layer by its name within the layer."""
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Mlp(Protocol):
    """One layer's MLP."""

    def __call__(self, x: Tensor, rows: int) -> Tensor:
        """Map [T, C] to [T, C]; only the first `rows` rows matter."""
        ...


class GatedMlp:
    """down(activation(gate(x)) * up(x)), gate and up as one product."""

    def __init__(
        self, gate_up: Linear, down: Linear, activation: str, *, is_compiled: bool
    ) -> None:
        """Keep the packed weights; `is_compiled` takes the compiled kernel between the products."""
        self._gate_up = gate_up
        self._down = down
        self._is_compiled = is_compiled
        self._activation = ACTIVATIONS[activation]
        self._is_gelu = activation == "gelu_tanh"

    def __call__(self, x: Tensor, rows: int) -> Tensor:
        """Map [T, C] to [T, C]."""
        # One wide product instead of two: x is read once.
        gate_up = self._gate_up(x)
        if self._is_compiled:
            return self._down(cpu_ops.gate(gate_up, rows, is_gelu=self._is_gelu))
        gate_TF, up_TF = gate_up.chunk(2, dim=1)
        return self._down(self._activation(gate_TF) * up_TF)


class SparseMlp:
    """A router and its experts; the rows of one expert are computed together."""

    def __init__(
        self, experts: Experts, get: GetWeight, activation: str, *, is_compiled: bool
    ) -> None:
        """Pack every expert."""
        self._per_token = experts.per_token
        self._is_normalised = experts.is_normalised
        self._router = Linear(get(f"{experts.prefix}.gate.weight"))
        self._experts = []
        for index in range(experts.num):
            name = f"{experts.prefix}.experts.{index}"
            gate_up = torch.cat(
                [get(f"{name}.{experts.gate}.weight"), get(f"{name}.{experts.up}.weight")]
            )
            down = Linear(get(f"{name}.{experts.down}.weight"))
            self._experts.append(
                GatedMlp(Linear(gate_up), down, activation, is_compiled=is_compiled)
            )

    def __call__(self, x: Tensor, rows: int) -> Tensor:
        """Map [T, C] to [T, C]; rows of padding choose no expert."""
        # In fp32 and over all experts before the choice, as transformers does it.
        odds_TE = self._router(x)[:rows].float().softmax(-1)
        weights, chosen = odds_TE.topk(self._per_token, dim=-1)
        if self._is_normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        out_TC = torch.zeros_like(x)
        # `unique` sorts: a row adds up its experts in the same order in every batch.
        for index in chosen.unique().tolist():
            mine, places = (chosen == index).nonzero(as_tuple=True)
            x_nC = x[mine]
            # An expert's rows vary by step; padded, its product is invariant all the same.
            padding = padded_rows(len(mine), x.dtype, x.device) - len(mine)
            y_nC = self._experts[index](F.pad(x_nC, (0, 0, 0, padding)), len(mine))[: len(mine)]
            out_TC[mine] += y_nC * weights[mine, places, None].to(x.dtype)
        return out_TC
