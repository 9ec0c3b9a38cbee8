"""A rank process: one model or a share of it, one shard of the KV pool, one pipe.

Owns the process's whole life: hang on the parent, load, join the other ranks, report ready,
then execute plans one by one. Does not know requests, sessions or transfers. Started by
`engine.ranks.rank_group` as `python -m engine.ranks.rank CONTROL_FD LIFE_FD KV_FD COMMON_FD`;
everything else comes as the first message, the setup.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

from msgspec.msgpack import Decoder

from core import logs
from core.errors import ModelLoadError
from core.plan import StepItem, StepPlan, StepResult
from core.ports import OnLayer
from engine.ranks.plan_wire import PLAN, PlanDecoder
from engine.ranks.rank_wire import (
    PREFIX,
    SETUP,
    Executed,
    Fatal,
    FromRank,
    LayerDone,
    Message,
    Ready,
    pack,
    unpack,
)
from engine.ranks.shared_kv import HEARTBEAT, SLOTS_AT, WORDS, check_fits
from process.parent_death import exit_with_parent
from process.shared_memory import map_segment, touch

COMPILED_ROWS = (1, 128, 512)
"""Rows of the steps that a rank on a GPU computes before it is ready: every kernel and tile."""


class Pipe:
    """Blocking messages over the control socket."""

    def __init__(self, fd: int) -> None:
        """Take over the descriptor."""
        self._socket = socket.socket(fileno=fd)
        self._file = self._socket.makefile("rb")

    def read(self, decoder: Decoder[Message]) -> Message:
        """Wait for a message of the decoder's kind; the worker's end closing ends the process."""
        try:
            prefix = self._file.read(PREFIX.size)
        except ConnectionError:
            prefix = b""  # the worker was killed with a message of ours unread
        if len(prefix) < PREFIX.size:
            raise SystemExit(0)
        return unpack(self._file.read(PREFIX.unpack(prefix)[0]), decoder)

    def write(self, message: FromRank) -> None:
        """Send a message."""
        try:
            self._socket.sendall(pack(message))
        except ConnectionError as error:
            raise SystemExit(0) from error


def main() -> None:
    """Run a rank to its end."""
    control_fd, life_fd, kv_fd, common_fd = (int(argument) for argument in sys.argv[1:5])
    # Before anything else: from here on no rank outlives its worker.
    exit_with_parent(life_fd)
    pipe = Pipe(control_fd)
    setup = pipe.read(SETUP)
    common = map_segment(common_fd, setup["common_bytes"])
    try:
        runner = _load(setup, kv_fd, common)
    # For the operator, in words; anything else is a bug and leaves its traceback.
    except ModelLoadError as error:
        pipe.write(Fatal(error.message))
        raise SystemExit(3) from error
    pipe.write(Ready())
    heartbeat = common[HEARTBEAT].cast("Q")
    decoder = PlanDecoder(setup["block_size_tokens"], runner.model.spec.vocabulary_size)
    while True:
        _step(pipe, decoder, runner, heartbeat, setup["rank"])


def _load(setup: dict[str, Any], kv_fd: int, common: memoryview) -> Any:  # noqa: ANN401
    import torch  # noqa: PLC0415 - takes seconds: only once the parent-death pipe is watched

    from engine.checkpoint.model_spec import read_model  # noqa: PLC0415
    from engine.model.model import Model  # noqa: PLC0415
    from engine.model.runner import ModelRunner  # noqa: PLC0415
    from engine.model.sharding import Shard  # noqa: PLC0415

    # Before anything is computed: torch sizes its thread pool at first use.
    torch.set_num_threads(setup["threads"])
    rank, size = setup["rank"], setup["size"]
    device = _device(setup["device"], rank)
    spec = read_model(Path(setup["folder"]), setup["dtype"], setup["max_model_len"])
    layout = spec.layout(setup["block_size_tokens"], size)

    def check_device() -> None:
        check_fits(layout.pool_bytes(1), setup["num_blocks"], _free_bytes(device), str(device))

    check_device()  # before anything is loaded
    memory = map_segment(kv_fd, layout.pool_bytes(setup["num_blocks"]))
    # Page faults are taken now, and not in the middle of a step.
    touch(memory)
    model = Model(Shard(spec, rank, size), device, setup["attention"], _join(setup, common))
    check_device()  # beside the weights
    runner = ModelRunner(
        model,
        memory,
        setup["num_blocks"],
        setup["block_size_tokens"],
        exports_kv=setup["exports_kv"],
    )
    # Steps in block 0 compile the kernels before the first request needs them.
    for num_rows in (1,) if device.type == "cpu" else COMPILED_ROWS:
        rows = min(num_rows, spec.max_model_len)
        table = (0,) * -(-rows // setup["block_size_tokens"])
        step = StepPlan(0, (StepItem(0, 0, (0,) * rows, table),))
        _execute(runner, step, lambda step_id, layer: None, rank)
    return runner


def _device(kind: str, rank: int) -> Any:  # noqa: ANN401
    """This rank's device: it is shown its own GPUs, or all of a host's in the order of ranks."""
    import torch  # noqa: PLC0415

    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelLoadError(
            "engine.device is cuda, but torch finds no CUDA device; install a CUDA build or use cpu"
        )
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _free_bytes(device: Any) -> int | None:  # noqa: ANN401
    """What a GPU has left for a pool; None on a CPU, of whose memory the worker has asked."""
    import torch  # noqa: PLC0415

    if device.type == "cpu":
        return None
    torch.cuda.empty_cache()  # what loading took and gave back is free again
    free_bytes: int = torch.cuda.mem_get_info(device)[0]
    return free_bytes


def _join(setup: dict[str, Any], common: memoryview) -> Any:  # noqa: ANN401
    """Join the other ranks: in shared memory if they can, else over NCCL on GPUs or over gloo."""
    from engine.model.collectives import Alone, DistributedGroup  # noqa: PLC0415
    from engine.ranks.shared_group import SharedGroup  # noqa: PLC0415

    rank, size = setup["rank"], setup["size"]
    if size == 1:
        return Alone()
    if setup["shares_sums"]:
        return SharedGroup(rank, size, common[WORDS], common[SLOTS_AT:])
    return DistributedGroup.join(
        Path(setup["rendezvous"]), rank, size, is_cuda=setup["device"] == "cuda"
    )


def _step(
    pipe: Pipe,
    decoder: PlanDecoder,
    runner: Any,  # noqa: ANN401
    heartbeat: memoryview,
    rank: int,
) -> None:
    plan = decoder.decode(pipe.read(PLAN))

    def on_layer(step_id: int, layer: int) -> None:
        # In shared memory, because the worker must see progress even while the pipe is full.
        heartbeat[rank] += 1
        # One reports for all: past its sums every rank has written this layer.
        if plan.report_layers and rank == 0:
            pipe.write(LayerDone(step_id, layer))

    pipe.write(Executed(_execute(runner, plan, on_layer, rank)))


def _execute(runner: Any, plan: StepPlan, on_layer: OnLayer, rank: int) -> StepResult:  # noqa: ANN401
    """Run a step; the end of another rank is this one's end, too, and no bug."""
    from engine.model.collectives import GroupBroken  # noqa: PLC0415 - torch, see `_load`

    try:
        result: StepResult = runner.execute(plan, on_layer)
    except GroupBroken as error:
        raise SystemExit(
            f"rank {rank} ends: another rank of its group is gone ({error})"
        ) from error
    return result


if __name__ == "__main__":
    logs.configure("rank")
    main()
