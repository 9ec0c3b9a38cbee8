"""A small client of the gRPC door, for `baton generate` and the demo.

Owns the call and what is printed of it. Does not know servers. Called by `cluster.cli` and
`cluster.demo`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict

from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished stream."""

    text: str
    usage: pb.Usage
    timing: pb.Timing


def stream_answer(address: str, request: pb.GenerateRequest, show: Any = None) -> Answer:  # noqa: ANN401
    """Run one request over gRPC, showing text as it comes.

    Raises:
        grpc.RpcError: As the server reported it.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        return _collect(generation_pb2_grpc.GenerationStub(channel).GenerateStream(request, timeout=TIMEOUT_S), show)


def stream_chat(address: str, request: pb.ChatRequest, show: Any = None) -> Answer:  # noqa: ANN401
    """Run one turn of a conversation over gRPC, showing text as it comes.

    Raises:
        grpc.RpcError: As the server reported it.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        return _collect(generation_pb2_grpc.GenerationStub(channel).Chat(request, timeout=TIMEOUT_S), show)


def _collect(messages: Any, show: Any) -> Answer:  # noqa: ANN401
    text, summary = "", pb.Summary()
    for message in messages:
        kind = message.WhichOneof("event")
        if kind == "delta":
            text += message.delta.text
            if show is not None:
                show(message.delta.text)
        elif kind == "summary":
            summary = message.summary
    return Answer(text, summary.usage, summary.timing)


def generate_stream(
    prompt: str, address: str, max_tokens: int, temperature: float, seed: int | None, *, as_json: bool
) -> None:
    """Run `baton generate`."""
    request = pb.GenerateRequest(
        text=prompt,
        sampling=pb.SamplingOptions(temperature=temperature, seed=seed),
        stopping=pb.StoppingOptions(max_tokens=max_tokens),
        response=pb.ResponseOptions(timing=True),
    )
    try:
        answer = stream_answer(address, request, None if as_json else show_text)
    except grpc.RpcError as error:
        typer.echo(f"baton: {error.code().name}: {error.details()}", err=True)
        raise SystemExit(2) from error
    if as_json:
        usage, timing = MessageToDict(answer.usage), MessageToDict(answer.timing, preserving_proto_field_name=True)
        typer.echo(json.dumps({"text": answer.text, "usage": usage, "timing": timing}, indent=2))
        return
    t = answer.timing
    typer.echo(
        f"\n\n{answer.usage.completion_tokens} tokens, TTFT {t.ttft_s * 1000:.1f} ms, "
        f"{answer.usage.completion_tokens / max(t.e2e_s, 1e-9):.0f} tokens/s, path {t.path}, "
        f"prefill pid {t.prefill_pid}, decode pid {t.decode_pid}, {t.kv_bytes} KV bytes handed over"
    )


def show_text(text: str) -> None:
    """Print a piece at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
