"""What a hand-over costs a request: exposed transfer by prompt
length and transport, beside one pool.

A model of Qwen2.5-0.5B's shape with random weights is made in a temporary folder; one request at a
time, fresh prompts, one thread a rank. Exposed is the time from the first token's arrival at the
router to the decode worker's announcement of the same token. `colocated` is the same cluster with
one pool. Run: python -m benchmarks.handover [--prompts 128 512 2048] [--rounds N] [--transports shm
grpc gloo] Draws docs/handover.svg.
"""

import argparse
import asyncio
import json
import random
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import grpc
import torch
from rich.progress import Progress
from safetensors.torch import save_file

from benchmarks.chart import DOCS
from benchmarks.record import quantiles, save
from benchmarks.streaming import timed_stream
from cluster.local import LocalCluster
from core.config import BatonConfig
from engine.checkpoint.model_spec import read_model
from protos.baton.v1 import generation_pb2_grpc

TINY = Path(__file__).parent.parent / "models" / "baton-tiny"
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 257,
}
COLOURS = {"shm": "#2f6fde", "grpc": "#e08a2f", "gloo": "#3f9d5a", "colocated": "#8a94a6"}
OUTPUT = 16


def make_model(folder):
    """Write the shape with random weights; the tokenizer is the tiny model's,
    prompts are token ids."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(QWEN))
    (folder / "generation_config.json").write_text("{}")
    save_file(
        {"model.norm.weight": torch.ones(896, dtype=torch.bfloat16)}, folder / "model.safetensors"
    )
    generator = torch.Generator().manual_seed(1)
    shapes = _shapes(folder)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16) if "norm" in name
        else (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
        for name, shape in shapes.items()
    }  # fmt: skip
    save_file(tensors, folder / "model.safetensors")


def _shapes(folder):
    import engine.checkpoint.model_spec as spec_module

    compare, spec_module._compare = spec_module._compare, lambda *_, **__: None
    try:
        return read_model(folder).expected_tensors()
    finally:
        spec_module._compare = compare


def config_of(folder, kind, block=16):
    engine = {"num_blocks": 600, "max_step_tokens": 512, "block_size_tokens": block}
    tree = {
        "model": {"path": str(folder), "name": "shape", "max_model_len": 4096},
        "router": {
            "http_port": 0,
            "grpc_port": 0,
            "log_requests": False,
            "tokenizer_processes": 1,
        },
        "pools": {"prefill": {"engine": engine}, "decode": {"engine": engine}},
        "placement": {"path": "local" if kind == "colocated" else "pd"},
        "redis": {"enabled": False},
        "colocated": kind == "colocated",
    }
    if kind != "colocated":
        tree["transfer"] = {"transports": [kind]}
    return BatonConfig.model_validate(tree)


async def ask(stub, prompt_tokens, seed):
    """One greedy request; returns its timing, the gap before the second token,
    and the median gap after."""
    rng = random.Random(seed)
    ids = [rng.randrange(1000, 150000) for _ in range(prompt_tokens)]
    began, stamps, timing = await timed_stream(stub, ids, OUTPUT)
    gaps = sorted(b - a for a, b in pairwise(stamps[1:]))
    return {
        "e2e_s": stamps[-1] - began,
        "ttft_s": stamps[0] - began,
        "second_s": stamps[1] - stamps[0],
        "step_s": gaps[len(gaps) // 2],
        "exposed_s": timing.exposed_transfer_s,
        "kv_bytes": timing.kv_bytes,
    }


async def measure(folder, kinds, prompts, rounds, on_done):
    """Rounds over kinds and prompts; clusters run by turns,
    so that the machine's moods fall on all."""
    rows = {(kind, prompt): [] for kind in kinds for prompt in prompts}
    for turn in range(rounds):
        for kind in kinds:
            cluster = LocalCluster(config_of(folder, kind))
            await cluster.start()
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.grpc_port}") as channel:
                    stub = generation_pb2_grpc.GenerationStub(channel)
                    await asyncio.sleep(2)  # the canary has gone through by then
                    await ask(stub, 64, 1)
                    for prompt in prompts:
                        for i in range(3):
                            rows[kind, prompt].append(
                                await ask(stub, prompt, hash((turn, i, prompt)))
                            )
                            on_done()
            finally:
                await cluster.stop()
    return [
        {
            "kind": kind,
            "prompt_tokens": prompt,
            **{name: quantiles([r[name] for r in found]) for name in found[0]},
        }
        for (kind, prompt), found in rows.items()
    ]


