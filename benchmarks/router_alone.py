"""Tokens per second that one core of a saturated router carries, over HTTP and over gRPC.

    python -m benchmarks.router_alone

A real router process (both servers, sessions over gRPC, detokenizing) in front of a real worker
whose runner returns a token at once. The router's own CPU seconds are read from /proc: tokens over
them is tokens per second per core, whatever client and worker cost beside it. Path local; each
request has 256 output tokens.

`baton bench router` measures what a request costs at an engine's pace, over HTTP. Only here does
nothing hold the router back, and only here is the gRPC server measured.
"""

import asyncio
import json
import os
import sys
from dataclasses import replace

import grpc
from rich.console import Console
from rich.table import Table

from bench.cpu_time import cpu_s
from bench.load import Shape, plan
from bench.report import summarise
from bench.serve import run
from benchmarks.record import save
from client.endpoints import Endpoints
from cluster.local import Child
from cluster.members import from_json, to_json
from cluster.served_model import model_of
from core.clocks import SystemClock
from core.config import EngineConfig, TransferConfig, load_config
from core.ids import Ids, WorkerId
from core.plan import StepResult
from core.types import Logprob
from decode_worker.role import DecodeRole
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc
from simulation.hash_runner import MemoryKV
from transport.fetch_streams import fetch_network
from transport.session_streams import session_network
from transport.stream_proof import stream_key
from worker.components import WorkerComponents
from worker.worker import compose

OUTPUT = 256
STREAMS = (1, 8, 64)
ENGINE = EngineConfig(num_blocks=2048, max_sequences=128, cache_prefixes=False)
KEY = stream_key("")
"""The router's own: its config names no secret."""


class StubRunner:
    """An engine without a model: every token is a letter."""

    layers_done = 0

    async def execute(self, plan, on_layer):
        tokens = {
            (i.sequence_key, s.choice): Logprob(97 + s.position % 26, 0.0)
            for i in plan.items
            for s in i.samples
        }
        await asyncio.sleep(0)
        return StepResult(plan.step_id, tokens)

    async def lost(self):
        await asyncio.Event().wait()  # it never dies

    async def restart(self):
        raise RuntimeError("a stub never dies")

    def rank_pids(self):
        return ()


async def worker():
    """The worker's process: say where it listens, run until the parent lets go."""
    spec, ids = model_of(load_config(None, {}, {})), Ids()
    layout = spec.layout(ENGINE.block_size_tokens)
    unit = compose(
        WorkerComponents(
            role=DecodeRole,
            runner=StubRunner(),
            kv=MemoryKV(layout, ENGINE.num_blocks),
            layout=layout,
            engine=ENGINE,
            transfer=TransferConfig(),
            max_model_len=spec.max_model_len,
            vocabulary_size=spec.vocabulary_size,
            session_network=session_network(key=KEY),
            transfer_network=fetch_network(key=KEY),
            clock=SystemClock(),
            worker_id=WorkerId("stub"),
            incarnation=ids.incarnation(),
            model=spec.name,
            pid=os.getpid(),
        ),
    )
    print(json.dumps(to_json(await unit.start())), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


async def over_http(port, streams, requests):
    shape = Shape(requests, 16, OUTPUT)
    samples = await run(
        f"http://127.0.0.1:{port}",
        "",
        lambda card: plan(replace(shape, vocabulary_size=256)),
        streams,
        120,
        lambda s: None,
        Endpoints(),
    )
    summary = summarise(samples, {})
    assert summary["completed"] == requests, summary["errors"]
    return summary["output_tokens"], summary["took_s"]


async def over_grpc(port, streams, requests):
    loop = asyncio.get_running_loop()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        left = iter(range(requests))

        async def one():
            for _ in left:
                request = pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=range(3, 19)),
                    stopping=pb.StoppingOptions(max_tokens=OUTPUT, ignore_eos=True),
                    sampling=pb.SamplingOptions(temperature=0),
                )
                async for _ in stub.GenerateStream(request):
                    pass

        start = loop.time()
        await asyncio.gather(*(one() for _ in range(streams)))
        return requests * OUTPUT, loop.time() - start


async def main():
    console = Console()
    stub = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.router_alone",
        "worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    descriptor = from_json(json.loads(await stub.stdout.readline()))
    flags = {
        "router.http_port": 0,
        "router.grpc_port": 0,
        "placement.path": "local",
        "colocated": True,
        "redis.enabled": False,
        "router.log_requests": False,
    }
    router = await Child.spawn("router", load_config(None, flags, {}))
    rows = []
    try:
        listens = (await router.recv("router-0"))["router"]
        update = {"members": [to_json(descriptor)], "is_starting": False, "routers": []}
        await router.send(json.dumps(update))
        await asyncio.sleep(1.0)
        for server, load, port in (
            ("HTTP", over_http, listens["http_port"]),
            ("gRPC", over_grpc, listens["grpc_port"]),
        ):
            for streams in STREAMS:
                requests = max(24, 3 * streams)
                await load(port, streams, streams)
                before_s, _ = cpu_s(router.process.pid)
                tokens, took_s = await load(port, streams, requests)
                used_s = cpu_s(router.process.pid)[0] - before_s
                rows.append(
                    {
                        "server": server,
                        "streams": streams,
                        "tokens": tokens,
                        "took_s": took_s,
                        "router_cpu_s": used_s,
                        "tokens_per_s": tokens / took_s,
                        "tokens_per_s_per_core": tokens / used_s,
                    }
                )
    finally:
        await router.stop()
        stub.stdin.close()
        await stub.wait()
    path = save("router_alone", {"output_tokens": OUTPUT, "rows": rows})
    table = Table("server", "streams", "tokens/s", "router CPU us/token", "tokens/s per core")
    for r in rows:
        table.add_row(
            r["server"],
            str(r["streams"]),
            f"{r['tokens_per_s']:.0f}",
            f"{r['router_cpu_s'] / r['tokens'] * 1e6:.1f}",
            f"{r['tokens_per_s_per_core']:.0f}",
        )
    console.print(table)
    console.print(path)


if __name__ == "__main__":
    asyncio.run(worker() if sys.argv[1:] == ["worker"] else main())
