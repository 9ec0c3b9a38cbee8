"""`baton bench`: the options of each benchmark.

Owns arguments. Does not know how anything is measured: `bench` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Ca, Cert, Key, Output, Url

bench = typer.Typer(help="Measure a server.", no_args_is_help=True)


@bench.command("transfer")
def bench_transfer(
    transport: Annotated[str, typer.Option(help="shm, grpc, gloo, nccl or nixl")] = "shm",
    mib: Annotated[int, typer.Option(help="size of one transfer", min=1, max=4096)] = 24,
    streams: Annotated[int, typer.Option(help="transfers at once", min=1, max=64)] = 1,
    turns: Annotated[int, typer.Option(help="alternating turns", min=1, max=100)] = 5,
    copy_threads: Annotated[int, typer.Option(help="receiving cores", min=1, max=16)] = 1,
    output: Output = "table",
) -> None:
    """Measure KV transfer between two processes, against plain memory and a bare stream."""
    from bench.transfer_cli import run_bench_transfer  # noqa: PLC0415
    from bench.transfer_plan import TransferPlan  # noqa: PLC0415

    run_bench_transfer(
        TransferPlan(transport, mib, streams, turns, copy_threads=copy_threads),
        as_json=output == "json",
    )


@bench.command("serve")
def bench_serve(  # noqa: PLR0913 - one option each
    url: Url = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(help="requests to send", min=1)] = 100,
    concurrency: Annotated[
        int, typer.Option(help="closed loop: requests in flight; with --rate: at most", min=0)
    ] = 0,
    rate: Annotated[float, typer.Option(help="open loop: requests per second", min=0.0)] = 0.0,
    burstiness: Annotated[
        float,
        typer.Option(help="shape of the gamma gaps: 1 is Poisson, less is burstier", min=0.01),
    ] = 1.0,
    trace: Annotated[
        str,
        typer.Option(help="JSON lines or CSV: arrival_s, input_tokens, output_tokens[, hash_ids]"),
    ] = "",
    trace_divide: Annotated[
        int, typer.Option(help="divide a trace's lengths, for small models", min=1)
    ] = 1,
    trace_block_tokens: Annotated[
        int, typer.Option(help="tokens that one of a trace's hash_ids stands for", min=1)
    ] = 512,
    speed: Annotated[
        float, typer.Option(help="replay a trace this many times faster", min=0.001)
    ] = 1.0,
    input_tokens: Annotated[int, typer.Option(help="prompt length", min=1)] = 256,
    output_tokens: Annotated[
        int, typer.Option(help="output length; the end of text is ignored", min=1)
    ] = 64,
    goodput: Annotated[str, typer.Option(help="limits like ttft:500,tpot:40,e2e:9000 (ms)")] = "",
    model: Annotated[str, typer.Option(help="empty: the first one served")] = "",
    seed: Annotated[int, typer.Option(help="of prompts and arrivals")] = 0,
    timeout_s: Annotated[float, typer.Option(help="of one request", min=0.1)] = 600.0,
    plot: Annotated[Path | None, typer.Option(help="write the distributions as SVG")] = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    output: Output = "table",
) -> None:
    """Offer a load to any OpenAI-style server and report TTFT, ITL, TPOT, E2E and goodput."""
    from bench.load import Shape  # noqa: PLC0415
    from bench.serve_cli import Options, run_bench  # noqa: PLC0415
    from client.endpoints import Endpoints  # noqa: PLC0415

    shape = Shape(
        requests,
        input_tokens,
        output_tokens,
        rate,
        burstiness,
        trace,
        trace_divide,
        trace_block_tokens,
        speed,
        seed,
    )
    access = Endpoints(ca, cert, key)
    as_json = output == "json"
    run_bench(
        Options(url, model, shape, concurrency, goodput, timeout_s, plot, access, as_json=as_json)
    )


@bench.command("router")
def bench_router(  # noqa: PLR0913 - one option each
    rate: Annotated[
        float, typer.Option(help="requests per second while TTFT is measured", min=0.1)
    ] = 200.0,
    prompt_tokens: Annotated[int, typer.Option(help="prompt length", min=1)] = 4096,
    shared_tokens: Annotated[
        int, typer.Option(help="of them, those that other prompts begin with, too", min=0)
    ] = 2048,
    output_tokens: Annotated[
        int, typer.Option(help="output length, where TTFT and refusals are measured", min=2)
    ] = 16,
    streams: Annotated[int, typer.Option(help="concurrent streams", min=1)] = 256,
    overload: Annotated[
        float, typer.Option(help="offered load over capacity while it refuses", min=1.0)
    ] = 10.0,
    max_concurrent: Annotated[
        int, typer.Option(help="requests that are admitted at once meanwhile", min=1)
    ] = 32,
    seconds: Annotated[
        float, typer.Option(help="of each of the three loads", min=0.1, max=60.0)
    ] = 10.0,
    workers: Annotated[int, typer.Option(help="stub workers of each pool", min=1, max=256)] = 2,
    clients: Annotated[int, typer.Option(help="processes that send", min=1, max=64)] = 1,
    first_token_ms: Annotated[
        float, typer.Option(help="time of a stub worker over a prompt", min=0.0)
    ] = 20.0,
    token_ms: Annotated[
        float, typer.Option(help="time of a stub worker over a decode step", min=0.1)
    ] = 20.0,
    seed: Annotated[int, typer.Option(help="of prompts and arrivals")] = 0,
    output: Output = "table",
) -> None:
    """Measure a router alone, before stub workers: added TTFT, tokens per core, refusals."""
    from bench.router.cli import run_bench_router  # noqa: PLC0415
    from bench.router.plan import RouterPlan  # noqa: PLC0415
    from cli.collect_env import collect  # noqa: PLC0415

    plan = RouterPlan(
        rate=rate,
        prompt_tokens=prompt_tokens,
        shared_tokens=min(shared_tokens, prompt_tokens),
        output_tokens=output_tokens,
        streams=streams,
        overload=overload,
        max_concurrent=max_concurrent,
        seconds=seconds,
        workers=workers,
        clients=clients,
        first_token_ms=first_token_ms,
        token_ms=token_ms,
        seed=seed,
    )
    run_bench_router(plan, collect(), as_json=output == "json")
