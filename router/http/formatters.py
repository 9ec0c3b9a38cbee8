"""How one choice looks in OpenAI's two formats: `text_completion` and `chat.completion`.

Owns the shapes of choices, usage and timing, whole and in chunks, byte-compatible with OpenAI's.
Does not know streams or sockets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.timeline import rounded_ms
from core.types import ChoiceFinished, Logprob, RequestTiming, TextDelta, Usage
from router.http.logprobs import Legacy, LogprobShapes, joined
from router.text.detokenizing import TextModel, TextOffsets

COST_DIGITS = 12
"""Behind the point: a token's price has six more than a million's, and sums of binary fractions end
in noise."""


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """What a client wants in its reply."""

    is_chat: bool = False
    has_logprobs: bool = False
    has_prompt_logprobs: bool = False
    includes_usage: bool = False
    has_continuous_usage: bool = False
    wants_timing: bool = False
    returns_token_ids: bool = False
    names_ids: bool = False
    echo: bool = False
    is_echo_only: bool = False


def usage_body(u: Usage) -> dict[str, Any]:
    """Return OpenAI's usage object, always with cached tokens; with the cost where one is known."""
    cost = {} if u.cost is None else {"cost": round(u.cost, COST_DIGITS)}
    return {
        "prompt_tokens": u.prompt_tokens,
        "completion_tokens": u.completion_tokens,
        "total_tokens": u.prompt_tokens + u.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": u.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
        **cost,
    }


def timing_body(timing: RequestTiming) -> dict[str, Any]:
    """Return where the time went."""
    names = (*(f"{name}_s" for name in timing.phases()), "ttft_s", "e2e_s")
    times = {name.replace("_s", "_ms"): rounded_ms(getattr(timing, name)) for name in names}
    return {
        **times,
        "kv_bytes": timing.kv_bytes,
        "kv_blocks": timing.kv_blocks,
        "kv_transport": timing.kv_transport,
        "kv_parts_healed": timing.kv_fragments_resent,
        "cached_tokens": timing.cached_tokens,
        "fetch_outcome": timing.fetch_outcome,
        "fetched_tokens": timing.fetched_tokens,
        "fetch_ms": rounded_ms(timing.fetch_s),
        "path": timing.path,
        "prefill_worker": timing.prefill_worker,
        "decode_worker": timing.decode_worker,
        "prefill_pid": timing.prefill_pid,
        "decode_pid": timing.decode_pid,
        "attempts": list(timing.attempts),
        "why": dict(timing.why),
    }


def server_timing(timing: RequestTiming) -> str:
    """Return the phases as a `Server-Timing` header, which browsers show."""
    phases = timing.phases().items()
    return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in phases)


@dataclass(slots=True)
class PromptText:
    """One prompt, as far as the reply shows it."""

    token_ids: tuple[int, ...]
    text: str = ""
    scored: tuple[Logprob, ...] = ()


