"""Ranks that would share a GPU are told so before NCCL hangs or fails."""

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from core.errors import ModelLoadError
from engine.model.collectives import check_own_gpu


def outcomes(gpus):
    """What each rank finds, all of them at once."""
    store = dist.HashStore()

    def one(rank):
        try:
            check_own_gpu(store, rank, len(gpus), gpus[rank])
        except ModelLoadError as error:
            return error.message
        return ""

    with ThreadPoolExecutor(len(gpus)) as threads:
        return list(threads.map(one, range(len(gpus))))


def test_ranks_on_gpus_of_their_own_go_on():
    assert outcomes(["a", "b", "c"]) == ["", "", ""]


def test_every_rank_on_a_shared_gpu_is_refused():
    first, second, third = outcomes(["a", "b", "a"])
    assert "ranks 0 and 2 are on one GPU (a)" in first
    assert "engine.tensor_parallel_size (3)" in first
    assert second == ""
    assert third == first
