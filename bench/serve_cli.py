"""`baton bench serve` in the terminal: options, progress bar, table, JSON, picture.

Owns what is shown. Does not know how requests are sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.load import Planned, Shape, plan
from bench.report import Sample, summarise, svg
from bench.serve import run
from client.endpoints import Endpoints
from core.errors import ConfigError

UNKNOWN_VOCABULARY = 1000
"""For servers that do not report it: token ids that any model has."""
LIMITS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's options."""

    url: str
    model: str
    shape: Shape
    concurrency: int
    goodput: str
    timeout_s: float
    plot: Path | None
    access: Endpoints
    as_json: bool


def run_bench(options: Options) -> None:
    """Run and report.

    Raises:
        ConfigError: The options are wrong, or server or trace are missing.
        SystemExit: 1 if no request completed.
    """
    shape = options.shape
    limits = parse_limits(options.goodput)
    if not (shape.rate or shape.trace or options.concurrency):
        raise ConfigError("choose how to offer load: --concurrency, --rate or --trace")

    def make_load(card: dict[str, Any]) -> list[Planned]:
        return plan(
            replace(shape, vocabulary_size=int(card.get("vocabulary_size") or UNKNOWN_VOCABULARY))
        )

    progress = Progress(
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
        disable=options.as_json and not Console(stderr=True).is_terminal,
    )
    with progress:
        bar = progress.add_task("requests", total=shape.requests, note="")
        on_done = _counter(
            lambda done, failed: progress.update(
                bar, completed=done, note=f"{failed} failed" if failed else ""
            )
        )
        samples = asyncio.run(
            run(
                options.url,
                options.model,
                make_load,
                options.concurrency,
                options.timeout_s,
                on_done,
                options.access,
            )
        )
    summary = summarise(samples, limits)
    load = {name: value for name, value in asdict(shape).items() if name != "vocabulary_size"}
    if options.plot is not None:
        title = f"{len(samples)} requests, {summary['output_tokens_per_s']:.0f} output tokens/s"
        options.plot.write_text(svg(samples, title), encoding="utf-8")
    if options.as_json:
        raw = [asdict(sample) for sample in samples]
        load["trace"] = Path(shape.trace).name
        typer.echo(
            json.dumps(
                {"load": {**load, "concurrency": options.concurrency}, **summary, "samples": raw},
                indent=1,
            )
        )
    else:
        _show(summary)
    if not summary["completed"]:
        raise SystemExit(1)


def _counter(show: Callable[[int, int], None]) -> Callable[[Sample], None]:
    counts = {"done": 0, "failed": 0}

    def on_done(sample: Sample) -> None:
        counts["done"] += 1
        counts["failed"] += bool(sample.error)
        show(counts["done"], counts["failed"])

    return on_done


def parse_limits(text: str) -> dict[str, float]:
    """Read `ttft:500,tpot:40`.

    Raises:
        ConfigError: Names the part that is wrong.
    """
    limits = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition(":")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--goodput has {part!r}, must be like ttft:500") from error
        if name not in LIMITS:
            raise ConfigError(f"--goodput has {name!r}, must be one of {', '.join(LIMITS)}")
    return limits


def _show(summary: dict[str, Any]) -> None:
    console = Console()
    table = Table("ms", "mean", "p50", "p95", "p99", "max", box=box.SIMPLE)
    for name in ("ttft", "itl", "tpot", "e2e", "longest_gap", "send_lag"):
        row = summary[name]
        if row:
            keys = ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "max_ms")
            table.add_row(name.replace("_", " "), *(f"{row[key]:.2f}" for key in keys))
    console.print(table)
    console.print(
        f"{summary['completed']} of {summary['requests']} requests in {summary['took_s']:.2f} s: "
        f"{summary['requests_per_s']:.2f} requests/s, {summary['output_tokens_per_s']:.1f} output "
        f"tokens/s, {summary['total_tokens_per_s']:.1f} tokens/s, concurrency "
        f"{summary['achieved_concurrency']:.1f}, {summary['cached_tokens']} of "
        f"{summary['input_tokens']} prompt tokens cached"
    )
    if "attainment" in summary:
        console.print(
            f"limits {summary['limits_ms']} ms: attainment {summary['attainment']:.1%}, "
            f"goodput {summary['goodput_requests_per_s']:.2f} requests/s"
        )
    for message, count in summary["errors"].items():
        console.print(f"{count} failed: {message}", markup=False)