def draw(rows, origin):
    """Exposed transfer against prompt length, a line per transport."""
    kinds = [k for k in COLOURS if k != "colocated" and any(r["kind"] == k for r in rows)]
    most = max(r["exposed_s"]["p50"] for r in rows if r["kind"] in kinds) * 1e3
    longest = max(r["prompt_tokens"] for r in rows)
    parts = [
        (
            '<text x="60" y="26" font-weight="bold">exposed transfer, ms (median), by prompt '
            "tokens</text>"
        )
    ]
    for index, kind in enumerate(kinds):
        mine = [r for r in rows if r["kind"] == kind]
        at = [
            (
                60 + 520 * r["prompt_tokens"] / longest,
                250 - 200 * r["exposed_s"]["p50"] * 1e3 / most,
            )
            for r in mine
        ]
        line = " ".join(f"{x:.0f},{y:.0f}" for x, y in at)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{COLOURS[kind]}" stroke-width="2"/>'
        )
        for (x, y), r in zip(at, mine, strict=True):
            parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{COLOURS[kind]}"/>')
            parts.append(
                f'<text x="{x:.0f}" y="{y - 8:.0f}" font-size="11" '
                f'text-anchor="middle">{r["exposed_s"]["p50"] * 1e3:.1f}</text>'
            )
            if index == 0:
                parts.append(
                    f'<text x="{x:.0f}" y="270" font-size="11" '
                    f'text-anchor="middle">{r["prompt_tokens"]}</text>'
                )
        parts.append(
            f'<text x="600" y="{60 + 18 * index}" font-size="12" '
            f'fill="{COLOURS[kind]}">{kind}</text>'
        )
    parts.append('<line x1="60" y1="250" x2="590" y2="250" stroke="#99a"/>')
    parts.append(f'<text x="60" y="292" font-size="11" fill="#667">{origin}</text>')
    box = '<rect width="660" height="304" fill="white"/>'
    (DOCS / "handover.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="660" height="304" '
        f'font-family="sans-serif" font-size="13">{box}'
        f"{''.join(parts)}</svg>\n"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1024, 2048])
    parser.add_argument("--transports", nargs="+", default=["shm", "grpc", "gloo"])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    kinds = [*options.transports, "colocated"]
    with tempfile.TemporaryDirectory() as name, Progress() as progress:
        folder = Path(name) / "shape"
        make_model(folder)
        task = progress.add_task(
            "requests", total=options.rounds * len(kinds) * len(options.prompts) * 3
        )
        rows = asyncio.run(
            measure(folder, kinds, options.prompts, options.rounds, lambda: progress.advance(task))
        )  # fmt: skip
    for r in rows:
        print(
            f"{r['kind']:10} {r['prompt_tokens']:5} tokens  exposed "
            f"{r['exposed_s']['p50'] * 1e3:7.2f} ms  ttft {r['ttft_s']['p50']:6.3f} s  second "
            f"{r['second_s']['p50'] * 1e3:7.2f} ms  step {r['step_s']['p50'] * 1e3:7.2f} ms  e2e "
            f"{r['e2e_s']['p50']:6.3f} s"
        )
    path = save("handover", {"output_tokens": OUTPUT, "rounds": options.rounds, "rows": rows})
    result = json.loads(path.read_text())
    machine = result["machine"]
    draw(
        rows,
        f"commit {result['commit']}, {machine['cpu']}, {machine['cores']} cores, Qwen2.5-0.5B's "
        "shape, bf16",
    )


if __name__ == "__main__":
    main()
