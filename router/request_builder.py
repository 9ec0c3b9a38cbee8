"""From a client's wish to a frozen request: defaults, tokens, truncation, checks.

Owns every check that can be made before a worker is asked. Does not know HTTP or gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from core.config import RouterConfig
from core.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, PromptTooLong
from core.ids import Ids, RequestId, seed_of
from core.ports import Clock, Tokenizer
from core.session import WorkerDescriptor
from core.trace import TraceContext
from core.types import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_SEED,
    ChatPrompt,
    GenerateRequest,
    SamplingParams,
    outside,
)
from router.access.identities import ANYBODY, Identity

MAX_ID_CHARACTERS = 128
MAX_SALT_CHARACTERS = 256
MAX_BAD_WORD_CHARACTERS = 256
DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the router knows of the model without torch.

    `default_sampling` is that of `generation_config.json`.
    """

    name: str
    vocabulary_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    default_sampling: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    max_prompt_bytes: int = 0
    """Text with more bytes cannot fit, however it is tokenized; 0: nothing is known."""


@dataclass(frozen=True, slots=True)
class RequestParams:
    """What a door was asked for.

    `sampling` has the given fields only: absent means the model's default.
    """

    prompt: str | Sequence[int] | ChatPrompt
    sampling: dict[str, Any]
    model: str = ""
    request_id: str = ""
    """What makes it one request and no other: its seed, its stream. Empty: made here."""
    correlation_id: str = ""
    """What the caller calls the action it belongs to; many requests may have the same."""
    time_limit_s: float | None = None
    bad_words: Sequence[str] = ()
    truncate_prompt_tokens: int | None = None
    """-1: to what fits."""
    keeps_left: bool = False
    """Truncate at the end instead of the beginning."""
    adds_special_tokens: bool = True
    cache_salt: str = ""
    echoes: bool = False
    """The prompt is shown before the output."""
    trace: TraceContext | None = None
    identity: Identity = ANYBODY
    resume_from: tuple[int, ...] = ()
    """For a client that comes back: what it has of each choice."""
    resume_tokens: tuple[tuple[int, ...], ...] = ()
    """Its tokens, if it says them."""


class TokenNames(Protocol):
    """What a vocabulary says of its tokens."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Special tokens by their text."""
        ...

    def name(self, token_id: int) -> str:
        """The token as the vocabulary names it."""
        ...


