"""Replies of the HTTP door, whole and in chunks, byte-compatible with OpenAI's.

Owns the two dialects (`text_completion`, `chat.completion`), usage and timing. Does not know
sockets or bodies' fields beyond the options it is given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.types import (
    ChoiceFinished,
    GenerateRequest,
    Logprob,
    PromptScored,
    RequestEnded,
    RequestEvent,
    RequestTiming,
    TextDelta,
    Usage,
)
from router.http.json_pieces import dumps
from router.http.logprobs import Legacy, LogprobShapes, joined
from router.resuming import Progress
from router.service import GenerationService
from router.text.detokenizing import TextOffsets

HEAVY_TOKENS = 256
"""A reply with more tokens with log probabilities is made in the reply thread."""


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """What a client wants to see."""

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
    """OpenAI's usage object, cached tokens always filled."""
    return {
        "prompt_tokens": u.prompt_tokens,
        "completion_tokens": u.completion_tokens,
        "total_tokens": u.prompt_tokens + u.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": u.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def timing_body(a: RequestTiming) -> dict[str, Any]:
    """Where the time went, on demand."""
    names = (*(f"{name}_s" for name in a.phases()), "ttft_s", "e2e_s")
    times = {name.replace("_s", "_ms"): round(getattr(a, name) * 1000, 3) for name in names}
    return {
        **times,
        "kv_bytes": a.kv_bytes,
        "kv_blocks": a.kv_blocks,
        "kv_transport": a.kv_transport,
        "kv_parts_healed": a.kv_fragments_resent,
        "cached_tokens": a.cached_tokens,
        "path": a.path,
        "prefill_worker": a.prefill_worker,
        "decode_worker": a.decode_worker,
        "prefill_pid": a.prefill_pid,
        "decode_pid": a.decode_pid,
        "attempts": list(a.attempts),
    }


def server_timing(a: RequestTiming) -> str:
    """The same as a `Server-Timing` header, which browsers show."""
    return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in a.phases().items())


class CompletionFormatter:
    """Shapes that both endpoints share, over one service and one set of options."""

    object_whole, object_chunk, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, service: GenerationService, options: ReplyOptions) -> None:
        """Keep what every reply needs."""
        self.service, self.options = service, options
        self.shapes = LogprobShapes(service.text, names_ids=options.names_ids)

    def logprobs(self, entries: Sequence[Logprob], choice: ChoiceText) -> dict[str, Any] | None:
        """The choice's next log probabilities, if they were asked for."""
        if not self.options.has_logprobs:
            return None
        return self.shapes.legacy(entries, choice.offsets)

    def whole_choice(self, choice: ChoiceText, prompt: PromptText) -> dict[str, Any]:
        """One choice of a whole reply."""
        text, logprobs = choice.text, self.logprobs(choice.logprobs, choice)
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
        """Those of a prompt that is shown; what its text does not show has no length there."""
        shows_special = self.service.text.text(prompt.token_ids).startswith(prompt.text)
        return self.shapes.echoed(prompt.token_ids, prompt.scored, shows_special=shows_special)

    def chunk_choice(self, choice: ChoiceText, delta: TextDelta) -> dict[str, Any]:
        """One choice of a chunk with text."""
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
        """What opens a choice in a stream; None for nothing."""
        if not self.options.echo:
            return None
        logprobs = None
        if self.options.has_logprobs:
            logprobs = self.echoed_logprobs(prompt)
        return {
            "index": index,
            "text": prompt.text,
            "logprobs": logprobs,
            "finish_reason": None,
            "stop_reason": None,
        }

    def last_choice(self, index: int, finished: ChoiceFinished) -> dict[str, Any]:
        """What closes a choice in a stream."""
        return {
            "index": index,
            "text": "",
            "logprobs": None,
            "finish_reason": finished.reason.value,
            "stop_reason": finished.stop_match,
        }

    def quick_chunk(self, index: int, text: str) -> str:
        """The most frequent choice of a chunk, as JSON: text and nothing else."""
        return (
            f'{{"index":{index},"text":{json.dumps(text)},"logprobs":null,'
            f'"finish_reason":null,"stop_reason":null}}'
        )


