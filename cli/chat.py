"""`baton chat`: a conversation in the terminal, with what each answer cost.

Owns the turns and what is printed. Does not know streams: `cli.client` opens them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import typer

from cli.client import Answer, show_text, stream_chat
from client.endpoints import Endpoints
from protos.baton.v1 import generation_pb2 as pb

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it"


def run_chat(
    address: str,
    system: str,
    message: str,
    max_tokens: int,
    temperature: float,
    access: Endpoints,
    *,
    as_json: bool,
) -> None:
    """Talk until the user ends it; with a message, one turn only.

    Raises:
        ServingError: The server refuses, or is not there.
    """
    opening = [pb.ChatMessage(role="system", content=system)] if system else []
    turns = list(opening)
    if not message and sys.stdin.isatty():
        typer.echo(f"baton chat, {address}: {HELP}")
    for text in [message] if message else _inputs():
        if text == "/quit":
            return
        if text == "/reset":
            turns = list(opening)
            continue
        turns.append(pb.ChatMessage(role="user", content=text))
        request = pb.ChatRequest(
            messages=turns,
            sampling=pb.SamplingOptions(temperature=temperature),
            stopping=pb.StoppingOptions(max_tokens=max_tokens) if max_tokens else None,
            response=pb.ResponseOptions(timing=True),
        )
        answer = stream_chat(address, request, None if as_json else show_text, access)
        turns.append(pb.ChatMessage(role="assistant", content=answer.text))
        typer.echo(_as_json(answer) if as_json else f"\n{cost(answer)}\n")


def _inputs() -> Iterator[str]:
    """Yield the user's lines, without empty ones."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def cost(answer: Answer) -> str:
    """Return TTFT and speed in one line."""
    t = answer.timing
    tokens = answer.usage.completion_tokens
    decode_s = max(t.e2e_s - t.ttft_s, 1e-9)
    speed = f"{(tokens - 1) / decode_s:.0f} tokens/s" if tokens > 1 else "one token"
    cached = f", {answer.usage.cached_tokens} of {answer.usage.prompt_tokens} prompt tokens cached"
    return f"[{tokens} tokens, TTFT {t.ttft_s * 1000:.1f} ms, {speed}, path {t.path}{cached}]"


def _as_json(answer: Answer) -> str:
    t = answer.timing
    return json.dumps(
        {
            "text": answer.text,
            "prompt_tokens": answer.usage.prompt_tokens,
            "output_tokens": answer.usage.completion_tokens,
            "ttft_ms": t.ttft_s * 1000,
            "e2e_ms": t.e2e_s * 1000,
            "path": t.path,
        }
    )
