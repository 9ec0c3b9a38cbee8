"""Requests, sampling parameters and the events that answer them.

Owns the shapes that cross rooms: `GenerateRequest` (frozen, made once by a server) and the token
events. Does not know how they are encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from core.errors import InvalidRequest, ServingError
from core.ids import RequestId
from core.trace import TraceContext

MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_SEED = 2**63 - 1
MAX_LOGIT_BIAS = 300
MAX_ALLOWED_TOKENS = 4096
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 2048
CANARY_TIER = "canary"
"""Tier of the requests behind `/ready`; they take no permit."""
DEFAULT_TIER = "default"
"""Says of a key that its tier is the config's `default_tier`."""
MODEL_DEFAULTS = ("temperature", "top_p", "min_p", "repetition_penalty")
"""Fields of `SamplingParams`, numbers, for which a model's files may have a default."""


class FinishReason(StrEnum):
    """Why one choice ended."""

    STOP = "stop"
    LENGTH = "length"


class Path(StrEnum):
    """How an attempt is placed: prefill and decode apart, or both in one worker's loop."""

    PD = "pd"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    Presence and frequency penalties count output tokens, the repetition penalty prompt tokens too.
    The same object goes from the request to the draw; every wire takes its fields from here.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    """Empty: all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not appear in the output."""
    seed: int | None = None
    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. k: the chosen token's and the k most likely ones'."""
    prompt_logprobs: int | None = None
    """None: none. k: of each prompt token but the first, and of the k most likely ones there."""
    include_stop: bool = False
    """Leave the stop string, or the stop token's text, in the text."""
    skip_special_tokens: bool = True

    @property
    def has_penalties(self) -> bool:
        """True if a draw depends on the tokens before it."""
        is_on = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(is_on)

    def validate(self, vocabulary_size: int) -> None:
        """Check every field.

        Raises:
            InvalidRequest: Names the first field out of range; nothing was changed.
        """
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p", "is 0, must be above 0 (1 turns it off)")
        _in_range("top_k", self.top_k, 0, vocabulary_size)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _in_range("n", self.n, 1, MAX_CHOICES)
        _in_range("max_tokens", self.max_tokens, 1, 2**31)
        _in_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            _in_range("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        for name, top in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if top is not None:
                _in_range(name, top, 0, MAX_TOP_LOGPROBS)
        self._validate_tokens(vocabulary_size)
        self._validate_stop(vocabulary_size)

    def _validate_tokens(self, vocabulary_size: int) -> None:
        _at_most("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for _, bias in self.logit_bias:
            _in_range("logit_bias", bias, -100.0, 100.0, "has the bias {}")
        _at_most("allowed_token_ids", len(self.allowed_token_ids), MAX_ALLOWED_TOKENS)
        _at_most("bad_words", len(self.bad_words), MAX_BAD_WORDS)
        for word in self.bad_words:
            _in_range("bad_words", len(word), 1, MAX_BAD_WORD_TOKENS, "has a word of {} tokens")
            _in_vocabulary("bad_words", word, vocabulary_size)
        biased = [token_id for token_id, _ in self.logit_bias]
        _in_vocabulary("logit_bias", biased, vocabulary_size)
        _in_vocabulary("allowed_token_ids", self.allowed_token_ids, vocabulary_size)

    def _validate_stop(self, vocabulary_size: int) -> None:
        _at_most("stop", len(self.stop), MAX_STOP_STRINGS)
        for text in self.stop:
            # It has no UTF-8, so no output could ever contain it.
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise InvalidRequest("stop", "has a lone surrogate; send valid Unicode")
            _in_range("stop", len(text.encode()), 1, MAX_STOP_BYTES, "has a string of {} bytes")
        _at_most("stop_token_ids", len(self.stop_token_ids), MAX_STOP_STRINGS)
        _in_vocabulary("stop_token_ids", self.stop_token_ids, vocabulary_size)


def outside(token_ids: Sequence[int], vocabulary_size: int) -> int | None:
    """One token id that is not in the vocabulary, if there is any; without a step per token."""
    ends = (min(token_ids), max(token_ids)) if token_ids else ()
    return next((t for t in ends if not 0 <= t < vocabulary_size), None)


def _in_range(name: str, value: float, low: float, high: float, fact: str = "is {}") -> None:
    if not low <= value <= high:  # NaN is in no range
        limits = f"must be from {_shown(low)} to {_shown(high)}"
        raise InvalidRequest(name, f"{fact.format(value)}, {limits}")


def _at_most(name: str, num_entries: int, limit: int) -> None:
    if num_entries > limit:
        raise InvalidRequest(name, f"has {num_entries} entries, the limit is {limit}")


def _in_vocabulary(name: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    wrong = outside(token_ids, vocabulary_size)
    if wrong is not None:
        limits = f"must be from 0 to {vocabulary_size - 1}"
        raise InvalidRequest(name, f"has token id {wrong}, {limits}")


def _shown(limit: float) -> str:
    """A whole number whole: `:g` keeps six digits."""
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation before the chat template; `variables` are allowed ones.

    A message's content is text, a list of parts of type text, or None.
    """

    messages: list[dict[str, Any]]
    variables: dict[str, Any] = field(default_factory=dict)
    template: str = ""
    """Empty: the model's own."""
    adds_generation_prompt: bool = True
    continues_final: bool = False
    adds_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Prices:
    """What a million tokens cost a caller, in the operator's currency."""

    prompt_per_mtok: float
    cached_per_mtok: float
    """Those of the prompt that a prefix cache had."""
    output_per_mtok: float

    def cost(self, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> float:
        """Return what a request costs; the cached tokens are among those of the prompt."""
        prompt = (prompt_tokens - cached_tokens) * self.prompt_per_mtok
        cached = cached_tokens * self.cached_per_mtok
        return (prompt + cached + output_tokens * self.output_per_mtok) / 1_000_000


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What was asked, as token ids; frozen once a server has made it.

    `deadline_at` is in this process's loop time (monotonic seconds); on the wire it travels as the
    seconds that are left. `scope` is the tenant scope of the prefix cache.
    """

    request_id: RequestId
    model: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    deadline_at: float
    eos_token_ids: tuple[int, ...] = ()
    tier: str = "standard"
    prices: Prices | None = None
    """Of its tier, if that has any; stays in the router."""
    scope: str = ""
    tenant: str = ""
    """Whose it is; stays in the router. Ids are only compared within a tenant."""
    trace: TraceContext | None = None
    operation: str = "text_completion"
    """OpenTelemetry's name of the operation: text_completion or chat."""
    correlation_id: str = ""
    """What the caller calls the action it belongs to, for the log; stays in the router."""
    received_at: float | None = None
    """When the server saw the request, in loop time; stays in the router."""
    hidden_stops: tuple[tuple[int, str], ...] = ()
    """Stop tokens by id, with the stop string each stands for: special tokens have no text while
    they are hidden. Stays in the router."""
    echoes: bool = False
    """The prompt is shown before the output: a character that it began is sent with the output.
    Stays in the router."""
    prompt_text: str = ""
    """What is shown then, if the prompt came as text; stays in the router."""
    affinity: tuple[str, ...] = ()
    """Keys that the caller gave it, the narrowest first: requests with one of them prefer a worker
    that the key used before. Only compared within a tenant; stays in the router."""
    keeps_prefix: bool = False
    """Workers keep its blocks longer than others, within the tenant's share."""
    resume_tokens: tuple[tuple[int, ...], ...] = ()
    """The first tokens of each choice as a returning client reports them; the last is checked."""
    resume_from: tuple[int, ...] = ()
    """How much of each choice such a client has: positions, tail and end (`router.resuming`)."""

    @property
    def run_key(self) -> tuple[str, RequestId]:
        """What names a running request: tenants may use the same ids."""
        return self.tenant, self.request_id

    @property
    def max_total_tokens(self) -> int:
        """Longest a choice can become, prompt included (tokens)."""
        return len(self.token_ids) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log probability of a sampled token and of the most likely ones at its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @property
    def ranked(self) -> tuple[tuple[int, float], ...]:
        """The most likely tokens, best first, and the token itself, which may be one more."""
        is_among = any(token_id == self.token_id for token_id, _ in self.top)
        return self.top if is_among else (*self.top, (self.token_id, self.logprob))


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request.

    `cached_tokens` are those of the prompt that a prefix cache had: on path pd of the worker that
    had more, since either side looks for whole blocks of its own size.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    cost: float | None = None
    """By the prices of its tier; None: there are none, or it is not known yet."""


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Where the time of a request went (seconds), who served it, what crossed the wire.

    The phases follow one another: tokenize, queue, prefill and router add up to `ttft_s`; those and
    exposed_transfer, first_decode, decode and finish add up to `e2e_s`.
    """

    tokenize_s: float = 0.0
    queue_s: float = 0.0
    """Waiting for a permit at the router and for room at the worker."""
    prefill_s: float = 0.0
    router_s: float = 0.0
    """The rest of the time to the first token: placement, sessions, frames, text."""
    exposed_transfer_s: float = 0.0
    """From the first token's arrival to decode's announcement of the same token."""
    first_decode_s: float = 0.0
    decode_s: float = 0.0
    finish_s: float = 0.0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    kv_bytes: int = 0
    kv_blocks: int = 0
    kv_transport: str = ""
    kv_fragments_resent: int = 0
    """Fragments that came damaged and were sent again."""
    cached_tokens: int = 0
    fetch_outcome: str = ""
    """What became of a prefix that was to come from a peer (`core.session.FetchOutcome`)."""
    fetched_tokens: int = 0
    """Of the cached tokens, those that came from a peer."""
    fetch_s: float = 0.0
    """For which the prompt waited for them; a part of `queue_s`."""
    path: str = ""
    prefill_worker: str = ""
    decode_worker: str = ""
    prefill_pid: int = 0
    decode_pid: int = 0
    attempts: tuple[str, ...] = ()
    """One `epoch:path:outcome` each; the outcome is ok or the code of the fault."""
    why: Mapping[str, Any] = field(default_factory=dict)
    """Candidates, their costs and the decision of the last placement, and what it took, as JSON
    shows them."""
    placement_error_s: float | None = None
    """By how much that was more than predicted; None: it was not measured."""
    placement_regret_s: float | None = None
    """By how much it was more than predicted of the best other candidate; None: there was none, or
    it was not measured."""

    def phases(self) -> dict[str, float]:
        """Seconds by phase, in order."""
        return {name: getattr(self, f"{name}_s") for name in PHASES}


PHASES = (
    "tokenize",
    "queue",
    "prefill",
    "router",
    "exposed_transfer",
    "first_decode",
    "decode",
    "finish",
)
TTFT_PHASES = PHASES[:4]


# --- events of a request, in the order a server sees them -----------------------------------------


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New output of one choice: never cumulative. Several tokens may arrive in one delta."""

    choice: int
    position: int
    """Output position of the first token in `token_ids`."""
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """One choice ended, with what made it end."""

    choice: int
    reason: FinishReason
    stop_match: str | int | None = None
    position: int = 0
    """Output tokens of the whole choice."""
    is_new: bool = True
    """False: a client that came back knows it; it counts for the credit and is not sent again."""


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """The one terminal event of a request; `error` is None when every choice finished."""

    usage: Usage
    error: ServingError | None = None
    timing: RequestTiming = field(default_factory=RequestTiming)


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log probabilities of the prompt's tokens but the first; at most once, before any delta."""

    logprobs: tuple[Logprob, ...]


RequestEvent = PromptScored | TextDelta | ChoiceFinished | RequestEnded