class ChatFormatter(CompletionFormatter):
    """`/v1/chat/completions`."""

    object_whole, object_chunk, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def logprobs(self, entries: Sequence[Logprob], choice: ChoiceText) -> dict[str, Any] | None:
        """The choice's next log probabilities, if they were asked for."""
        if not self.options.has_logprobs:
            return None
        return {"content": self.shapes.chat(entries), "refusal": None}

    def whole_choice(self, choice: ChoiceText, prompt: PromptText) -> dict[str, Any]:
        """One choice of a whole reply."""
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
        """The role comes first, once."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk_choice(self, choice: ChoiceText, delta: TextDelta) -> dict[str, Any]:
        """One choice of a chunk with text."""
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
        """What closes a choice in a stream."""
        return {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": finished.reason.value,
            "stop_reason": finished.stop_match,
        }

    def quick_chunk(self, index: int, text: str) -> str:
        """The most frequent choice of a chunk, as JSON."""
        return (
            f'{{"index":{index},"delta":{{"content":{json.dumps(text)}}},"logprobs":null,'
            f'"finish_reason":null}}'
        )


@dataclass(slots=True)
class PromptText:
    """What is known of one prompt."""

    token_ids: tuple[int, ...]
    text: str = ""
    scored: tuple[Logprob, ...] = ()


@dataclass(slots=True)
class ChoiceText:
    """One choice, as far as it has come."""

    index: int
    text: str
    logprobs: list[Logprob]
    token_ids: list[int]
    offsets: TextOffsets
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Reply:
    """One reply to one or several prompts: takes events, gives a body or chunks."""

    def __init__(
        self, dialect: CompletionFormatter, requests: Sequence[GenerateRequest], created: int
    ) -> None:
        """Begin with nothing.

        Args:
            dialect: How things look.
            requests: One for each prompt.
            created: Unix seconds.
        """
        self.dialect, self.options = dialect, dialect.options
        self._num_choices = requests[0].sampling.n
        text = dialect.service.text
        echo = text.text if self.options.is_echo_only else text.echo
        self._prompts = [
            PromptText(
                r.token_ids, (r.prompt_text or echo(r.token_ids)) if self.options.echo else ""
            )
            for r in requests
        ]
        self._choices = [
            ChoiceText(
                index * self._num_choices + choice, "", [], [],
                TextOffsets(text, text.decoder_of(request), len(self._prompts[index].text)),
            )
            for index, request in enumerate(requests)
            for choice in range(self._num_choices)
        ]  # fmt: skip
        self._usages = [Usage(len(r.token_ids), 0) for r in requests]
        self.error: Exception | None = None
        self.timing = RequestTiming()
        self._head = {
            "id": f"{dialect.id_prefix}-{requests[0].request_id}",
            "object": dialect.object_chunk,
            "created": created,
            "model": dialect.service.model.name,
            "system_fingerprint": dialect.service.model.fingerprint,
        }
        self._quick_head = (
            "data: " + json.dumps(self._head, separators=(",", ":"))[:-1] + ',"choices":['
        )
        self._quick_tail = '],"usage":null}\n\n' if self.options.includes_usage else "]}\n\n"
        o = self.options
        self._is_quick = not (
            o.has_logprobs or o.returns_token_ids or o.has_continuous_usage or o.is_echo_only
        )
        have = [p for r in requests for p in r.resume_from or (0,) * self._num_choices]
        self._is_open = [position > 0 for position in have]
        self.progress = Progress(requests[0].request_id, self._num_choices, have)

    @property
    def usage(self) -> Usage:
        """Tokens over all prompts so far."""
        done = 0 if self.options.is_echo_only else sum(u.completion_tokens for u in self._usages)
        return Usage(
            sum(u.prompt_tokens for u in self._usages),
            done,
            sum(u.cached_tokens for u in self._usages),
        )

    @property
    def is_heavy(self) -> bool:
        """True when making the whole reply would hold up the loop."""
        echoed = sum(len(p.scored) for p in self._prompts) * self._num_choices
        return echoed + sum(len(c.logprobs) for c in self._choices) > HEAVY_TOKENS

    def is_heavy_batch(self, events: Sequence[tuple[int, RequestEvent]]) -> bool:
        """True when making the chunks of these events would hold up the loop."""
        told = sum(len(e.logprobs) for _, e in events if isinstance(e, (PromptScored, TextDelta)))
        due = 0 if all(self._is_open) else sum(len(p.scored) for p in self._prompts)
        return told + due > HEAVY_TOKENS

    # --- whole ------------------------------------------------------------------------------------

    def take(self, prompt: int, event: RequestEvent) -> None:
        """Take one event of one prompt's request into a whole reply."""
        match event:
            case PromptScored(logprobs):
                self._prompts[prompt].scored = logprobs
            case TextDelta():
                choice = self._choices[prompt * self._num_choices + event.choice]
                choice.text += event.text
                choice.logprobs += event.logprobs
                choice.token_ids += event.token_ids
            case ChoiceFinished():
                choice = self._choices[prompt * self._num_choices + event.choice]
                choice.finish_reason, choice.stop_reason = event.reason.value, event.stop_match
            case RequestEnded():
                self._end(prompt, event)

    def _end(self, prompt: int, event: RequestEnded) -> None:
        self._usages[prompt] = event.usage
        self.error, self.timing = self.error or event.error, event.timing

    def whole(self) -> dict[str, Any]:
        """The reply's body, when every request has ended."""
        if self.options.is_echo_only:
            for choice in self._choices:
                choice.text = ""
                choice.logprobs = []
                choice.token_ids = []
                choice.finish_reason = "length"
        choices = [
            self.dialect.whole_choice(c, self._prompts[c.index // self._num_choices])
            for c in self._choices
        ]
        reply: dict[str, Any] = {
            **self._head,
            "object": self.dialect.object_whole,
            "choices": choices,
            "usage": usage_body(self.usage),
        }
        if self.options.is_chat and self.options.has_prompt_logprobs:
            first = self._prompts[0]
            reply["prompt_logprobs"] = self.dialect.shapes.by_id(first.token_ids, first.scored)
        if self.options.is_chat and self.options.returns_token_ids:
            reply["prompt_token_ids"] = list(self._prompts[0].token_ids)
        if self.options.wants_timing:
            reply["timing"] = timing_body(self.timing)
        return reply

    # --- stream -----------------------------------------------------------------------------------

    def chunks(self, prompt: int, event: RequestEvent) -> str:
        """Turn one event into server-sent events."""
        match event:
            case PromptScored(logprobs):
                self._prompts[prompt].scored = logprobs
                return ""
            case TextDelta():
                return self._delta(prompt, event)
            case ChoiceFinished():
                index = prompt * self._num_choices + event.choice
                return self._open(prompt, index) + self._chunk(
                    self.dialect.last_choice(index, event)
                )
            case RequestEnded():
                self._end(prompt, event)
                return ""

    def _delta(self, prompt: int, event: TextDelta) -> str:
        index = prompt * self._num_choices + event.choice
        opening = "" if self._is_open[index] else self._open(prompt, index)
        if self._is_quick:
            if not event.text:
                return opening
            chunk = self.dialect.quick_chunk(index, event.text)
            return f"{opening}{self._quick_head}{chunk}{self._quick_tail}"
        usage = self._usages[prompt]
        self._usages[prompt] = Usage(
            usage.prompt_tokens, usage.completion_tokens + len(event.token_ids)
        )
        if self.options.is_echo_only or not (event.text or event.logprobs or event.token_ids):
            return opening
        return opening + self._chunk(self.dialect.chunk_choice(self._choices[index], event))

    def _open(self, prompt: int, index: int) -> str:
        """Begin a choice: the role, the echoed prompt."""
        if self._is_open[index]:
            return ""
        self._is_open[index] = True
        first = self.dialect.first_choice(index, self._prompts[prompt])
        return "" if first is None else self._chunk(first)

    def _chunk(self, choice: dict[str, Any]) -> str:
        fields: dict[str, Any] = {"choices": [choice]}
        if self.options.has_continuous_usage:
            fields["usage"] = usage_body(self.usage)
        elif self.options.includes_usage:
            fields["usage"] = None
        return self._sse(fields)

    def _sse(self, fields: dict[str, Any]) -> str:
        return f"data: {dumps({**self._head, **fields})}\n\n"

    def last_chunk(self) -> str:
        """The usage chunk, and timing where it was asked for."""
        if not (self.options.includes_usage or self.options.wants_timing):
            return ""
        timing = {"timing": timing_body(self.timing)} if self.options.wants_timing else {}
        return self._sse({"choices": [], "usage": usage_body(self.usage), **timing})
