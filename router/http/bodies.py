"""Bodies of the HTTP server: every field that is read, and what it means.

Owns the pydantic models of the endpoints: the API reference and `/docs` are made from them. Does
not know replies, nor fields that are not read (`router.http.other_fields`).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from core.errors import InvalidRequest
from core.trace import TraceContext
from core.types import ChatPrompt, SamplingParams
from router.http.body_model import Body, Many, Number, Whole
from router.http.conversation import Conversation
from router.request_params import MAX_KEY_CHARACTERS, RequestParams

OTHER_NAMES = {"include_stop": "include_stop_str_in_output"}
"""Fields of `SamplingParams` that clients know by another name."""
MAX_PROMPTS = 128


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool | None = Field(
        None, description="a last chunk with the usage and no choices"
    )
    continuous_usage_stats: StrictBool | None = Field(
        None, description="the usage so far in every chunk"
    )


class MeasureBody(Body):
    """`POST /links`: measure every way KV can take."""

    mib: Whole = Field(16, ge=1, le=256, description="moved over each way (MiB)")


class SamplingBody(Body):
    """Fields that both completion endpoints share; absent means the model's default."""

    model: StrictStr = Field("", description="empty: the only served model")
    temperature: Number | None = Field(None, description="0 is greedy; 0 to 100")
    top_p: Number | None = Field(None, description="0 (greedy) to 1 (off)")
    top_k: Whole | None = Field(None, description="0 or -1: off")
    min_p: Number | None = Field(
        None, description="least probability, as a share of the likeliest token's"
    )
    presence_penalty: Number | None = Field(
        None, description="-2 to 2, once for each token in the output"
    )
    frequency_penalty: Number | None = Field(
        None, description="-2 to 2, for each time a token is in the output"
    )
    repetition_penalty: Number | None = Field(None, description="1 is off; prompt and output count")
    logit_bias: dict[str, Number] | None = Field(
        None, description="token id to -100..100, at most 300"
    )
    allowed_token_ids: Many[StrictInt] | None = Field(
        None, description="nothing else is drawn; at most 4096"
    )
    bad_words: Many[StrictStr] | None = Field(
        None, description="must not appear in the output; at most 64"
    )
    n: Whole | None = Field(None, description="choices, 1 to 8")
    best_of: Whole | None = Field(None, description="only as many as n: nothing is ranked")
    seed: Whole | None = Field(
        None, description="any of 64 bits, signed; absent: derived from the request id"
    )
    stop: StrictStr | Many[StrictStr] | None = Field(
        None, description="at most 16 of at most 256 bytes; empty ones are left out"
    )
    stop_token_ids: Many[StrictInt] | None = Field(None, description="at most 16")
    min_tokens: Whole | None = Field(None, description="no end before this many tokens")
    max_tokens: Whole | None = Field(None, description="longest output (tokens)")
    ignore_eos: StrictBool | None = Field(None, description="go on after the end-of-text token")
    include_stop_str_in_output: StrictBool | None = Field(
        None, description="leave the stop in the text"
    )
    skip_special_tokens: StrictBool | None = Field(None, description="default true")
    prompt_logprobs: Whole | None = Field(
        None, description="log probabilities of the prompt, with k rivals"
    )
    truncate_prompt_tokens: Whole | None = Field(
        None, description="keep the last k tokens; -1: what fits"
    )
    truncation_side: StrictStr | None = Field(None, description="left (default) or right")
    add_special_tokens: StrictBool | None = Field(None, description="let the tokenizer add its own")
    cache_salt: StrictStr | None = Field(
        None, description="share prefix cache only with requests of the same salt"
    )
    prompt_cache_key: StrictStr | None = Field(
        None,
        description="prefer the worker that served the same key of this tenant; at most "
        f"{MAX_KEY_CHARACTERS} characters",
    )
    prompt_cache_retention: StrictStr | None = Field(
        None, description="24h: keep the prompt's blocks longer than others; in_memory: do not"
    )
    session_id: StrictStr | None = Field(
        None,
        description="like prompt_cache_key, and goes before it; at most "
        f"{MAX_KEY_CHARACTERS} characters",
    )
    service_tier: StrictStr | None = Field(
        None,
        description="a tier of the config by its name; flex: batch; priority: interactive; auto, "
        "default, scale: the key's",
    )
    return_token_ids: StrictBool | None = Field(None, description="token ids beside the text")
    return_tokens_as_token_ids: StrictBool | None = Field(
        None, description="name tokens `token_id:N` in logprobs"
    )
    stream: StrictBool | None = Field(None, description="server-sent events")
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    request_id: StrictStr | None = Field(None, description="at most 128 printable ASCII characters")

    def given_sampling(self) -> dict[str, Any]:
        """Collect the sampling fields that were given, by our own names.

        Left out are `logprobs`, which differ between endpoints, and `bad_words`, which are text.
        """
        if self.allowed_token_ids == []:
            raise InvalidRequest(
                "allowed_token_ids", "is empty; name at least one token or leave it out"
            )
        values = ((name, getattr(self, attribute)) for name, attribute in SHARED_SAMPLING.items())
        given = {name: _frozen(value) for name, value in values if value is not None}
        # vLLM's clients say -1 for off.
        if given.get("top_k") == -1:
            given["top_k"] = 0
        return given

    def params(
        self,
        prompt: str | list[int] | ChatPrompt,
        given: dict[str, Any],
        request_id: str,
        trace: TraceContext | None,
        *,
        adds_special_tokens: bool,
    ) -> RequestParams:
        """Put together what the service is asked for."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "is only allowed with stream: true")
        # Refused, not ignored: whoever pays for ranking must not get the first choices unranked.
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequest(
                "best_of", f"is {self.best_of}, must be n = {self.n or 1}: choices are not ranked"
            )
        if self.truncation_side not in (None, "left", "right"):
            raise InvalidRequest(
                "truncation_side", f"is {self.truncation_side[:20]!r}, must be left or right"
            )
        return RequestParams(
            prompt=prompt,
            sampling=given,
            model=self.model,
            request_id=self.request_id or request_id,
            bad_words=self.bad_words or (),
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            keeps_left=self.truncation_side == "right",
            adds_special_tokens=adds_special_tokens,
            cache_salt=self.cache_salt or "",
            prompt_cache_key=self.prompt_cache_key or "",
            prompt_cache_retention=self.prompt_cache_retention or "",
            session_id=self.session_id or "",
            service_tier=self.service_tier or "",
            trace=trace,
        )


SHARED_SAMPLING = {
    one.name: attribute
    for one in fields(SamplingParams)
    if (attribute := OTHER_NAMES.get(one.name, one.name)) in SamplingBody.model_fields
    and one.name != "bad_words"
}
"""Fields of `SamplingParams` that a body's attributes give as they are."""


