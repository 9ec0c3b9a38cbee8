"""Requests over gRPC from the terminal, for `baton generate`, `baton chat` and the demo.

Owns what is asked and what is printed; `client` owns the stream. Does not know servers.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import json
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import typer
from google.protobuf.json_format import MessageToDict

from client.endpoints import Endpoints, api_key
from client.stream import Client
from protos.baton.v1 import generation_pb2 as pb

TIMEOUT_S = 300.0
Show = Callable[[str], None]
SYSTEM_TRUST = Endpoints()


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished stream."""

    text: str
    usage: pb.Usage
    timing: pb.Timing


def stream_answer(
    address: str,
    request: pb.GenerateRequest,
    show: Show | None = None,
    access: Endpoints = SYSTEM_TRUST,
) -> Answer:
    """Run one request over gRPC, showing text as it arrives; `address` may list several.

    Raises:
        ServingError: As the server reported it.
        ConfigError: A certificate cannot be used.
    """
    client = _client(address, access)
    return _runner().run(_collect(client, client.generate(request, TIMEOUT_S), show))


def stream_chat(
    address: str,
    request: pb.ChatRequest,
    show: Show | None = None,
    access: Endpoints = SYSTEM_TRUST,
) -> Answer:
    """Run one turn of a conversation over gRPC, showing text as it arrives.

    Raises:
        ServingError: As the server reported it.
        ConfigError: A certificate cannot be used.
    """
    client = _client(address, access)
    return _runner().run(_collect(client, client.chat(request, TIMEOUT_S), show))


def _client(address: str, access: Endpoints) -> Client:
    addresses = address.split(",")
    files = access.grpc_files(addresses) or (None, None, None)
    return Client([one.rpartition("/")[2] for one in addresses], api_key(), *files)


@functools.cache
def _runner() -> asyncio.Runner:
    """Return the event loop of this process, the same for all its requests.

    gRPC has one poller a process, which keeps every loop that it has seen; if one is closed before
    the last channel is collected, it prints "Event loop is closed".
    """
    runner = asyncio.Runner()
    atexit.register(_close, runner)
    return runner


def _close(runner: asyncio.Runner) -> None:
    gc.collect()  # channels are closed by now, but an error may hold one in a cycle
    runner.close()


async def _collect(client: Client, messages: AsyncIterator[Any], show: Show | None) -> Answer:
    text = ""
    summary = pb.Summary()
    async with client:
        async for message in messages:
            kind = message.WhichOneof("event")
            if kind == "delta":
                text += message.delta.text
                if show is not None:
                    show(message.delta.text)
            elif kind == "summary":
                summary = message.summary
    return Answer(text, summary.usage, summary.timing)


def generate_stream(
    prompt: str,
    address: str,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    access: Endpoints,
    *,
    as_json: bool,
) -> None:
    """Run `baton generate`."""
    request = pb.GenerateRequest(
        text=prompt,
        sampling=pb.SamplingOptions(temperature=temperature, seed=seed),
        stopping=pb.StoppingOptions(max_tokens=max_tokens),
        response=pb.ResponseOptions(timing=True),
    )
    answer = stream_answer(address, request, None if as_json else show_text, access)
    if as_json:
        usage = MessageToDict(answer.usage)
        timing = MessageToDict(answer.timing, preserving_proto_field_name=True)
        typer.echo(json.dumps({"text": answer.text, "usage": usage, "timing": timing}, indent=2))
        return
    t = answer.timing
    typer.echo(
        f"\n\n{answer.usage.completion_tokens} tokens, TTFT {t.ttft_s * 1000:.1f} ms, "
        f"{answer.usage.completion_tokens / max(t.e2e_s, 1e-9):.0f} tokens/s, path {t.path}, "
        f"prefill pid {t.prefill_pid}, decode pid {t.decode_pid}, {t.kv_bytes} KV bytes transferred"
    )


def show_text(text: str) -> None:
    """Print a piece at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
