"""Replies over HTTP, whole and in chunks, from the events of their requests.

Owns the state of one reply: text, usage, timing and progress so far. Does not know sockets, nor how
a choice looks (`router.http.formatters`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from core.types import (
    ChoiceFinished,
    GenerateRequest,
    PromptScored,
    RequestEnded,
    RequestEvent,
    RequestTiming,
    TextDelta,
    Usage,
)
from router.http.formatters import (
    ChoiceText,
    CompletionFormatter,
    PromptText,
    timing_body,
    usage_body,
)
from router.http.json_pieces import dumps
from router.request_params import ServedModel
from router.resuming import ReplyPositions
from router.text.detokenizing import TextOffsets

HEAVY_TOKENS = 256
"""A reply with more tokens with log probabilities is made in the reply thread."""


class Reply:
    """One reply to one or several prompts: takes events, gives a body or chunks."""

    def __init__(
        self,
        formatter: CompletionFormatter,
        requests: Sequence[GenerateRequest],
        model: ServedModel,
        created: int,
    ) -> None:
        """Start without any output.

        Args:
            formatter: Decides how choices look.
            requests: One for each prompt.
            model: The served one.
            created: Unix seconds.
        """
        self.formatter = formatter
        self.options = formatter.options
        self._num_choices = requests[0].sampling.n
        text = formatter.text
        echo = text.text if self.options.is_echo_only else text.echo
        self._prompts = [
            PromptText(
                r.token_ids, (r.prompt_text or echo(r.token_ids)) if self.options.echo else ""
            )
            for r in requests
        ]
        self._choices = [
            ChoiceText(
                index * self._num_choices + choice,
                TextOffsets(text, text.decoder_of(request), len(self._prompts[index].text)),
            )
            for index, request in enumerate(requests)
            for choice in range(self._num_choices)
        ]
        self._usages = [Usage(len(r.token_ids), 0) for r in requests]
        self.error: Exception | None = None
        self.timing = RequestTiming()
        self._head = {
            "id": f"{formatter.id_prefix}-{requests[0].request_id}",
            "object": formatter.object_chunk,
            "created": created,
            "model": model.name,
            "service_tier": requests[0].tier,
            "system_fingerprint": model.fingerprint,
        }
        # Nearly all chunks of a stream are text alone: they are joined, not encoded.
        self._quick_head = (
            "data: " + json.dumps(self._head, separators=(",", ":"))[:-1] + ',"choices":['
        )
        self._quick_tail = '],"usage":null}\n\n' if self.options.includes_usage else "]}\n\n"
        o = self.options
        self._is_quick = not (
            o.has_logprobs or o.returns_token_ids or o.has_continuous_usage or o.is_echo_only
        )
        have = [p for r in requests for p in r.resume_from or (0,) * self._num_choices]
        # A resuming client has had its first chunk: role and echo are not repeated.
        self._is_open = [position > 0 for position in have]
        self.progress = ReplyPositions(requests[0].request_id, self._num_choices, have)

    @property
    def usage(self) -> Usage:
        """Token counts over all prompts so far."""
        done = 0 if self.options.is_echo_only else sum(u.completion_tokens for u in self._usages)
        costs = [u.cost for u in self._usages if u.cost is not None]
        return Usage(
            sum(u.prompt_tokens for u in self._usages),
            done,
            sum(u.cached_tokens for u in self._usages),
            sum(costs) if costs else None,
        )

    @property
    def is_heavy(self) -> bool:
        """True if making the whole reply would block the event loop for long."""
        echoed = sum(len(p.scored) for p in self._prompts) * self._num_choices
        return echoed + sum(len(c.logprobs) for c in self._choices) > HEAVY_TOKENS

    def is_heavy_batch(self, events: Sequence[tuple[int, RequestEvent]]) -> bool:
        """True if making the chunks of these events would block the event loop for long."""
        num_new = sum(
            len(e.logprobs) for _, e in events if isinstance(e, (PromptScored, TextDelta))
        )
        due = 0 if all(self._is_open) else sum(len(p.scored) for p in self._prompts)
        return num_new + due > HEAVY_TOKENS

    # --- whole ------------------------------------------------------------------------------------

    def take(self, prompt: int, event: RequestEvent) -> None:
        """Add one event of one prompt's request to the whole reply."""
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
                choice.finish_reason = event.reason.value
                choice.stop_reason = event.stop_match
            case RequestEnded():
                self._end(prompt, event)

    def _end(self, prompt: int, event: RequestEnded) -> None:
        self._usages[prompt] = event.usage
        # The first error: those of the other prompts mostly follow from it.
        self.error = self.error or event.error
        self.timing = event.timing

    def whole(self) -> dict[str, Any]:
        """Return the body, when every request has ended."""
        if self.options.is_echo_only:
            for choice in self._choices:
                choice.text = ""
                choice.logprobs = []
                choice.token_ids = []
                choice.finish_reason = "length"
        choices = [
            self.formatter.whole_choice(c, self._prompts[c.index // self._num_choices])
            for c in self._choices
        ]
        reply: dict[str, Any] = {
            **self._head,
            "object": self.formatter.object_whole,
            "choices": choices,
            "usage": usage_body(self.usage),
        }
        if self.options.is_chat and self.options.has_prompt_logprobs:
            first = self._prompts[0]
            reply["prompt_logprobs"] = self.formatter.shapes.by_id(first.token_ids, first.scored)
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
                    self.formatter.last_choice(index, event)
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
            chunk = self.formatter.quick_chunk(index, event.text)
            return f"{opening}{self._quick_head}{chunk}{self._quick_tail}"
        usage = self._usages[prompt]
        self._usages[prompt] = Usage(
            usage.prompt_tokens, usage.completion_tokens + len(event.token_ids)
        )
        if self.options.is_echo_only or not (event.text or event.logprobs or event.token_ids):
            return opening
        return opening + self._chunk(self.formatter.chunk_choice(self._choices[index], event))

    def _open(self, prompt: int, index: int) -> str:
        """Open a choice: with the role, or with the echoed prompt."""
        if self._is_open[index]:
            return ""
        self._is_open[index] = True
        first = self.formatter.first_choice(index, self._prompts[prompt])
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
        """Return the chunk with usage, and timing if it was asked for."""
        if not (self.options.includes_usage or self.options.wants_timing):
            return ""
        timing = {"timing": timing_body(self.timing)} if self.options.wants_timing else {}
        return self._sse({"choices": [], "usage": usage_body(self.usage), **timing})
