"""A chat's turns with and without prefixes kept: time to the first token, turn by turn.

A model of Qwen2.5-0.5B's shape with random weights, 2 prefill and 2 decode workers, one thread a
rank, embedded Redis. The first turn's prompt and answer make 2,048 tokens of history; each turn
adds a question of 32 tokens and an answer of 64. A chat's history goes as token ids, so that no
template comes between. `without` is the same cluster whose workers keep no prefixes. Chats go one
at a time, the two clusters by turns. Run: python -m benchmarks.conversation [--chats N] [--rounds
N] [--turns 8] [--model FOLDER --history TOKENS]. Draws docs/conversation.svg.
"""

import argparse
import asyncio
import random
import tempfile
from pathlib import Path

import grpc
import httpx
from rich.progress import Progress

from benchmarks.chart import draw_conversation
from benchmarks.handover import make_model
from benchmarks.record import quantiles, save
from cluster.local import LocalCluster
from cluster.redis.server import RedisServer
from core.config import BatonConfig
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

ANSWER = 64
QUESTION = 32
KINDS = ("with", "without")
PUBLISHED_S = 30.0


def config_of(folder, redis_url, *, keeps):
    engine = {"num_blocks": 1200, "max_step_tokens": 512, "cache_prefixes": keeps}
    return BatonConfig.model_validate(
        {
            "model": {"path": str(folder), "name": "shape"},
            "router": {
                "http_port": 0,
                "grpc_port": 0,
                "log_requests": False,
                "tokenizer_processes": 1,
            },
            "pools": {
                "prefill": {"replicas": 2, "engine": engine},
                "decode": {"replicas": 2, "engine": engine},
            },
            "redis": {"url": redis_url},
        }
    )


async def ask(stub, ids):
    """One greedy turn; returns its answer and what it cost."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingOptions(temperature=0),
        stopping=pb.StoppingOptions(max_tokens=ANSWER, ignore_eos=True),
        response=pb.ResponseOptions(timing=True),
    )
    answer = []
    async for message in stub.GenerateStream(request):
        kind = message.WhichOneof("event")
        if kind == "delta":
            answer += [token.token_id for token in message.delta.tokens]
        elif kind == "summary":
            timing = message.summary.timing
            cached = message.summary.usage.cached_tokens
    return answer, {
        "ttft_s": timing.ttft_s,
        "prompt_tokens": len(ids),
        "cached_tokens": cached,
        "path": timing.path,
    }


async def until_published(cluster):
    """Wait until the router's view has stopped to change: publishing is no part of a turn."""
    last = None
    async with asyncio.timeout(PUBLISHED_S), httpx.AsyncClient(timeout=10) as http:
        while True:
            report = (await http.get(f"http://127.0.0.1:{cluster.http_port}/prefix-index")).json()
            if report["entries"] == last:
                return
            last = report["entries"]
            await asyncio.sleep(0.2)


async def chat(cluster, stub, seed, turns, history, vocabulary, on_done):
    rng = random.Random(seed)

    def words(count):
        return [rng.randrange(vocabulary[0], vocabulary[1]) for _ in range(count)]

    ids = words(history - ANSWER)
    num_known = 0
    rows = []
    for turn in range(1, turns + 1):
        answer, row = await ask(stub, ids)
        rows.append({"turn": turn, "history_tokens": num_known, **row})
        num_known = len(ids) + len(answer)
        ids += [*answer, *words(QUESTION)]
        await until_published(cluster)
        on_done()
    return rows


async def measure(options, folder, vocabulary, on_done):
    rows = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind in KINDS:
            redis = RedisServer()
            cluster = LocalCluster(config_of(folder, redis.url, keeps=kind == "with"))
            await cluster.start()
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.grpc_port}") as channel:
                    stub = generation_pb2_grpc.GenerationStub(channel)
                    await asyncio.sleep(2)  # the canary has gone through by then
                    # One that is not counted: whatever is done once is done.
                    await chat(cluster, stub, 1, 2, options.history, vocabulary, lambda: None)
                    for index in range(options.chats):
                        seed = 100 * number + index + 2
                        rows[kind] += await chat(
                            cluster, stub, seed, options.turns, options.history, vocabulary, on_done
                        )
            finally:
                await cluster.stop()
                redis.stop()
    return rows


def summarise(rows, turns):
    """Medians by turn, and how much of the time without prefixes is left with them."""
    found = []
    for turn in range(1, turns + 1):
        kinds = {kind: [r for r in rows[kind] if r["turn"] == turn] for kind in KINDS}
        mine = kinds["with"]
        row = {
            "turn": turn,
            "history_tokens": mine[0]["history_tokens"],
            "prompt_tokens": mine[0]["prompt_tokens"],
            "cached_tokens": min(r["cached_tokens"] for r in mine),
            "paths": sorted({r["path"] for r in mine}),
            **{f"{kind}_ttft_s": quantiles([r["ttft_s"] for r in kinds[kind]]) for kind in KINDS},
        }
        row["ratio"] = row["with_ttft_s"]["p50"] / row["without_ttft_s"]["p50"]
        found.append(row)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--chats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--history", type=int, default=2048)
    parser.add_argument("--model", type=Path, help="another model than the shape, of few tokens")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Progress() as progress:
        folder, vocabulary = options.model, (0, 250)
        if folder is None:
            folder, vocabulary = Path(name) / "shape", (1000, 150_000)
            make_model(folder)
        task = progress.add_task(
            "turns", total=options.rounds * len(KINDS) * options.chats * options.turns
        )
        rows = asyncio.run(measure(options, folder, vocabulary, lambda: progress.advance(task)))
    by_turn = summarise(rows, options.turns)
    for row in by_turn:
        print(
            f"turn {row['turn']}: {row['prompt_tokens']:5} tokens, {row['cached_tokens']:5} cached"
            f"  {row['with_ttft_s']['p50'] * 1e3:8.1f} ms with  "
            f"{row['without_ttft_s']['p50'] * 1e3:8.1f} ms without  {row['ratio']:.2f} "
            f"{'/'.join(row['paths'])}"
        )
    path = save(
        "conversation",
        {
            "model": "Qwen2.5-0.5B's shape" if options.model is None else options.model.name,
            "workers": "2 prefill, 2 decode",
            "aim_ratio_of_turn_2": 0.5,
            "by_turn": by_turn,
            "samples": rows,
        },
    )
    print(path)
    draw_conversation()


if __name__ == "__main__":
    main()
