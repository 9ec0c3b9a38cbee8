"""What ranks cost and gain: step overhead over the bare forward,
and prefill on two ranks beside one.

The bare forward runs in processes of this script, joined by the same shared memory; the step runs
through a worker's pipes, planned and sampled. Turns alternate. One thread a rank. Run: python -m
benchmarks.ranks [--turns N]
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.handover import make_model
from benchmarks.record import save
from core.config import EngineConfig
from core.plan import SampleSpec, StepItem, StepPlan
from core.types import SamplingParams
from engine.checkpoint.model_spec import read_model
from engine.ranks.rank_group import RankGroup
from engine.ranks.shared_kv import SLOTS_AT, WORDS, common_bytes
from process.shared_memory import create_segment, map_segment

TINY = Path(__file__).parent.parent / "models" / "baton-tiny"
GREEDY = SamplingParams(temperature=0.0)
BLOCKS, ROWS = 64, 512


def decode_plan(step_id):
    return StepPlan(
        step_id,
        (StepItem(1, 100, (5,), tuple(range(7)), (SampleSpec(0, 0, 1, GREEDY),)),),
    )


def prefill_plan(step_id):
    ids = tuple(range(1000, 1000 + ROWS))
    return StepPlan(
        step_id,
        (StepItem(1, 0, ids, tuple(range(ROWS // 16)), (SampleSpec(0, 0, 1, GREEDY),)),),
    )


def child(folder, rank, size, fd, steps):
    """One rank of the bare forward."""
    import torch

    from engine.model.attention import AttentionInputs
    from engine.model.collectives import Alone
    from engine.model.model import Model
    from engine.model.sharding import Shard
    from engine.ranks.shared_group import SharedGroup

    torch.set_num_threads(1)
    spec = read_model(Path(folder))
    common = map_segment(fd, common_bytes(size, ROWS, spec.hidden_size))
    group = SharedGroup(rank, size, common[WORDS], common[SLOTS_AT:]) if size > 1 else Alone()
    model = Model(Shard(spec, rank, size), torch.device("cpu"), "cpu", group)
    kv = torch.zeros(
        (spec.num_layers, BLOCKS, 2, 16, model.shard.num_kv_heads, spec.head_size),
        dtype=model.dtype,
    )
    inputs = AttentionInputs(np.array([100]), np.array([0, 1]), np.array([list(range(7))]))
    for _ in range(20):
        model.forward(np.array([5]), inputs, kv, np.array([0]), lambda _: None, [0])
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        model.forward(np.array([5]), inputs, kv, np.array([0]), lambda _: None, [0])
        times.append(time.perf_counter() - began)
    if rank == 0:
        print(json.dumps(median(times)))


def bare(folder, size, steps):
    """Seconds of the bare forward of one decode step."""
    spec = read_model(folder)
    fd = create_segment(common_bytes(size, ROWS, spec.hidden_size))
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.ranks",
                "--child",
                str(folder),
                str(rank),
                str(size),
                str(fd),
                str(steps),
            ],
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            text=True,
        )
        for rank in range(size)
    ]
    os.close(fd)
    out = [rank.communicate(timeout=120)[0] for rank in ranks]
    return float(json.loads(out[0]))


async def stepped(folder, size, plans, count):
    """Seconds of steps through the pipes: median over `count` of each plan."""
    ranks = RankGroup(
        read_model(folder),
        EngineConfig(num_blocks=BLOCKS, max_step_tokens=ROWS, tensor_parallel_size=size),
    )
    await ranks.start()
    try:
        found = []
        for plan in plans:
            times = []
            for number in range(count + 3):
                began = time.perf_counter()
                await ranks.execute(plan(number), lambda *_: None)
                times.append(time.perf_counter() - began)
            found.append(median(times[3:]))
        return found
    finally:
        await ranks.stop()


def main():
    if "--child" in sys.argv:
        folder, rank, size, fd, steps = sys.argv[2:]
        child(folder, int(rank), int(size), int(fd), int(steps))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    rows, prefill = [], []
    for turn in range(options.turns):
        for size in (1, 2):
            forward_s = bare(TINY, size, 300)
            (step_s,) = asyncio.run(stepped(TINY, size, [decode_plan], 300))
            rows.append({"turn": turn, "ranks": size, "forward_s": forward_s, "step_s": step_s})
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "shape")
        for turn in range(options.turns):
            for size in (1, 2):
                decode_s, prefill_s = asyncio.run(
                    stepped(Path(name) / "shape", size, [decode_plan, prefill_plan], 5)
                )  # fmt: skip
                prefill.append(
                    {"turn": turn, "ranks": size, "prefill_s": prefill_s, "decode_s": decode_s}
                )

    def mid(found, size, key):
        return median(r[key] for r in found if r["ranks"] == size)

    overhead = {
        size: median(r["step_s"] - r["forward_s"] for r in rows if r["ranks"] == size)
        for size in (1, 2)
    }
    gain = mid(prefill, 1, "prefill_s") / mid(prefill, 2, "prefill_s")
    table = Table(
        "ranks",
        "bare forward us",
        "step us",
        "overhead us",
        f"prefill of {ROWS}, ms",
        "decode step, ms",
    )
    for size in (1, 2):
        table.add_row(
            str(size),
            f"{mid(rows, size, 'forward_s') * 1e6:.0f}",
            f"{mid(rows, size, 'step_s') * 1e6:.0f}",
            f"{overhead[size] * 1e6:.0f}",
            f"{mid(prefill, size, 'prefill_s') * 1e3:.0f}",
            f"{mid(prefill, size, 'decode_s') * 1e3:.1f}",
        )
    Console().print(table)
    Console().print(f"prefill on two ranks: {gain:.2f} times one")
    save(
        "ranks",
        {"overhead_s": overhead, "prefill_gain": gain, "tiny_decode": rows, "shape_0_5b": prefill},
    )


if __name__ == "__main__":
    main()
