"""From a client's parameters to a frozen request: defaults, tokens, truncation, checks.

Owns every check that needs no worker. Does not know HTTP or gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from core.config import RouterConfig
from core.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, PromptTooLong
from core.ids import MAX_REQUEST_ID_CHARACTERS, Ids, RequestId, seed_of
from core.ports import Clock, Tokenizer
from core.scopes import scope_of, with_public
from core.session import WorkerDescriptor
from core.types import (
    MAX_BAD_WORDS,
    MAX_SEED,
    ChatPrompt,
    GenerateRequest,
    SamplingParams,
    outside,
)
from router.access.identities import Identity
from router.public_prompts import PublicPrompts
from router.request_limits import RequestLimits, check_prompt, too_long
from router.request_params import MAX_KEY_CHARACTERS, RequestParams, ServedModel, check_text
from router.resuming import check_resume
from router.tiers import Tiers

MAX_SALT_CHARACTERS = 256
RETENTIONS = {"": False, "in_memory": False, "in-memory": False, "24h": True}
"""Values of `prompt_cache_retention`, and whether workers keep such a prompt longer."""
MAX_BAD_WORD_CHARACTERS = 256
DEFAULT_COMPLETION_TOKENS = 16


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

    def __init__(  # noqa: PLR0913 - every check that needs no worker meets here
        self,
        model: ServedModel,
        config: RouterConfig,
        tokenizer: Tokenizer,
        clock: Clock,
        ids: Ids,
        seed_key: bytes,
        read_workers: Callable[[str], Sequence[WorkerDescriptor]],
        tokens: TokenNames | None = None,
        public_prompts: PublicPrompts | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        """Build for `model`; `read_workers(tier)` lists those whose room limits a request."""
        self._model = model
        self._config = config
        self._tokenizer = tokenizer
        self._clock = clock
        self._ids = ids
        self._seed_key = seed_key
        self._limits = RequestLimits(model.max_model_len, config.max_prompt_logprobs, read_workers)
        self._tokens = tokens
        self._public_prompts = public_prompts or PublicPrompts()
        self._tiers = tiers or Tiers()
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

    def tier_of(self, params: RequestParams) -> str:
        """Return the tier that a request gets.

        Raises:
            InvalidRequest: It asks for none that there is.
            PermissionDenied: Its key may not have that one.
        """
        return self._tiers.choose(params.identity, params.service_tier, params.tier_header)

    def tiers_open_to(self, identity: Identity) -> list[str]:
        """List the tiers that a caller may ask for."""
        return self._tiers.open_to(identity)

    def overflow_of(self, tier: str) -> list[str]:
        """List the tiers that serve what finds no room in a tier, in order."""
        return self._tiers.overflow_of(tier)

    async def make(self, params: RequestParams, tier: str = "") -> GenerateRequest:
        """Validate parameters and turn them into a request.

        Args:
            params: What the caller has asked for.
            tier: That serves it; empty: the one that it asks for.

        Raises:
            ModelNotFound: Another model is served.
            InvalidRequest: Names the field.
            PermissionDenied: Its key may not have the tier that it asks for.
            PromptTooLong: Prompt plus output exceed the context window or a pool, or the prompt its
                tier's limit.
        """
        # The deadline counts from here: tokenizing takes part of it.
        received_at = self._clock.now_s()
        self.check_model(params.model)
        tier = tier or self.tier_of(params)
        max_prompt_tokens = self._tiers.by_name[tier].max_prompt_tokens
        check_text("request_id", params.request_id, MAX_REQUEST_ID_CHARACTERS)
        check_text("cache_salt", params.cache_salt, MAX_SALT_CHARACTERS)
        affinity = _affinity(params)
        keeps_prefix = _keeps(params.prompt_cache_retention)
        limit_s = self._config.deadline_s
        if params.time_limit_s is not None:
            limit_s = min(params.time_limit_s, limit_s)
        given = _normalized({**self._model.default_sampling, **params.sampling})
        if "max_tokens" in given:  # before the work of tokenizing
            SamplingParams(**given).validate(self._model.vocabulary_size)
        token_ids = await self._encode_in_time(params, received_at + limit_s)
        if not token_ids:
            raise InvalidRequest("prompt", "is empty; send at least one token")
        self._check_rows(params.prompt, token_ids)
        num_tokens = len(token_ids)
        token_ids = self._truncate(params, token_ids, given.get("max_tokens", 1), max_prompt_tokens)
        check_prompt(token_ids, tier, max_prompt_tokens)
        is_whole_text = isinstance(params.prompt, str) and len(token_ids) == num_tokens
        bad_words = await self._bad_words(params.bad_words, params.identity.tenant)
        is_chat = isinstance(params.prompt, ChatPrompt)
        if "max_tokens" not in given:
            room = self._limits.room(tier, len(token_ids), given.get("n", 1))
            given["max_tokens"] = room if is_chat else min(room, DEFAULT_COMPLETION_TOKENS)
        sampling = SamplingParams(**{**given, "bad_words": bad_words})
        sampling.validate(self._model.vocabulary_size)
        self._limits.check_scores(token_ids, sampling)
        self._limits.check_length(tier, token_ids, sampling, "messages" if is_chat else "prompt")
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
            # A negative seed is the same 64 bits without a sign.
            seed &= MAX_SEED
        return GenerateRequest(
            request_id=request_id,
            model=self._model.name,
            token_ids=tuple(token_ids),
            sampling=sampling,
            seed=seed,
            deadline_at=received_at + limit_s,
            eos_token_ids=self._eos_token_ids,
            scope=self._scope(params, token_ids),
            tenant=params.identity.tenant,
            tenant_class=params.identity.tenant_class,
            asked_tier=params.service_tier or params.tier_header,
            tier=tier,
            prices=self._tiers.by_name[tier].prices,
            affinity=affinity,
            keeps_prefix=keeps_prefix,
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

    def _scope(self, params: RequestParams, token_ids: Sequence[int]) -> str:
        scope = scope_of(params.identity.tenant, params.cache_salt)
        # A salt asks for a cache of its own, from the first block on.
        num_public = 0 if params.cache_salt else self._public_prompts.num_tokens(token_ids)
        return with_public(scope, num_public)

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
            raise too_long(self._model.max_model_len, error.message) from error

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
        self,
        params: RequestParams,
        token_ids: Sequence[int],
        max_tokens: int,
        max_prompt_tokens: int,
    ) -> Sequence[int]:
        keep = params.truncate_prompt_tokens
        if keep is None:
            return token_ids
        limit = self._model.max_model_len
        if keep == -1:
            keep = max(1, min(limit - max_tokens, max_prompt_tokens or limit))
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


def _normalized(given: dict[str, Any]) -> dict[str, Any]:
    """Replace what some clients send: `top_p` 0 means greedy, an empty stop string none."""
    if given.get("top_p") == 0:
        given |= {"top_p": 1.0, "temperature": 0.0}
    if "stop" in given:
        given["stop"] = tuple(text for text in given["stop"] if text)
    return given


def _affinity(params: RequestParams) -> tuple[str, ...]:
    """Return the keys by which a request is steered: its session before the wider cache key."""
    named = (("session", params.session_id), ("cache", params.prompt_cache_key))
    for kind, key in named:
        if len(key) > MAX_KEY_CHARACTERS:
            field = "session_id" if kind == "session" else "prompt_cache_key"
            raise InvalidRequest(
                field, f"has {len(key)} characters, the limit is {MAX_KEY_CHARACTERS}"
            )
    # With their kinds: a session that happens to be called like a cache key is another thing.
    return tuple(f"{kind} {key}" for kind, key in named if key)


def _keeps(retention: str) -> bool:
    """Read a prompt's retention."""
    if retention not in RETENTIONS:
        raise InvalidRequest(
            "prompt_cache_retention", f"is {retention[:20]!r}, must be in_memory or 24h"
        )
    return RETENTIONS[retention]
