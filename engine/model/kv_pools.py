"""Where a rank's KV lies: in memory shared with its worker, or on a device, staged in that memory.

Owns the pool's tensor and what goes between a device and the stage. Does not know plans, transfers
or models.

    device pool ── each layer as it is finished ──▶ stage (pinned) ──▶ the agent or its peer reads
                ◀── blocks that arrived, before their step ── stage ◀── the agent writes

The stage has the pool's own layout, so block ids mean the same in both, and everything outside the
rank is the same with and without a device. Source of the pattern: layer-wise offloading beside
compute, as in Mooncake (arXiv:2407.00079); CUDA's rule that copies overlap compute only from pinned
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from core.errors import ModelLoadError


class KVPool(Protocol):
    """A rank's pool, [layers, N, 2, B, K, D]."""

    kv: Tensor

    def load_staged_blocks(self, blocks: Sequence[int]) -> None:
        """These blocks were written from outside; the next step may read them."""
        ...

    def layer_queued(self, layer: int, blocks: Sequence[int]) -> bool:
        """All work on a layer is queued; `blocks` were written. True if it is done already."""
        ...

    def finished(self) -> Iterator[int]:
        """Wait for the layers that were not done, one by one."""
        ...


class HostPool:
    """A pool in the worker's memory: nothing ever has to move."""

    def __init__(self, memory: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Wrap the memory, not copied."""
        self.kv = torch.frombuffer(memory, dtype=dtype).view(shape)

    def load_staged_blocks(self, blocks: Sequence[int]) -> None:
        """See `KVPool`."""

    def layer_queued(self, layer: int, blocks: Sequence[int]) -> bool:
        """See `KVPool`."""
        return True

    def finished(self) -> Iterator[int]:
        """See `KVPool`."""
        return iter(())


class StagedPool:
    """A pool on a device, and a stage of the same layout in the worker's memory."""

    def __init__(
        self,
        memory: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        exports_kv: bool,
    ) -> None:
        """Allocate the pool and pin the stage.

        Args:
            memory: The stage, which the worker maps too.
            shape: Of the pool.
            dtype: Of the pool.
            device: Where the pool is.
            exports_kv: Whether finished layers go to the stage: only prefill workers send KV.

        Raises:
            ModelLoadError: The stage cannot be pinned.
        """
        self._stage = torch.frombuffer(memory, dtype=dtype).view(shape)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self._exports_kv = exports_kv
        self._is_cuda = device.type == "cuda"
        self._events: list[tuple[int, Any]] = []
        if self._is_cuda:
            # A stream of its own, so that copies run beside the next layer's products.
            self._copies = torch.cuda.Stream(device)
            _pin(self._stage)

    def load_staged_blocks(self, blocks: Sequence[int]) -> None:
        """See `KVPool`: on the stream that computes, so the step waits for it and nobody else."""
        # Neighbours together: each copy costs a launch, however small it is.
        for begin, end in runs_of(blocks):
            for layer in range(self.kv.shape[0]):
                self.kv[layer, begin:end].copy_(self._stage[layer, begin:end], non_blocking=True)

    def layer_queued(self, layer: int, blocks: Sequence[int]) -> bool:
        """See `KVPool`: the copy waits for the layer, the next layer does not wait for the copy."""
        # Without streams (a CPU that plays the device) the copy is done when the call returns.
        if not self._is_cuda:
            self._export(layer, blocks)
            return True
        # Events order the two streams on the device: the rank's own thread never waits here.
        computed = torch.cuda.Event()
        computed.record()
        if self._exports_kv:
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(computed)
                self._export(layer, blocks)
                computed = torch.cuda.Event()
                computed.record()
        self._events.append((layer, computed))
        return False

    def _export(self, layer: int, blocks: Sequence[int]) -> None:
        if self._exports_kv:
            for begin, end in runs_of(blocks):
                self._stage[layer, begin:end].copy_(self.kv[layer, begin:end], non_blocking=True)

    def finished(self) -> Iterator[int]:
        """See `KVPool`."""
        events, self._events = self._events, []
        for layer, event in events:
            # By now the whole step is queued, so waiting here delays no work.
            event.synchronize()
            yield layer


def runs_of(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Group block ids into runs of neighbours, (first, end): one copy each."""
    ids = np.unique(np.asarray(blocks, np.int64))
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(ids, cuts) if len(run)]


def _pin(stage: Tensor) -> None:
    """Pin memory that somebody else made; a copy from ordinary memory would block the rank.

    Raises:
        ModelLoadError: The driver refuses.
    """
    cudart: Any = torch.cuda.cudart()
    result = cudart.cudaHostRegister(stage.data_ptr(), stage.nbytes, 0)
    if int(result) != 0:
        raise ModelLoadError(
            f"{stage.nbytes} bytes of KV stage cannot be pinned (CUDA error {int(result)}); "
            "lower engine.num_blocks or raise the limit of locked memory (ulimit -l)"
        )
