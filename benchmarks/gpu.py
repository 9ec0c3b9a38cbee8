"""Prefill and decode as two processes on one GPU, the KV handed over: is it exact, and how fast.

A model of Qwen2.5-0.5B's shape with random weights. Everything runs in one call, under ten minutes:

1. equality: greedy answers handed over between two pools beside those of one process
   (`--colocated`)
2. speeds: first token, exposed transfer, step, by prompt length, both ways; what copying out of the
   device costs
3. two NCCL ranks on the one device, which stock NCCL refuses: tried in processes that may hang, and
   reported

Run: python -m benchmarks.gpu [--device cuda] [--prompts 128 512 2048]. With `--device cpu` it runs
anywhere, to check the script itself; nothing of that is saved.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc
import torch

from benchmarks.handover import ask, make_model
from benchmarks.record import quantiles, save
from cluster.local import LocalCluster
from core.config import BatonConfig
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

ANSWERS = 8
NCCL_TIMEOUT_S = 60
PAIR = """
import sys, time, torch
from datetime import timedelta
from kv_transfer.sidecar.pairs import Rendezvous, NcclPair, request_pair
import socket
rank, port = int(sys.argv[1]), sys.argv[2]
if rank == 0:
    point = Rendezvous(socket.create_server(("127.0.0.1", 0)))
    print(point.port, flush=True)
    store = point.next_request()
else:
    store = request_pair(f"127.0.0.1:{port}")
pair = NcclPair(store, rank, "", 30.0, torch.empty(0, dtype=torch.uint8))
data = torch.arange(1 << 20, dtype=torch.int64).to(torch.uint8)
began = time.perf_counter()
for _ in range(64):
    if rank == 0:
        pair.send(data).wait()
    else:
        got = torch.zeros(1 << 20, dtype=torch.uint8)
        pair.recv(got).wait()
        assert torch.equal(got, data)
torch.cuda.synchronize()
print((64 << 20) / (time.perf_counter() - began) / 1e9, flush=True)
"""


def config_of(folder, device, *, colocated):
    engine = {"num_blocks": 2048, "max_step_tokens": 2048, "device": device}
    return BatonConfig.model_validate(
        {
            "model": {"path": str(folder), "name": "shape", "max_model_len": 8192},
            "router": {
                "http_port": 0,
                "grpc_port": 0,
                "log_requests": False,
                "tokenizer_processes": 1,
            },
            "pools": {"prefill": {"engine": engine}, "decode": {"engine": engine}},
            "placement": {"path": "local" if colocated else "pd"},
            "redis": {"enabled": False},
            "colocated": colocated,
        }
    )


async def answer(stub, ids):
    """The greedy tokens of a prompt of ids."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingOptions(temperature=0),
        stopping=pb.StoppingOptions(max_tokens=32, ignore_eos=True),
    )  # fmt: skip
    reply = await stub.Generate(request)
    return [token.token_id for token in reply.choices[0].tokens]


async def run(folder, options, *, colocated):
    """Answers and timings of one cluster."""
    cluster = LocalCluster(config_of(folder, options.device, colocated=colocated))
    await cluster.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.grpc_port}") as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            await asyncio.sleep(2)
            rng = random.Random(7)
            prompts = [
                [rng.randrange(1000, 150000) for _ in range(64 + 37 * n)] for n in range(ANSWERS)
            ]
            tokens = [await answer(stub, ids) for ids in prompts]
            rows = []
            for length in options.prompts:
                await ask(stub, length, 1)
                found = [await ask(stub, length, 100 * length + i) for i in range(options.repeats)]
                rows.append(
                    {
                        "prompt_tokens": length,
                        **{name: quantiles([f[name] for f in found]) for name in found[0]},
                    }
                )
            return tokens, rows
    finally:
        await cluster.stop()


def two_ranks_on_one_device():
    """What NCCL says to two ranks on one GPU; each in a process that is killed if it hangs."""
    found = []
    for environment in ({}, {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}):
        env = {**os.environ, "TORCH_NCCL_BLOCKING_WAIT": "1", **environment}
        first = subprocess.Popen(
            [sys.executable, "-c", PAIR, "0", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        second = None
        try:
            port = first.stdout.readline().strip()
            second = subprocess.run(
                [sys.executable, "-c", PAIR, "1", port],
                capture_output=True,
                text=True,
                timeout=NCCL_TIMEOUT_S,
                check=False,
                env=env,
            )
            text = (
                second.stdout.strip()
                if second.returncode == 0
                else [line for line in second.stderr.splitlines() if "rror" in line]
            )
            found.append({"environment": environment, "ok": second.returncode == 0, "says": text})
        except subprocess.TimeoutExpired:
            found.append(
                {"environment": environment, "ok": False, "says": f"hung for {NCCL_TIMEOUT_S} s"}
            )
        finally:
            first.kill()
            first.communicate()
    return found


def copies_out():
    """Speed of copying a layer's blocks from the device to its pinned stage and back, GB/s."""
    from engine.model.kv_pools import StagedPool

    shape, dtype = (24, 2048, 2, 16, 2, 64), torch.bfloat16
    stage = bytearray(2 * 24 * 2048 * 2 * 16 * 2 * 64)
    pool = StagedPool(memoryview(stage), shape, dtype, torch.device("cuda"), exports_kv=True)
    blocks, speeds = list(range(128)), {}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for name, move in (
        ("in", lambda: pool.load_staged_blocks(blocks)),
        ("out", lambda: [pool.layer_queued(i, blocks) for i in range(24)]),
    ):
        for _ in range(3):
            torch.cuda.synchronize()
            begin.record()
            move()
            list(pool.finished())
            end.record()
            torch.cuda.synchronize()
        speeds[name] = 24 * 128 * pool.kv[0, 0].nbytes / begin.elapsed_time(end) / 1e6
    return speeds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shape"
        make_model(folder)
        tokens, rows = asyncio.run(run(folder, options, colocated=False))
        expected, alone = asyncio.run(run(folder, options, colocated=True))
    result = {
        "device": torch.cuda.get_device_name(0) if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "equal_answers": sum(a == b for a, b in zip(tokens, expected, strict=True)),
        "answers": ANSWERS,
        "handed_over": rows,
        "colocated": alone,
    }
    if options.device == "cuda":
        result["copies_gb_per_s"] = copies_out()
        result["nccl_two_ranks_on_one_device"] = two_ranks_on_one_device()
        save("gpu", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