@dataclass(slots=True)
class ChoiceText:
    """One choice, as far as it has arrived."""

    index: int
    offsets: TextOffsets
    text: str = ""
    logprobs: list[Logprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class CompletionFormatter:
    """`/v1/completions`, and what chat shares with it."""

    object_whole = "text_completion"
    object_chunk = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, text: TextModel, options: ReplyOptions) -> None:
        """Format replies over a vocabulary as `options` say."""
        self.text = text
        self.options = options
        self.shapes = LogprobShapes(text, names_ids=options.names_ids)

    def logprobs(self, entries: Sequence[Logprob], choice: ChoiceText) -> dict[str, Any] | None:
        """Return the choice's next log probabilities, if they were asked for."""
        if not self.options.has_logprobs:
            return None
        return self.shapes.legacy(entries, choice.offsets)

    def whole_choice(self, choice: ChoiceText, prompt: PromptText) -> dict[str, Any]:
        """Return one choice of a whole reply."""
        text = choice.text
        logprobs = self.logprobs(choice.logprobs, choice)
        if self.options.echo:
            text = prompt.text + text
        if self.options.echo and logprobs is not None:
            logprobs = joined(self.echoed_logprobs(prompt), logprobs)
        out = {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.options.has_prompt_logprobs:
            out["prompt_logprobs"] = self.shapes.by_id(prompt.token_ids, prompt.scored)
        if self.options.returns_token_ids:
            out |= {"token_ids": choice.token_ids, "prompt_token_ids": list(prompt.token_ids)}
        return out

    def echoed_logprobs(self, prompt: PromptText) -> Legacy:
        """Return an echoed prompt's log probabilities; tokens without text have no length."""
        shows_special = self.text.text(prompt.token_ids).startswith(prompt.text)
        return self.shapes.echoed(prompt.token_ids, prompt.scored, shows_special=shows_special)

    def chunk_choice(self, choice: ChoiceText, delta: TextDelta) -> dict[str, Any]:
        """Return one choice of a chunk with text."""
        out: dict[str, Any] = {
            "index": choice.index,
            "text": delta.text,
            "logprobs": self.logprobs(delta.logprobs, choice),
            "finish_reason": None,
            "stop_reason": None,
        }
        if self.options.returns_token_ids:
            out["token_ids"] = list(delta.token_ids)
        return out

    def first_choice(self, index: int, prompt: PromptText) -> dict[str, Any] | None:
        """Return what opens a choice in a stream, if anything does."""
        if not self.options.echo:
            return None
        logprobs = self.echoed_logprobs(prompt) if self.options.has_logprobs else None
        return {
            "index": index,
            "text": prompt.text,
            "logprobs": logprobs,
            "finish_reason": None,
            "stop_reason": None,
        }

    def last_choice(self, index: int, finished: ChoiceFinished) -> dict[str, Any]:
        """Return what closes a choice in a stream."""
        return {
            "index": index,
            "text": "",
            "logprobs": None,
            "finish_reason": finished.reason.value,
            "stop_reason": finished.stop_match,
        }

    def quick_chunk(self, index: int, text: str) -> str:
        """Return the most frequent choice of a chunk, with text only, as JSON."""
        return (
            f'{{"index":{index},"text":{json.dumps(text)},"logprobs":null,'
            f'"finish_reason":null,"stop_reason":null}}'
        )


class ChatFormatter(CompletionFormatter):
    """`/v1/chat/completions`."""

    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def logprobs(self, entries: Sequence[Logprob], choice: ChoiceText) -> dict[str, Any] | None:
        """Return the choice's next log probabilities, if they were asked for."""
        if not self.options.has_logprobs:
            return None
        return {"content": self.shapes.chat(entries), "refusal": None}

    def whole_choice(self, choice: ChoiceText, prompt: PromptText) -> dict[str, Any]:
        """Return one choice of a whole reply."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        out = {
            "index": choice.index,
            "message": message,
            "logprobs": self.logprobs(choice.logprobs, choice),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.options.returns_token_ids:
            out["token_ids"] = choice.token_ids
        return out

    def first_choice(self, index: int, prompt: PromptText) -> dict[str, Any] | None:
        """Return the opening chunk: the role comes first, once."""
        # OpenAI's first chunk names the role, and clients begin a message with it.
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk_choice(self, choice: ChoiceText, delta: TextDelta) -> dict[str, Any]:
        """Return one choice of a chunk with text."""
        out: dict[str, Any] = {
            "index": choice.index,
            "delta": {"content": delta.text},
            "finish_reason": None,
            "logprobs": self.logprobs(delta.logprobs, choice),
        }
        if self.options.returns_token_ids:
            out["token_ids"] = list(delta.token_ids)
        return out

    def last_choice(self, index: int, finished: ChoiceFinished) -> dict[str, Any]:
        """Return what closes a choice in a stream."""
        return {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": finished.reason.value,
            "stop_reason": finished.stop_match,
        }

    def quick_chunk(self, index: int, text: str) -> str:
        """Return the most frequent choice of a chunk, as JSON."""
        return (
            f'{{"index":{index},"delta":{{"content":{json.dumps(text)}}},"logprobs":null,'
            f'"finish_reason":null}}'
        )


def request_id_of(reply_id: str) -> str:
    """Return the id of the request that a reply is to; another id stays as it is."""
    # People copy the id from a reply, where it has the prefix of its endpoint.
    for formatter in (CompletionFormatter, ChatFormatter):
        reply_id = reply_id.removeprefix(f"{formatter.id_prefix}-")
    return reply_id
