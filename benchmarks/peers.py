"""The serving plane beside other servers: one client, one model, servers by turns (A B C A B C).

    python -m benchmarks.peers --peers DIR [--turns 3]

DIR holds what the peers' own instructions install: `llamacpp/build/bin/llama-server`, `vllmcpu/`,
and `models/tiny` with its `tiny-bf16.gguf` (4 layers, width 256, random weights). Prompts are 256
random tokens, outputs 64, greedy, no prefix cache anywhere; the client is `baton bench serve`'s. A
server that is not there is left out and the result says so. With each Baton turn goes the CPU time
of every process.
"""

import argparse
import asyncio
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

from rich.console import Console
from rich.table import Table

from bench.cpu_time import cpu_s
from bench.load import Shape, plan
from bench.report import summarise
from bench.serve import run
from benchmarks.record import RESULTS, save
from client.endpoints import Endpoints

LOADS = ((1, 12), (8, 48))  # (streams, requests)
PORT = 8191
ROOT = Path(__file__).parent.parent
BATON = {
    "BATON_ROUTER__LOG_REQUESTS": "false",
    "BATON_POOLS__PREFILL__ENGINE__CACHE_PREFIXES": "false",
    "BATON_POOLS__DECODE__ENGINE__CACHE_PREFIXES": "false",
}


def servers(peers):
    model = peers / "models" / "tiny"
    up = f"{sys.executable} -m cli.main up --local --model {model} --http-port {PORT} --grpc-port 0"
    llama = peers / "llamacpp" / "build" / "bin" / "llama-server"
    vllm = peers / "vllmcpu"
    tcmalloc = vllm / "tcmalloc/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"
    vllm_settings = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "OMP_NUM_THREADS": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "LD_PRELOAD": f"{tcmalloc}:{vllm}/lib/libiomp5.so",
    }
    serve = (
        f"{vllm}/bin/python -m vllm.entrypoints.openai.api_server --model {model} "
        "--served-model-name m --dtype bfloat16"
    )
    serve += (
        f" --max-model-len 4096 --max-num-seqs 32 --host 127.0.0.1 --port {PORT} "
        "--no-enable-prefix-caching --disable-log-stats"
    )
    slots = f"-t 2 -np 8 -c 4096 --host 127.0.0.1 --port {PORT} --no-webui --no-cache-prompt"
    return {
        "baton pd": (up, {**BATON, "BATON_PLACEMENT__PATH": "pd"}, "/ready"),
        "baton colocated": (f"{up} --colocated", BATON, "/ready"),
        "llama-server": (f"{llama} -m {model}-bf16.gguf {slots}", {}, "/health"),
        "vllm-cpu": (serve, vllm_settings, "/health"),
    }


def wait_ready(path, process, timeout_s=240):
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            with urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=2) as reply:
                if reply.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise TimeoutError(path)


def tree(pid):
    """A process and its descendants, with what each is."""
    found, stack = {}, [pid]
    while stack:
        one = stack.pop()
        try:
            words = Path(f"/proc/{one}/cmdline").read_bytes().decode(errors="replace").split("\0")
            stack += [
                int(c)
                for t in Path(f"/proc/{one}/task").iterdir()
                for c in (t / "children").read_text().split()
            ]
        except OSError:
            continue
        name = " ".join(
            w
            for w in words
            if w in ("router", "prefill", "decode")
            or w.startswith(("engine.ranks.rank", "router.tok"))
        )
        found[one] = name or "cli"
    return found


def load(streams, requests, seed):
    shape = Shape(requests, 256, 64, seed=seed, vocabulary_size=4096)
    samples = asyncio.run(
        run(
            f"http://127.0.0.1:{PORT}",
            "",
            lambda card: plan(replace(shape)),
            streams,
            300,
            lambda s: None,
            Endpoints(),
        )
    )
    summary = summarise(samples, {})
    if summary["errors"]:
        raise RuntimeError(summary["errors"])
    return summary


def turn(command, settings, path, seed):
    process = subprocess.Popen(
        shlex.split(command),
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=ROOT,
    )
    try:
        wait_ready(path, process)
        out = {}
        for streams, requests in LOADS:
            load(streams, streams * 2, 1000 + seed)
            names = tree(process.pid)
            before = {pid: cpu_s(pid)[0] for pid in names}
            summary = load(streams, requests, seed)
            used = {}
            for pid, name in names.items():
                used[name] = used.get(name, 0.0) + cpu_s(pid)[0] - before[pid]
            tokens = summary["output_tokens"]
            out[streams] = {
                "tokens_per_s": summary["output_tokens_per_s"],
                "ttft": summary["ttft"],
                "itl": summary["itl"],
                "tpot": summary["tpot"],
                "cpu_us_per_token": {name: s / tokens * 1e6 for name, s in used.items() if s},
            }
        return out
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", required=True, type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    wanted = {
        n: s
        for n, s in servers(arguments.peers.expanduser().resolve()).items()
        if not arguments.only or n in arguments.only
    }
    turns, missing, console = {name: [] for name in wanted}, {}, Console()
    for index in range(arguments.turns):
        for name, (command, settings, path) in wanted.items():
            if name in missing:
                continue
            try:
                turns[name].append(turn(command, settings, path, index))
                console.print(
                    index, name, {s: round(o["tokens_per_s"]) for s, o in turns[name][-1].items()}
                )
            except (OSError, RuntimeError, TimeoutError) as error:
                missing[name] = str(error)
                console.print(name, error)
    rows = []
    for name, done in turns.items():
        for streams, _ in LOADS:
            if not done:
                continue
            pick = [t[streams] for t in done]
            row = {
                "server": name,
                "streams": streams,
                "tokens_per_s": statistics.median(p["tokens_per_s"] for p in pick),
            }
            for m in ("ttft", "itl"):
                for q in ("p50_ms", "p99_ms"):
                    row[f"{m}_{q}"] = statistics.median(p[m][q] for p in pick)
            rows.append(row)
    sys.argv = [sys.argv[0], "--peers", "DIR", "--turns", str(arguments.turns)]
    path = save(
        "peers",
        {
            "model": "tiny: llama, 4 layers, width 256, bf16",
            "prompt_tokens": 256,
            "output_tokens": 64,
            "rows": rows,
            "missing": missing,
            "turns": turns,
        },
    )
    table = Table(
        "server",
        "streams",
        "tokens/s",
        "TTFT p50",
        "p99",
        "ITL p50",
        "p99",
        title="medians over turns, ms",
    )
    for r in rows:
        cells = (r[k] for k in ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"))
        table.add_row(
            r["server"], str(r["streams"]), f"{r['tokens_per_s']:.0f}", *(f"{c:.2f}" for c in cells)
        )
    console.print(table)
    console.print(path.relative_to(RESULTS.parent.parent))


if __name__ == "__main__":
    main()
