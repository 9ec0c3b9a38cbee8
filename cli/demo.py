"""`make demo`: real disaggregation on a laptop, from one command.

Owns the show: a cluster on a local Ray with path `pd` forced, answers over gRPC and HTTP, a table
of where the time went and what was handed over. Does not know how any of it works. Exits 0 only if
every request crossed two different processes and the KV bytes equal layout x blocks.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.table import Table

from cli.client import stream_answer
from cluster.ray.env import prepare_fresh_ray
from cluster.served_model import model_of
from core.config import load_config
from process.orphan_reaper import OrphanReaper
from protos.baton.v1 import generation_pb2 as pb

PROMPTS = (
    "<|begin|><|user|>What is the capital of France?<|end|><|assistant|>",
    "<|begin|><|user|>Count from 3 to 7.<|end|><|assistant|>",
    "import asyncio\n\n\nclass ",
)
MAX_TOKENS = 48
READY_TIMEOUT_S = 30.0
console = Console()


def wait_ready(base: str) -> dict[str, Any]:
    """Poll /ready until the canary has crossed both workers."""
    give_up_at = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            with urlopen(f"{base}/ready", timeout=5) as reply:  # noqa: S310 - our own router on loopback
                tree: dict[str, Any] = json.loads(reply.read())
                return tree
        except (URLError, OSError):
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.2)


def over_grpc(address: str, prompt: str) -> dict[str, Any]:
    """Stream one answer over gRPC."""
    request = pb.GenerateRequest(
        text=prompt,
        sampling=pb.SamplingOptions(temperature=0.0),
        stopping=pb.StoppingOptions(max_tokens=MAX_TOKENS),
        response=pb.ResponseOptions(timing=True),
    )
    answer = stream_answer(
        address, request, lambda text: console.print(text, end="", markup=False, highlight=False)
    )
    t = answer.timing
    return {
        "server": "gRPC",
        "queue_ms": t.queue_s * 1e3,
        "prefill_ms": t.prefill_s * 1e3,
        "exposed_transfer_ms": t.exposed_transfer_s * 1e3,
        "decode_ms": t.decode_s * 1e3,
        "ttft_ms": t.ttft_s * 1e3,
        "prefill_pid": t.prefill_pid,
        "decode_pid": t.decode_pid,
        "kv_bytes": t.kv_bytes,
        "kv_blocks": t.kv_blocks,
        "prompt_tokens": answer.usage.prompt_tokens,
    }


def over_http(base: str, prompt: str) -> dict[str, Any]:
    """Stream one answer over HTTP."""
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json", "x-baton-timing": "1"}
    request = Request(f"{base}/v1/completions", json.dumps(body).encode(), headers)  # noqa: S310
    last: dict[str, Any] = {}
    with urlopen(request, timeout=60) as reply:  # noqa: S310
        for raw in reply:
            line = raw.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            last = json.loads(line.removeprefix("data: "))
            for choice in last.get("choices", []):
                console.print(choice["text"], end="", markup=False, highlight=False)
    return {"server": "HTTP", **last["timing"], "prompt_tokens": last["usage"]["prompt_tokens"]}


def show(rows: list[dict[str, Any]], block_bytes: int) -> bool:
    """Print the table; return True if every row shows a real transfer."""
    phases = ("queue", "prefill", "exposed transfer", "decode", "TTFT")
    table = Table("server", "prompt", *phases, "prefill pid", "decode pid", "KV bytes transferred")
    table.title = "where the time went (ms)"
    is_good = True
    for r in rows:
        is_whole = r["kv_bytes"] == r["kv_blocks"] * block_bytes and r["kv_blocks"] > 0
        is_good = is_good and is_whole and r["prefill_pid"] != r["decode_pid"]
        times = [
            f"{r[name]:.1f}"
            for name in ("queue_ms", "prefill_ms", "exposed_transfer_ms", "decode_ms", "ttft_ms")
        ]
        table.add_row(
            r["server"],
            f"{r['prompt_tokens']} tokens",
            *times,
            str(r["prefill_pid"]),
            str(r["decode_pid"]),
            f"{r['kv_bytes']} = {r['kv_blocks']} blocks x {block_bytes}",
        )
    Console(width=max(console.width, 150)).print(table)
    return is_good


def main() -> int:
    """Run the demo.

    Returns:
        Exit code.
    """
    started_at = time.monotonic()
    config = load_config(
        flags={"placement.path": "pd", "router.http_port": 0, "router.grpc_port": 0}
    )
    spec = model_of(config)
    block_bytes = spec.layout(config.pools.decode.engine.block_size_tokens).block_bytes
    console.rule("starting Ray, one router, one prefill worker, one decode worker")
    orphan_reaper = OrphanReaper()
    prepare_fresh_ray()
    from cluster.ray.app import RayCluster  # noqa: PLC0415 - Ray reads its environment at import

    cluster = RayCluster(config, on_session=orphan_reaper.watch_folder)
    rows = []
    try:
        cluster.start()
        base = f"http://127.0.0.1:{cluster.http_port}"
        address = f"127.0.0.1:{cluster.grpc_port}"
        readiness = wait_ready(base)
        console.print(
            f"ready after {time.monotonic() - started_at:.1f} s: {json.dumps(readiness['models'])}",
            highlight=False,
        )
        for prompt in PROMPTS:
            console.rule(f"gRPC: {prompt!r}", align="left")
            rows.append(over_grpc(address, prompt))
            console.print()
            console.rule(f"HTTP: {prompt!r}", align="left")
            rows.append(over_http(base, prompt))
            console.print()
    finally:
        cluster.stop()
        orphan_reaper.release()
    is_good = show(rows, block_bytes)
    console.print(f"done in {time.monotonic() - started_at:.1f} s")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
