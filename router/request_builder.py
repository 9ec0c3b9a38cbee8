"""From a client's parameters to a frozen request: defaults, tokens, truncation, checks.

Owns every check that needs no worker. Does not know HTTP or gRPC.
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
from router.resuming import check_resume

MAX_ID_CHARACTERS = 128
MAX_SALT_CHARACTERS = 256
MAX_BAD_WORD_CHARACTERS = 256
DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the router knows of the model, without torch.

    `default_sampling` is from `generation_config.json`.
    """

    name: str
    vocabulary_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    default_sampling: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    max_prompt_bytes: int = 0
    """Longer text cannot fit, however it is tokenized; 0: no such limit is known."""


@dataclass(frozen=True, slots=True)
class RequestParams:
    """What a client asked for, not validated yet.

    `sampling` has only the given fields: an absent one means the model's default.
    """

    prompt: str | Sequence[int] | ChatPrompt
    sampling: dict[str, Any]
    model: str = ""
    request_id: str = ""
    """Identifies the request, its seed and its stream. Empty: the router makes one."""
    correlation_id: str = ""
    """The caller's name for the action it belongs to; many requests may share it."""
    time_limit_s: float | None = None
    bad_words: Sequence[str] = ()
    truncate_prompt_tokens: int | None = None
    """Keep so many; -1: as many as fit."""
    keeps_left: bool = False
    """Truncate at the end instead of the beginning."""
    adds_special_tokens: bool = True
    cache_salt: str = ""
    echoes: bool = False
    """The prompt is shown before the output."""
    trace: TraceContext | None = None
    identity: Identity = ANYBODY
    resume_from: tuple[int, ...] = ()
    """For a client that resumes: its position in each choice (`router.resuming`)."""
    resume_tokens: tuple[tuple[int, ...], ...] = ()
    """The tokens it has, if it sends them."""


class TokenNames(Protocol):
    """The names of a vocabulary's tokens."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Special tokens by their text."""
        ...

    def name(self, token_id: int) -> str:
        """Return the vocabulary's name of a token."""
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
        """Build for `model`; `pools` lists live workers, whose room limits a request."""
        self._model = model
        self._config = config
        self._tokenizer = tokenizer
        self._clock = clock
        self._ids = ids
        self._seed_key = seed_key
        self._pools = pools
        self._tokens = tokens
        rows = model.vocabulary_size
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
        """Validate parameters and turn them into a request.

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
        check_resume(
            params.request_id,
            params.resume_from,
            params.resume_tokens,
            sampling,
            self._model.vocabulary_size,
        )
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
        """Tokenize the prompt before the request's deadline."""
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
        """Refuse tokens beyond the model's rows: a fine-tune may add some to the tokenizer."""
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
        """Return stop strings that are special tokens, which are hidden and so have no text."""
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
        """Tokenize each word twice, as in vLLM: at the start of a text, and after a space."""
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
        return tuple(ids for ids in found if ids and max(ids) < rows)  # others are never sampled

    def _limits(self, num_choices: int) -> list[tuple[int, str]]:
        """List the limits on prompt plus output (tokens), each with how to raise it."""
        limits = [(self._model.max_model_len, "")]
        for d in self._pools():
            num_tokens = max(0, d.num_blocks - num_choices) * d.block_size_tokens
            remedy = f" A worker's pool holds {d.num_blocks} KV blocks; raise engine.num_blocks."
            limits.append((num_tokens, remedy))
        return limits

    def _room(self, num_prompt_tokens: int, num_choices: int) -> int:
        """Return the longest output (tokens) that the context and the smallest pool can hold."""
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
        """Refuse what no worker could ever hold."""
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
    """Make the error with OpenAI's wording, by which clients recognize it."""
    return PromptTooLong(
        f"This model's maximum context length is {limit_tokens} tokens. However, {fact}"
    )


def _usual(given: dict[str, Any]) -> dict[str, Any]:
    """Normalize what some clients send: `top_p` 0 means greedy, an empty stop string none."""
    if given.get("top_p") == 0:
        given |= {"top_p": 1.0, "temperature": 0.0}
    if "stop" in given:
        given["stop"] = tuple(text for text in given["stop"] if text)
    return given


def num_choices(params: RequestParams) -> int:
    """Return how many choices are asked for, at most the limit: a larger `n` is refused later."""
    n: int = params.sampling.get("n", 1)
    return min(n, MAX_CHOICES)


def _scope(params: RequestParams) -> str:
    """Return the scope in the prefix cache: the tenant's, divided by the request's salt."""
    tenant = params.identity.tenant
    return f"{tenant}\n{params.cache_salt}" if tenant else params.cache_salt


def correlation_id_of(value: str) -> str:
    """Return a caller's id if it may be echoed and logged, else an empty string."""
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
