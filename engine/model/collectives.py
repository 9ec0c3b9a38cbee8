"""How the ranks of a group add up and exchange tensors.

Owns two operations over `torch.distributed` and the rule that makes them exact: terms are added in
the order of ranks, whatever their number and size, so a row's sum depends on that row alone. Does
not know models.

A ring all-reduce would add the same numbers in an order that depends on where a row lies in the
message, and batch invariance (ADR 2) would be gone with three ranks or more. So every rank gathers
all terms and adds them itself; for the few rows of a decode step that is one latency instead of
two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from core.errors import ModelLoadError

dist: Any = torch.distributed
"""Its stubs lack the classes of process groups."""

WAIT_S = 600.0
"""Far above any step: a rank that waits longer is ended by its worker, which watches progress."""


class GroupBroken(Exception):
    """Another rank is gone, or did not answer; this rank has nothing left to do."""


class Collectives(Protocol):
    """The group as one rank sees it."""

    rank: int
    size: int

    def sum(self, x: Tensor, rows: int) -> Tensor:
        """Add up the first `rows` rows of every rank's x [T, C]; the rest is padding."""
        ...

    def exchange(self, x: Tensor, owners: Sequence[int], widths: Sequence[int]) -> Tensor:
        """Give every row to its owner, put together from all ranks' columns.

        Args:
            x: fp32 [R, width of this rank]: this rank's columns of every row.
            owners: Rank that wants each row.
            widths: Columns of each rank.

        Returns:
            fp32 [rows of this rank, sum of widths], in the order of rows.
        """
        ...


def check_own_gpu(store: Any, rank: int, size: int, gpu: str) -> None:  # noqa: ANN401
    """Compare GPUs with the other ranks; returns when all have said theirs.

    Args:
        store: Where all ranks of the group meet.
        rank: This one.
        size: How many there are.
        gpu: Identity of this rank's GPU.

    Raises:
        ModelLoadError: Another rank is on the same GPU. NCCL would say so only at the first
            operation, in words that name no setting.
    """
    gpus = dist.PrefixStore("gpus", store)
    gpus.set(str(rank), gpu)
    of_ranks = [gpus.get(str(other)).decode() for other in range(size)]
    shared = [other for other in range(size) if of_ranks[other] == gpu]
    if len(shared) > 1:
        raise ModelLoadError(
            f"ranks {' and '.join(map(str, shared))} are on one GPU ({gpu}), and NCCL takes one "
            f"rank a GPU; lower engine.tensor_parallel_size ({size}) or add GPUs"
        )


def add_in_order(x: Tensor, rows: int, terms: Sequence[Tensor]) -> Tensor:
    """Sum of all ranks' terms [rows, C], padded like x; added in fp32 and rounded once."""
    # Rounded once, at the end: more ranks must not cost more precision.
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term
    if rows == x.shape[0]:
        return total.to(x.dtype)
    # Padding has no sum, and must not be what the memory held before.
    out = torch.zeros_like(x)
    out[:rows] = total
    return out


class Alone:
    """A group of one."""

    rank, size = 0, 1

    def sum(self, x: Tensor, rows: int) -> Tensor:
        """Nothing to add."""
        return x

    def exchange(self, x: Tensor, owners: Sequence[int], widths: Sequence[int]) -> Tensor:
        """Every row is here."""
        return x


class DistributedGroup:
    """A group over one `torch.distributed` process group, of gloo or of NCCL."""

    def __init__(self, group: Any, rank: int, size: int) -> None:  # noqa: ANN401
        """Take a group that is joined already."""
        self._group = group
        self.rank = rank
        self.size = size

    @classmethod
    def join(
        cls, rendezvous: Path, rank: int, size: int, *, is_cuda: bool = False
    ) -> DistributedGroup:
        """Join the other ranks through a file of theirs; returns when all are there.

        No global group is made, so a process may be in several and leave without a word. Over NCCL
        an operation is only queued when it returns; a rank that waits for one that never ends is
        ended by its worker.

        Raises:
            ModelLoadError: Two ranks of NCCL are on one GPU.
        """
        # A file and not a port: nothing to choose, and nothing that a stranger could connect to.
        store = dist.FileStore(str(rendezvous), size)
        if is_cuda:
            gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
            check_own_gpu(store, rank, size, str(gpu.uuid))
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=WAIT_S)  # noqa: SLF001
            return cls(dist.ProcessGroupNCCL(store, rank, size, nccl), rank, size)
        options = dist.ProcessGroupGloo._Options()  # noqa: SLF001 - the only way to name a device
        # Named, or gloo listens on the address that the host's name resolves to.
        loopback = dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
        options._devices = [loopback]  # noqa: SLF001
        options._timeout = timedelta(seconds=WAIT_S)  # noqa: SLF001
        return cls(dist.ProcessGroupGloo(store, rank, size, options), rank, size)

    def sum(self, x: Tensor, rows: int) -> Tensor:
        """See `Collectives`."""
        gathered = x.new_empty((self.size * rows, x.shape[1]))
        with _answered():
            # Padding stays at home.
            mine = x[:rows].contiguous()
            self._group._allgather_base(gathered, mine).wait()  # noqa: SLF001 - has no public name
        return add_in_order(x, rows, gathered.split(rows))

    def exchange(self, x: Tensor, owners: Sequence[int], widths: Sequence[int]) -> Tensor:
        """See `Collectives`."""
        rows_of = [
            [row for row, owner in enumerate(owners) if owner == rank] for rank in range(self.size)
        ]
        # Flat, for `alltoall_base` splits along the first dimension alone.
        sent = torch.cat([x[rows].flatten() for rows in rows_of])
        mine = len(rows_of[self.rank])
        received = x.new_empty(mine * sum(widths))
        splits = [mine * width for width in widths], [len(rows) * x.shape[1] for rows in rows_of]
        with _answered():
            self._group.alltoall_base(received, sent, *splits).wait()
        parts = received.split(splits[0])
        return torch.cat(
            [part.view(mine, width) for part, width in zip(parts, widths, strict=True)], dim=1
        )


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    # Torch has no error of its own for a peer that is gone.
    except RuntimeError as error:
        raise GroupBroken(str(error)) from error