class CompletionBody(SamplingBody):
    """`POST /v1/completions`."""

    prompt: StrictStr | Many[StrictInt] | Many[StrictStr] | Many[Many[StrictInt]] = Field(
        description="text, token ids, or a list of either (at most 128)"
    )
    logprobs: Whole | None = Field(None, description="of chosen tokens, with k rivals, 0 to 20")
    echo: StrictBool | None = Field(
        None, description="prompt before the output; allows max_tokens 0"
    )

    def prompts(self) -> list[str | list[int]]:
        """Reduce the four forms to a list of prompts."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise InvalidRequest("prompt", "is empty; send at least one token")
        token_ids = [entry for entry in prompt if isinstance(entry, int)]
        # One list of ids is one prompt; lists of lists are several.
        if token_ids:
            return [token_ids]
        if len(prompt) > MAX_PROMPTS:
            raise InvalidRequest(
                "prompt", f"is a list of {len(prompt)} prompts, the limit is {MAX_PROMPTS}"
            )
        return [entry for entry in prompt if not isinstance(entry, int)]

    @property
    def is_echo_only(self) -> bool:
        """True when nothing but the prompt is wanted: OpenAI allows no output tokens with echo."""
        return bool(self.echo) and self.max_tokens == 0

    def all_params(self, request_id: str, trace: TraceContext | None) -> list[RequestParams]:
        """Return the parameters of one request for each prompt."""
        given = self.given_sampling()
        if self.logprobs is not None:
            given["logprobs"] = self.logprobs
            if self.echo:
                # As at OpenAI: an echoed prompt has scores as the output has.
                given.setdefault("prompt_logprobs", self.logprobs)
        if self.is_echo_only:
            # Workers compute one token at least; the reply leaves it out.
            given |= {"max_tokens": 1, "min_tokens": 0}
        adds = self.add_special_tokens is not False
        all_params = [
            self.params(p, given, request_id, trace, adds_special_tokens=adds)
            for p in self.prompts()
        ]
        return [replace(params, echoes=bool(self.echo)) for params in all_params]


class ChatBody(SamplingBody, Conversation):
    """`POST /v1/chat/completions`."""

    logprobs: StrictBool | None = Field(None, description="log probabilities of the output tokens")
    top_logprobs: Whole | None = Field(None, description="rivals, 0 to 20; needs logprobs")
    max_completion_tokens: Whole | None = Field(
        None, description="longest output (tokens); absent: what fits"
    )

    def all_params(
        self, chat: ChatPrompt, request_id: str, trace: TraceContext | None
    ) -> list[RequestParams]:
        """Return the parameters of the one request."""
        given = self.given_sampling()
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs", "needs logprobs: true")
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return [self.params(chat, given, request_id, trace, adds_special_tokens=False)]


class ExplainBody(CompletionBody):
    """`POST /prefix-index/explain` of a text or of token ids: a completion's body."""

    tenant: StrictStr | None = Field(None, description="whose cache; other than its own: admins")


class ExplainChatBody(ChatBody):
    """`POST /prefix-index/explain` of a conversation: a chat completion's body."""

    tenant: StrictStr | None = Field(None, description="whose cache; other than its own: admins")


class TokenizeBody(Body):
    """`POST /tokenize` of a text."""

    model: StrictStr = ""
    prompt: StrictStr
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool = Field(
        False, description="also name each token as the vocabulary does"
    )


class TokenizeChatBody(Conversation):
    """`POST /tokenize` of a conversation."""

    model: StrictStr = ""
    add_special_tokens: StrictBool = False
    return_token_strs: StrictBool = False


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: StrictStr = ""
    tokens: Many[StrictInt]


def _frozen(value: object) -> object:
    """A value of JSON as `SamplingParams` has it: tuples, and a lone stop string as one of many."""
    match value:
        case str():
            return (value,)
        case list():
            return tuple(value)
        case dict():
            return _bias(value)
        case _:
            return value


def _bias(given: dict[str, int | float]) -> tuple[tuple[int, float], ...]:
    pairs = []
    for name, value in given.items():
        if not (name.isascii() and name.isdigit() and len(name) <= len(str(2**32))):
            raise InvalidRequest("logit_bias", f"has the key {name[:20]!r}, must be a token id")
        pairs.append((int(name), float(value)))
    # In one order: equal wishes are equal values, whatever order JSON had.
    return tuple(sorted(pairs))