class RequestBuilder:
    """Makes requests for one model."""

    def __init__(
        self,
        model: ServedModel,
        config: RouterConfig,
        tokenizer: Tokenizer,
        clock: Clock,
        ids: Ids,
        seed_key: bytes,
        pools: Callable[[], Sequence[WorkerDescriptor]],
        tokens: TokenNames | None = None,
    ) -> None:
        """Keep the collaborators; `pools` lists live workers."""
        self._model, self._config, self._tokenizer = model, config, tokenizer
        self._clock, self._ids, self._seed_key, self._pools = clock, ids, seed_key, pools
        self._tokens, rows = tokens, model.vocabulary_size
        special_ids = tokens.special_ids if tokens else {}
        self._special_ids = {text: i for text, i in special_ids.items() if i < rows}
        self._eos_token_ids = tuple(i for i in model.eos_token_ids if i < rows)

    def check_model(self, name: str) -> None:
        """Refuse a model that is not served.

        Raises:
            ModelNotFound: Names the one that is.
        """
        if name not in ("", self._model.name):
            raise ModelNotFound(
                f"model {name[:80]!r} is not served here; served: {self._model.name}"
            )

    async def make(self, params: RequestParams) -> GenerateRequest:
        """Check a wish and turn it into a request.

        Raises:
            ModelNotFound: Another model is served.
            InvalidRequest: Names the field.
            PromptTooLong: Prompt plus output exceed the context window or a pool.
        """
        received_at = self._clock.now_s()
        self.check_model(params.model)
        check_text("request_id", params.request_id, MAX_ID_CHARACTERS)
        check_text("cache_salt", params.cache_salt, MAX_SALT_CHARACTERS)
        limit_s = self._config.deadline_s
        if params.time_limit_s is not None:
            limit_s = min(params.time_limit_s, limit_s)
        given = _usual({**self._model.default_sampling, **params.sampling})
        if "max_tokens" in given:  # before the work of tokenizing
            SamplingParams(**given).validate(self._model.vocabulary_size)
        token_ids = await self._encode_in_time(params, received_at + limit_s)
        if not token_ids:
            raise InvalidRequest("prompt", "is empty; send at least one token")
        self._check_rows(params.prompt, token_ids)
        num_tokens = len(token_ids)
        token_ids = self._truncate(params, token_ids, given.get("max_tokens", 1))
        is_whole_text = isinstance(params.prompt, str) and len(token_ids) == num_tokens
        bad_words = await self._bad_words(params.bad_words, params.identity.tenant)
        is_chat = isinstance(params.prompt, ChatPrompt)
        if "max_tokens" not in given:
            room = self._room(len(token_ids), given.get("n", 1))
            given["max_tokens"] = room if is_chat else min(room, DEFAULT_COMPLETION_TOKENS)
        sampling = SamplingParams(**{**given, "bad_words": bad_words})
        sampling.validate(self._model.vocabulary_size)
        self._check_scores(token_ids, sampling)
        self._check_length(token_ids, sampling, "messages" if is_chat else "prompt")
        hidden_stops = self._hidden_stops(sampling)
        stop_ids = (*sampling.stop_token_ids, *(i for i, _ in hidden_stops))
        sampling = replace(sampling, stop_token_ids=stop_ids)
        _check_resume(params, sampling, self._model.vocabulary_size)
        request_id = RequestId(params.request_id) if params.request_id else self._ids.request()
        seed = sampling.seed
        if seed is None:
            seed = seed_of(request_id, self._seed_key, params.identity.tenant)
        else:
            seed &= MAX_SEED
        return GenerateRequest(
            request_id=request_id,
            model=self._model.name,
            token_ids=tuple(token_ids),
            sampling=sampling,
            seed=seed,
            deadline_at=received_at + limit_s,
            eos_token_ids=self._eos_token_ids,
            scope=_scope(params),
            tenant=params.identity.tenant,
            tier=params.identity.tier,
            trace=params.trace,
            operation="chat" if is_chat else "text_completion",
            received_at=received_at,
            resume_from=params.resume_from,
            resume_tokens=params.resume_tokens,
            hidden_stops=hidden_stops,
            echoes=params.echoes,
            prompt_text=str(params.prompt) if params.echoes and is_whole_text else "",
            correlation_id=params.correlation_id,
        )

    async def _encode_in_time(self, params: RequestParams, deadline_at: float) -> Sequence[int]:
        """The prompt's token ids, by the request's deadline."""
        try:
            async with asyncio.timeout(max(0.0, deadline_at - self._clock.now_s())):
                return await self.encode(
                    params.prompt,
                    adds_special_tokens=params.adds_special_tokens,
                    tenant=params.identity.tenant,
                    max_bytes=0 if params.truncate_prompt_tokens else self._model.max_prompt_bytes,
                )
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed before the prompt was read") from error
        except PromptTooLong as error:
            raise _too_long(self._model.max_model_len, error.message) from error

    async def encode(
        self,
        prompt: str | Sequence[int] | ChatPrompt,
        *,
        adds_special_tokens: bool = True,
        tenant: str = "",
        max_bytes: int = 0,
    ) -> Sequence[int]:
        """Turn any form of prompt into token ids.

        Raises:
            InvalidRequest: The tokenizer or the chat template refuses it.
        """
        if isinstance(prompt, ChatPrompt):
            return await self._tokenizer.encode_chat(prompt, tenant=tenant, max_bytes=max_bytes)
        if isinstance(prompt, str):
            return await self._tokenizer.encode(
                prompt,
                adds_special_tokens=adds_special_tokens,
                tenant=tenant,
                max_bytes=max_bytes,
            )
        size = self._model.vocabulary_size
        wrong = outside(prompt, size)
        if wrong is not None:
            raise InvalidRequest("prompt", f"has token id {wrong}, must be from 0 to {size - 1}")
        return prompt

    def _check_rows(
        self, prompt: str | Sequence[int] | ChatPrompt, token_ids: Sequence[int]
    ) -> None:
        """Refuse what the tokenizer knows and the model does not: fine-tunes may add tokens."""
        size = self._model.vocabulary_size
        wrong = outside(token_ids, size)
        if wrong is not None:
            name = self._tokens.name(wrong) if self._tokens else ""
            raise InvalidRequest(
                "messages" if isinstance(prompt, ChatPrompt) else "prompt",
                f"has token {name!r} (id {wrong}), for which the model has no row; "
                f"ids are from 0 to {size - 1}",
            )

    def _hidden_stops(self, sampling: SamplingParams) -> tuple[tuple[int, str], ...]:
        """Stop strings that are special tokens: while those are hidden, no text shows them."""
        if not sampling.skip_special_tokens:
            return ()
        ids = self._special_ids
        return tuple((ids[text], text) for text in sampling.stop if text in ids)

    def _truncate(
        self, params: RequestParams, token_ids: Sequence[int], max_tokens: int
    ) -> Sequence[int]:
        keep = params.truncate_prompt_tokens
        if keep is None:
            return token_ids
        limit = self._model.max_model_len
        if keep == -1:
            keep = max(1, limit - max_tokens)
        if not 1 <= keep <= limit:
            raise InvalidRequest(
                "truncate_prompt_tokens", f"is {keep}, must be -1 or from 1 to {limit}"
            )
        return token_ids[:keep] if params.keeps_left else token_ids[-keep:]

    async def _bad_words(self, words: Sequence[str], tenant: str) -> tuple[tuple[int, ...], ...]:
        """Tokens of each word at the beginning of a text and after a space, as in vLLM."""
        if len(words) > MAX_BAD_WORDS // 2:
            raise InvalidRequest(
                "bad_words", f"has {len(words)} words, the limit is {MAX_BAD_WORDS // 2}"
            )
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            if not word.strip() or len(word) > MAX_BAD_WORD_CHARACTERS:
                raise InvalidRequest(
                    "bad_words",
                    f"has an empty word or one above {MAX_BAD_WORD_CHARACTERS} characters",
                )
            for form in (word.lstrip(), " " + word.lstrip()):
                ids = await self._tokenizer.encode(form, adds_special_tokens=False, tenant=tenant)
                found[tuple(ids)] = None
        rows = self._model.vocabulary_size
        return tuple(ids for ids in found if ids and max(ids) < rows)  # others are never drawn

    def _limits(self, num_choices: int) -> list[tuple[int, str]]:
        """How long prompt and output together may be (tokens), and how an operator can raise it."""
        limits = [(self._model.max_model_len, "")]
        for d in self._pools():
            num_tokens = max(0, d.num_blocks - num_choices) * d.block_size_tokens
            remedy = f" A worker's pool holds {d.num_blocks} KV blocks; raise engine.num_blocks."
            limits.append((num_tokens, remedy))
        return limits

    def _room(self, num_prompt_tokens: int, num_choices: int) -> int:
        """Longest output (tokens) that the context window and the smallest pool can hold."""
        return max(1, min(self._limits(num_choices))[0] - num_prompt_tokens)

    def _check_scores(self, token_ids: Sequence[int], sampling: SamplingParams) -> None:
        if sampling.prompt_logprobs is None:
            return
        num_scores = len(token_ids) * (sampling.prompt_logprobs + 1)
        limit = self._config.max_prompt_logprobs
        if num_scores > limit:
            raise InvalidRequest(
                "prompt_logprobs",
                f"of {len(token_ids)} prompt tokens would be {num_scores} numbers, the limit is "
                f"{limit}; ask for fewer, shorten the prompt or raise router.max_prompt_logprobs",
            )

    def _check_length(
        self, token_ids: Sequence[int], sampling: SamplingParams, prompt_field: str
    ) -> None:
        """Refuse what could never be held."""
        limit, remedy = min(self._limits(sampling.n))
        total = len(token_ids) + sampling.max_tokens
        if total > limit:
            raise _too_long(
                limit,
                f"you requested {total} tokens ({len(token_ids)} in the {prompt_field}, "
                f"{sampling.max_tokens} in the completion). Please reduce the length of the "
                f"{prompt_field} or completion.{remedy}",
            )


