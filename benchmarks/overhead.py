"""What serving adds: step overhead over the bare forward,
TTFT and ITL of the gRPC server over the bare engine.

The tiny model, prompt 128, path pd forced, one torch thread per rank. Turns alternate A B A B
within one run, because this kind of machine drifts. Run: python -m benchmarks.overhead
"""

import asyncio
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import quantiles, save
from benchmarks.streaming import timed_stream
from cluster.local import LocalCluster
from core.config import EngineConfig, load_config
from core.plan import SampleSpec, StepItem, StepPlan
from core.types import SamplingParams
from engine.checkpoint.model_spec import read_model
from engine.model.model import Model
from engine.model.runner import ModelRunner, _inputs
from engine.model.sharding import Shard
from engine.ranks.rank_group import RankGroup
from protos.baton.v1 import generation_pb2_grpc
from simulation.hash_runner import MemoryKV

PROMPT = 128
OUTPUT = 48
TURNS = 24
GREEDY = SamplingParams(temperature=0.0)
TINY = Path(__file__).parent.parent / "models" / "baton-tiny"


def bare_request(runner, seed):
    """Prefill and decode one prompt with the runner alone; returns TTFT and the gaps."""
    ids = [(seed * 31 + i * 7) % 256 for i in range(PROMPT)]
    table = tuple(range(-(-(PROMPT + OUTPUT) // 16)))
    started, stamps, start, fresh = time.perf_counter(), [], 0, tuple(ids)
    for position in range(OUTPUT):
        sample = (SampleSpec(0, position, 1, GREEDY),)
        item = StepItem(1, start, fresh, table[: -(-(start + len(fresh)) // 16)], sample)
        token = runner.execute(StepPlan(position, (item,)), lambda *_: None).tokens[1, 0].token_id
        stamps.append(time.perf_counter())
        start, fresh = start + len(fresh), (token,)
    return stamps[0] - started, [b - a for a, b in pairwise(stamps)]


async def served_request(stub, seed):
    """The same through the gRPC server."""
    ids = [(seed * 31 + i * 7) % 256 for i in range(PROMPT)]
    started, stamps, timing = await timed_stream(stub, ids, OUTPUT)
    return stamps[0] - started, [b - a for a, b in pairwise(stamps)], timing


def step_overhead(runner, batch):
    """Seconds of one decode step: bare forward, runner (inputs and sampling), for a batch size."""
    items = tuple(
        StepItem(
            i,
            100,
            (i + 1,),
            tuple(range(i * 7, i * 7 + 7)),
            (SampleSpec(0, 0, 1, GREEDY),),
        )
        for i in range(batch)
    )
    plan = StepPlan(1, items)
    inputs = _inputs(items)
    ids = np.asarray([i.token_ids[0] for i in items], dtype=np.int64)
    rows = np.arange(batch, dtype=np.int64)
    forward, whole = [], []
    for _ in range(200):
        t0 = time.perf_counter()
        runner.model.forward(ids, inputs, runner.kv, rows, lambda layer: None)
        t1 = time.perf_counter()
        runner.execute(plan, lambda *_: None)
        t2 = time.perf_counter()
        forward.append(t1 - t0)
        whole.append(t2 - t1)
    return forward, whole, plan


async def rank_steps(spec, plan):
    """The same step in a rank process, over its pipe."""
    ranks = RankGroup(spec, EngineConfig())
    await ranks.start()
    try:
        times = []
        for _ in range(200):
            t0 = time.perf_counter()
            await ranks.execute(plan, lambda *_: None)
            times.append(time.perf_counter() - t0)
        return times
    finally:
        await ranks.stop()


async def main():
    console = Console()
    torch.set_num_threads(1)
    spec = read_model(TINY)
    model = Model(Shard(spec), torch.device("cpu"), "cpu")
    layout = spec.layout(16)
    runner = ModelRunner(model, MemoryKV(layout, 512)._shards[0], 512, 16)
    bare_request(runner, 0)

    steps = {}
    for batch in (1, 8, 32):
        forward, whole, plan = step_overhead(runner, batch)
        rank = await rank_steps(spec, plan)
        steps[batch] = {
            "forward_s": quantiles(forward),
            "runner_s": quantiles(whole),
            "rank_process_s": quantiles(rank),
        }

    flags = {
        "router.http_port": 0,
        "router.grpc_port": 0,
        "placement.path": "pd",
        "pools.prefill.engine.cache_prefixes": False,
        "pools.decode.engine.cache_prefixes": False,
    }
    cluster = LocalCluster(load_config(None, flags, {}))
    await cluster.start()
    bare = {"ttft_s": [], "itl_s": []}
    served = {"ttft_s": [], "itl_s": [], "queue_s": [], "prefill_s": [], "exposed_transfer_s": []}
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.grpc_port}") as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            for seed in range(3):
                await served_request(stub, seed)
            for seed in range(TURNS):
                ttft, itl = bare_request(runner, seed)
                bare["ttft_s"].append(ttft)
                bare["itl_s"] += itl
                ttft, itl, timing = await served_request(stub, seed)
                served["ttft_s"].append(ttft)
                served["itl_s"] += itl
                for name in ("queue_s", "prefill_s", "exposed_transfer_s"):
                    served[name].append(getattr(timing, name))
    finally:
        await cluster.stop()
    result: dict[str, Any] = {
        "prompt_tokens": PROMPT,
        "output_tokens": OUTPUT,
        "turns": TURNS,
        "step": steps,
        "bare": {k: quantiles(v) for k, v in bare.items()},
        "served": {k: quantiles(v) for k, v in served.items()},
        "raw": {"bare": bare, "served": served},
    }
    result["added"] = {
        name: {q: result["served"][name][q] - result["bare"][name][q] for q in ("p50", "p95")}
        for name in ("ttft_s", "itl_s")
    }
    path = save("overhead", result)

    table = Table(
        "decode step",
        "forward p50",
        "runner p50",
        "rank process p50",
        "runner / forward",
        title="milliseconds",
    )
    for batch, s in steps.items():
        f, r, k = (s[n]["p50"] * 1e3 for n in ("forward_s", "runner_s", "rank_process_s"))
        table.add_row(f"batch {batch}", f"{f:.3f}", f"{r:.3f}", f"{k:.3f}", f"{r / f:.2f}")
    console.print(table)
    table = Table(
        "",
        "bare p50",
        "gRPC server p50",
        "added p50",
        "added p95",
        title="prompt 128, pd forced, milliseconds",
    )
    for name in ("ttft_s", "itl_s"):
        row = [
            result["bare"][name]["p50"],
            result["served"][name]["p50"],
            result["added"][name]["p50"],
            result["added"][name]["p95"],
        ]
        table.add_row(name, *(f"{v * 1e3:.2f}" for v in row))
    console.print(table)
    console.print({k: round(v["p50"] * 1e3, 2) for k, v in result["served"].items()})
    console.print(path)


if __name__ == "__main__":
    asyncio.run(main())
