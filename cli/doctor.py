"""`baton doctor`: whether transferring KV pays on this cluster, measured on it.

Owns the measurements it asks of a running router (its KV routes, and fresh prompts of several
lengths) and the arithmetic of the verdict. Does not know workers or transports.

A transfer pays from the prompt length on at which moving the KV takes less time than computing it:
a shorter prompt is computed faster by the decode worker itself. The estimate takes the whole
transfer. Less of it is exposed, for layers leave while the next ones are computed; the report shows
that as measured.
"""

from __future__ import annotations

import json
import random
import secrets
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

import httpx
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.console import plain_console
from client.endpoints import Endpoints, authorization
from cluster.redis.binary import describe_server
from core.errors import ConfigError

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
MAX_PREFILL_S = 5.0
"""Prompts longer than the first one that takes this long are not tried."""
TURNS = 3
TIMEOUT_S = 120.0
ORDINARY_TOKENS = (300, 2000)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The measured cost of a fresh prompt of one length."""

    tokens: int
    prefill_ms: float
    kv_bytes: int
    exposed_ms: float
    transport: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """One route: its speed, and from how many tokens on it pays (None: never, as measured)."""

    prefill: str
    decode: str
    transport: str
    round_trip_ms: float
    gb_per_s: float | None
    error: str | None
    pays_from_tokens: int | None
    transfer_ms: dict[int, float]


def judge(route: dict[str, Any], prompts: list[Prompt]) -> Verdict:
    """Compare moving with computing, for every length that was measured."""
    speed = route["gb_per_s"]
    moving = (
        {p.tokens: route["round_trip_ms"] + p.kv_bytes / (speed * 1e6) for p in prompts}
        if speed
        else {}
    )
    # It pays from a length on only if it pays for all longer ones too.
    pays_from = None
    for prompt in reversed(prompts):
        if prompt.tokens not in moving or moving[prompt.tokens] >= prompt.prefill_ms:
            break
        pays_from = prompt.tokens
    rounded = {tokens: round(ms, 2) for tokens, ms in moving.items()}
    return Verdict(**route, pays_from_tokens=pays_from, transfer_ms=rounded)


class _Router:
    """A router over HTTP."""

    def __init__(self, url: str, access: Endpoints) -> None:
        self._url = url
        self._access = access
        self._client = httpx.Client(
            base_url=url, headers=authorization(), timeout=TIMEOUT_S, verify=access.context
        )

    def ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Send one request.

        Raises:
            ConfigError: Nobody answers, or something that is no router.
        """
        try:
            reply = self._client.request(method, path, json=body, headers={"x-baton-timing": "1"})
        except httpx.HTTPError as error:
            raise self._access.unreachable(self._url, error) from error
        if reply.status_code != HTTPStatus.OK:
            raise ConfigError(
                f"{method} {path} was answered with {reply.status_code}: {reply.text[:300]}"
            )
        tree: dict[str, Any] = reply.json()
        return tree

    def prompt(self, card: dict[str, Any], tokens: int) -> Prompt | None:
        """Send a prompt that no cache knows, not even from an earlier run.

        Returns:
            Its cost; None if this cluster's placement kept it local.
        """
        rng = random.SystemRandom()
        most = min(card["vocabulary_size"], ORDINARY_TOKENS[1])
        ids = [rng.randrange(min(ORDINARY_TOKENS[0], most // 2), most) for _ in range(tokens)]
        body = {
            "model": card["id"],
            "prompt": ids,
            "max_tokens": 2,
            "temperature": 0,
            "ignore_eos": True,
            "cache_salt": secrets.token_hex(16),
        }
        timing = self.ask("POST", "/v1/completions", body)["timing"]
        if timing["path"] != "pd":
            return None
        return Prompt(
            tokens,
            timing["prefill_ms"],
            timing["kv_bytes"],
            timing["exposed_transfer_ms"],
            timing["kv_transport"],
        )


def _measure(
    router: _Router, mib: int, *, is_quiet: bool
) -> tuple[list[dict[str, Any]], list[Prompt]]:
    card = router.ask("GET", "/v1/models")["data"][0]
    lengths = [n for n in LENGTHS if n + 2 <= card["max_model_len"]]
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=is_quiet,
    )
    with progress:
        bar = progress.add_task("routes", total=1 + len(lengths))
        routes = router.ask("POST", "/links", {"mib": mib})["links"]
        prompts: list[Prompt] = []
        for tokens in lengths:
            progress.update(bar, advance=1, description=f"{tokens} tokens")
            found = [router.prompt(card, tokens) for _ in range(TURNS)]
            # The median: the first prompt of a length may compile kernels or open a route.
            crossed = sorted((p for p in found if p is not None), key=lambda p: p.prefill_ms)
            if crossed:
                prompts.append(crossed[len(crossed) // 2])
            if prompts and prompts[-1].prefill_ms > MAX_PREFILL_S * 1000:
                break
    return routes, prompts


def run_doctor(url: str, mib: int, access: Endpoints, *, as_json: bool) -> None:
    """Measure and report; exit with 1 if a route fails or there is none.

    Raises:
        ConfigError: No router answers.
    """
    routes, prompts = _measure(
        _Router(url, access), mib, is_quiet=as_json or not Console(stderr=True).is_terminal
    )
    verdicts = [judge(route, prompts) for route in routes]
    if as_json:
        tree = {
            "links": [asdict(v) for v in verdicts],
            "prompts": [asdict(p) for p in prompts],
            "store_server": describe_server(),
        }
        typer.echo(json.dumps(tree, indent=2))
    else:
        _show(verdicts, prompts)
        plain_console().print(f"Store that `baton up` starts on this machine: {describe_server()}")
    raise typer.Exit(0 if verdicts and not any(v.error for v in verdicts) else 1)


def _show(verdicts: list[Verdict], prompts: list[Prompt]) -> None:
    console = plain_console()
    if not verdicts:
        console.print(
            "No KV route from a prefill worker to a decode worker: one pool does both, or one has "
            "no live worker."
        )
        return
    table = Table(
        "prefill", "decode", "transport", "round trip ms", "GB/s", "transfer", box=box.SIMPLE
    )
    for v in verdicts:
        speed = f"{v.gb_per_s:.2f}" if v.gb_per_s else "-"
        table.add_row(
            v.prefill,
            v.decode,
            v.transport,
            f"{v.round_trip_ms:.2f}",
            speed,
            v.error or _in_words(v),
        )
    console.print(table)
    if not prompts:
        console.print(
            "No prompt crossed the pools: placement keeps them local, so only the routes were "
            "measured."
        )
        return
    best = min(
        (v for v in verdicts if v.transfer_ms),
        key=lambda v: sum(v.transfer_ms.values()),
        default=None,
    )
    table = Table(
        "prompt tokens", "prefill ms", "KV MiB", "moving it ms", "exposed ms", box=box.SIMPLE
    )
    for p in prompts:
        moving = f"{best.transfer_ms[p.tokens]:.2f}" if best else "-"
        table.add_row(
            str(p.tokens),
            f"{p.prefill_ms:.1f}",
            f"{p.kv_bytes / 2**20:.2f}",
            moving,
            f"{p.exposed_ms:.2f}",
        )
    console.print(table)


def _in_words(v: Verdict) -> str:
    if v.pays_from_tokens is None:
        return (
            "did not pay up to the longest prompt"
            if v.transfer_ms
            else "not known: no prompt crossed"
        )
    return f"pays from {v.pays_from_tokens} prompt tokens on"