def _too_long(limit_tokens: int, fact: str) -> PromptTooLong:
    """The error in OpenAI's words: clients know it by them."""
    return PromptTooLong(
        f"This model's maximum context length is {limit_tokens} tokens. However, {fact}"
    )


def _usual(given: dict[str, Any]) -> dict[str, Any]:
    """Say the usual for what some clients send: `top_p` 0 is greedy, an empty stop is none."""
    if given.get("top_p") == 0:
        given |= {"top_p": 1.0, "temperature": 0.0}
    if "stop" in given:
        given["stop"] = tuple(text for text in given["stop"] if text)
    return given


def num_choices(params: RequestParams) -> int:
    """Choices that a wish asks for, at most what is allowed: a larger `n` is refused later."""
    n: int = params.sampling.get("n", 1)
    return min(n, MAX_CHOICES)


def _scope(params: RequestParams) -> str:
    """The prefix cache's scope: the tenant's, whatever salt the request asks for within it."""
    tenant = params.identity.tenant
    return f"{tenant}\n{params.cache_salt}" if tenant else params.cache_salt


def _check_resume(params: RequestParams, sampling: SamplingParams, vocabulary_size: int) -> None:
    if not params.resume_from:
        return
    if not params.request_id:
        raise InvalidRequest("request_id", "is missing; a stream is resumed by the id it had")
    if len(params.resume_from) != sampling.n:
        raise InvalidRequest(
            "resume_from",
            f"has {len(params.resume_from)} positions, the request has n={sampling.n}",
        )
    if max(params.resume_from) > sampling.max_tokens + 2:
        raise InvalidRequest(
            "resume_from",
            f"has position {max(params.resume_from)}, max_tokens is {sampling.max_tokens}; send "
            "the same request",
        )

    if not params.resume_tokens:
        return
    if len(params.resume_tokens) != sampling.n:
        raise InvalidRequest(
            "resume_from.tokens",
            f"has {len(params.resume_tokens)} choices, the request has n={sampling.n}",
        )
    for tokens, position in zip(params.resume_tokens, params.resume_from, strict=True):
        if len(tokens) > min(position, sampling.max_tokens) or not all(
            0 <= t < vocabulary_size for t in tokens
        ):
            raise InvalidRequest(
                "resume_from.tokens",
                "has more tokens than positions, or one outside the vocabulary",
            )


def correlation_id_of(value: str) -> str:
    """A caller's own id if it may be echoed and logged; else nothing."""
    return value if _is_text(value, MAX_ID_CHARACTERS) else ""


def _is_text(value: str, limit: int) -> bool:
    return len(value) <= limit and value.isascii() and (value.isprintable() or not value)


def check_text(name: str, value: str, limit: int) -> None:
    """Refuse a name that cannot be logged and echoed.

    Raises:
        InvalidRequest: It is too long, or not printable ASCII.
    """
    if not _is_text(value, limit):
        raise InvalidRequest(
            name, f"has {len(value)} characters, must be at most {limit} printable ASCII ones"
        )
