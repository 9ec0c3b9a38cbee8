"""From wish to request: defaults, truncation, limits; and the bodies and headers around it."""

import asyncio
from dataclasses import replace

import pytest
from support.byte_tokenizer import ByteTokenizer

from core.config import RouterConfig, TierConfig, default_tiers
from core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
)
from core.ids import Ids
from core.scopes import with_public
from core.session import Role, WorkerDescriptor
from core.types import ChatPrompt
from router.access.identities import Identity
from router.http.bodies import CompletionBody
from router.http.body_model import parse_body
from router.public_prompts import PublicPrompts
from router.request_builder import RequestBuilder
from router.request_params import RequestParams, ServedModel
from router.tiers import Tiers

MODEL = ServedModel("m", 300, 100, (2,), "float32", {"temperature": 0.6, "top_p": 0.9, "top_k": 20})


TALK = ChatPrompt([{"role": "user", "content": "hello"}])


class Talks(ByteTokenizer):
    """With a chat template that puts each message in brackets."""

    async def encode_chat(self, chat, *, tenant="", max_bytes=0):
        return [*"".join(f"<{m['content']}>" for m in chat.messages).encode()]


class StillClock:
    def now_s(self):
        return 50.0


def maker(pools=(), public=None, tiers=None):
    return RequestBuilder(
        MODEL,
        RouterConfig(deadline_s=30.0),
        ByteTokenizer(),
        StillClock(),
        Ids(),
        b"key",
        lambda tier: list(pools),
        public_prompts=public,
        tiers=tiers,
    )


def pool(num_blocks):
    return WorkerDescriptor("w", Role.DECODE, 1, "", "", "m", "", 4, num_blocks, 100)


async def make(prompt="ab", given=None, pools=(), **fields):
    return await maker(pools).make(RequestParams(prompt, given or {}, **fields))


async def test_absent_fields_are_the_models_defaults_and_zero_is_zero():
    sampling = (await make()).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (
        0.6,
        0.9,
        20,
        16,
    )
    sampling = (await make(given={"temperature": 0, "top_k": 0, "max_tokens": 3})).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (
        0,
        0.9,
        0,
        3,
    )


async def test_a_chat_may_fill_what_the_window_and_the_smallest_pool_hold():
    assert (await make(TALK)).sampling.max_tokens == 95
    assert (await make(TALK, pools=[pool(100), pool(11)])).sampling.max_tokens == 35
    assert (await make(TALK)).operation == "chat" and (await make()).operation == "text_completion"


async def test_ids_seeds_deadlines_and_scopes():
    one, two = await make(request_id="x"), await make(request_id="x")
    assert one.seed == two.seed != (await make(request_id="y")).seed
    assert (await make(given={"seed": 9})).seed == 9
    assert (await make(time_limit_s=5.0)).deadline_at == 55.0 and (
        await make(time_limit_s=500.0)
    ).deadline_at == 80.0
    assert (await make(cache_salt="s")).scope == "s" and (await make()).request_id


async def test_a_public_beginning_is_in_the_scope_unless_a_salt_asks_for_ones_own():
    public = PublicPrompts(["be brief"])
    await public.start(Talks())
    build = maker(public=public).make
    identity = Identity("acme", "standard")
    begins = [*b"<be brief><"]
    for prompt, salt, scope in (
        ([*begins, 7, 8], "", with_public("acme\n", len(begins))),
        ([*begins], "", with_public("acme\n", len(begins))),
        ([*begins[:-1], 7], "", "acme\n"),
        ([7, *begins], "", "acme\n"),
        ([*begins, 7, 8], "s", "acme\ns"),
    ):
        params = RequestParams(prompt, {}, cache_salt=salt, identity=identity)
        assert (await build(params)).scope == scope, prompt


async def test_hints_of_the_cache_steer_and_keep():
    plain = await make()
    assert (plain.affinity, plain.keeps_prefix) == ((), False)
    both = await make(prompt_cache_key="k", session_id="s")
    assert both.affinity == ("session s", "cache k")
    assert (await make(session_id="k")).affinity != (await make(prompt_cache_key="k")).affinity
    assert (await make(prompt_cache_key="é" * 512)).affinity
    for retention, keeps in (("24h", True), ("in_memory", False), ("in-memory", False)):
        assert (await make(prompt_cache_retention=retention)).keeps_prefix is keeps
    for field, value in (
        ("prompt_cache_key", "k" * 513),
        ("session_id", "k" * 513),
        ("prompt_cache_retention", "48h"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await make(**{field: value})
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("keep", "keeps_left", "expected"),
    [
        (3, False, b"hij"),
        (3, True, b"abc"),
        (None, False, b"abcdefghij"),
        (-1, False, b"abcdefghij"),
        (100, False, b"abcdefghij"),
    ],
)
async def test_truncation(keep, keeps_left, expected):
    made = await make(
        "abcdefghij", truncate_prompt_tokens=keep, keeps_left=keeps_left, adds_special_tokens=False
    )
    assert bytes(made.token_ids) == expected


async def test_truncation_to_what_fits_leaves_room_for_the_output():
    made = await make([7] * 500, {"max_tokens": 40}, truncate_prompt_tokens=-1)
    assert len(made.token_ids) == 60
    for keep in (0, -2, 101):
        with pytest.raises(InvalidRequest, match="truncate_prompt_tokens"):
            await make(truncate_prompt_tokens=keep)


async def test_bad_words_are_tokenized_in_both_forms():
    made = await make(given={"max_tokens": 1}, bad_words=["no", " no"])
    assert made.sampling.bad_words == ((110, 111), (32, 110, 111))
    for words in ([""], ["x" * 300], ["x"] * 65):
        with pytest.raises(InvalidRequest, match="bad_words"):
            await make(bad_words=words)


@pytest.mark.parametrize(
    ("prompt", "fields", "kind", "words"),
    [
        ("ab", {"model": "other"}, ModelNotFound, "other"),
        ("", {"adds_special_tokens": False}, InvalidRequest, "prompt is empty"),
        ([300], {}, InvalidRequest, "token id 300"),
        ([-1], {}, InvalidRequest, "token id -1"),
        ([1] * 200, {}, PromptTooLong, "maximum context length is 100 tokens"),
        ("ab", {"request_id": "x" * 129}, InvalidRequest, "request_id"),
        ("ab", {"cache_salt": "\n"}, InvalidRequest, "cache_salt"),
    ],
)
async def test_refusals(prompt, fields, kind, words):
    with pytest.raises(kind, match=words):
        await make(prompt, **fields)


async def test_what_the_smallest_pool_cannot_hold_is_refused_with_the_numbers():
    words = r"length is 76 tokens.*85 tokens \(84 in the prompt, 1 in .* pool holds 20 KV blocks"
    with pytest.raises(PromptTooLong, match=words):
        await make([1] * 84, pools=[pool(100), pool(20)])


async def test_what_is_too_long_is_refused_in_the_words_that_clients_look_for():
    with pytest.raises(PromptTooLong) as chat:
        await make(ChatPrompt([{"role": "user", "content": "x" * 99}]), {"max_tokens": 7})
    assert chat.value.message == (
        "This model's maximum context length is 100 tokens. However, you requested 106 tokens "
        "(99 in the messages, 7 in the completion). Please reduce the length of the messages or "
        "completion."
    )
    assert chat.value.code == "context_length_exceeded"


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(84, 16), (90, 10), (99, 1)])
async def test_a_completion_that_names_no_length_shrinks_to_what_fits(
    num_prompt_tokens, max_tokens
):
    assert (await make([1] * num_prompt_tokens)).sampling.max_tokens == max_tokens


async def test_the_choices_of_a_request_share_what_the_smallest_pool_holds():
    made = await make(TALK, {"n": 3}, pools=[pool(11)])
    assert made.sampling.max_tokens == 8 * 4 - 5


async def test_top_p_0_is_greedy_and_empty_stops_are_none():
    sampling = (await make(given={"top_p": 0, "stop": ("", "x", "")})).sampling
    assert (sampling.temperature, sampling.top_p, sampling.stop) == (0.0, 1.0, ("x",))
    assert (await make(given={"stop": ("",) * 40})).sampling.stop == ()


async def test_seeds_are_any_64_bits_and_reach_the_workers_without_a_sign():
    seeds = [(await make(given={"seed": s})).seed for s in (-1, -2, -(2**63), 2**63 - 1, 5)]
    assert seeds == [2**63 - 1, 2**63 - 2, 0, 2**63 - 1, 5]
    for seed in (-(2**63) - 1, 2**63, 10**400):
        with pytest.raises(InvalidRequest, match="seed"):
            await make(given={"seed": seed})


async def test_a_prompt_that_is_shown_is_known_to_the_output():
    for body, echoes in (({"echo": True}, True), ({"echo": False}, False), ({}, False)):
        (wish,) = parse_body(CompletionBody, {"prompt": "x", **body}).all_params("", None)
        made = await maker().make(wish)
        assert made.echoes is echoes and made.prompt_text == ("x" if echoes else "")
    for prompt, cut in (([7, 8], None), ("abc", 2)):
        made = await make(prompt, echoes=True, truncate_prompt_tokens=cut)
        assert made.echoes and made.prompt_text == ""


class Vocabulary:
    """Special tokens of a fine-tune that added two and resized nothing."""

    special_ids = {"<|end|>": 7, "<|new|>": 300}

    def name(self, token_id):
        return {300: "<|new|>"}.get(token_id, "")


class Wide(ByteTokenizer):
    """A tokenizer that knows more tokens than the model has rows for."""

    async def encode(self, text, *, adds_special_tokens=True, tenant="", max_bytes=0):
        ids = await super().encode(text, adds_special_tokens=adds_special_tokens)
        return [300 if i == ord("N") else i for i in ids]

    async def encode_chat(self, chat, *, tenant="", max_bytes=0):
        return await self.encode(chat.messages[0]["content"])


async def make_of_wide(prompt="ab", given=None, config=None, **fields):
    made = RequestBuilder(
        MODEL,
        config or RouterConfig(),
        Wide(),
        StillClock(),
        Ids(),
        b"key",
        lambda tier: [],
        Vocabulary(),
    )
    return await made.make(RequestParams(prompt, given or {}, **fields))


@pytest.mark.parametrize(
    ("prompt", "field"),
    [("a N", "prompt"), (ChatPrompt([{"role": "user", "content": "a N"}]), "messages")],
)
async def test_a_token_that_the_model_has_no_row_for_is_named(prompt, field):
    with pytest.raises(InvalidRequest, match=r"'<\|new\|>' \(id 300\).*from 0 to 299") as refused:
        await make_of_wide(prompt)
    assert refused.value.field == field
    assert (await make_of_wide("a M")).token_ids == (1, *b"a M")


async def test_bad_words_and_ends_that_the_model_cannot_draw_do_not_reach_it():
    made = RequestBuilder(
        replace(MODEL, eos_token_ids=(2, 300)), RouterConfig(), Wide(), StillClock(), Ids(), b"key",
        lambda tier: [],
    )  # fmt: skip
    request = await made.make(RequestParams("ab", {}, bad_words=("N", "M")))
    assert request.sampling.bad_words == ((77,), (32, 77)) and request.eos_token_ids == (2,)


async def test_a_bad_word_that_has_no_tokens_does_not_reach_a_worker():
    class Silent(ByteTokenizer):
        """A tokenizer that drops what it does not know."""

        async def encode(self, text, *, adds_special_tokens=True, tenant="", max_bytes=0):
            return [1, *text.encode()] if adds_special_tokens else []

    made = RequestBuilder(
        MODEL, RouterConfig(), Silent(), StillClock(), Ids(), b"key", lambda tier: []
    )
    assert (await made.make(RequestParams("ab", {}, bad_words=("x",)))).sampling.bad_words == ()


async def test_a_stop_that_is_a_hidden_special_token_becomes_a_stop_token():
    given = {"stop": ("<|end|>", "x", "<|new|>"), "stop_token_ids": (5,)}
    request = await make_of_wide(given=given)
    assert request.sampling.stop_token_ids == (5, 7) and request.hidden_stops == ((7, "<|end|>"),)
    assert request.sampling.stop == given["stop"]
    shown = await make_of_wide(given={**given, "skip_special_tokens": False})
    assert shown.sampling.stop_token_ids == (5,) and shown.hidden_stops == ()


async def test_prompt_scores_have_a_limit():
    config = RouterConfig(max_prompt_logprobs=30)
    assert await make_of_wide("abcd", {"prompt_logprobs": 5}, config)
    with pytest.raises(InvalidRequest, match=r"5 prompt tokens would be 35 .* limit is 30") as told:
        await make_of_wide("abcd", {"prompt_logprobs": 6}, config)
    assert told.value.field == "prompt_logprobs"


class Slow(ByteTokenizer):
    """A tokenizer that has other work; it remembers for whom it was asked and how much may fit."""

    def __init__(self):
        self.asked = []

    async def encode(self, text, *, adds_special_tokens=True, tenant="", max_bytes=0):
        self.asked.append((tenant, max_bytes))
        await asyncio.sleep(0.05)
        return [5]


async def test_a_prompt_is_read_for_its_tenant_within_the_deadline_and_what_may_fit():
    slow = Slow()
    model = replace(MODEL, max_prompt_bytes=700)
    made = RequestBuilder(model, RouterConfig(), slow, StillClock(), Ids(), b"key", lambda tier: [])
    identity = Identity(tenant="acme", tier="")
    await made.make(RequestParams("ab", {}, identity=identity))
    await made.make(RequestParams("ab", {}, truncate_prompt_tokens=5, identity=identity))
    assert slow.asked == [("acme", 700), ("acme", 0)], "what is cut need not fit"
    with pytest.raises(DeadlineExceeded, match="before the prompt was read"):
        await made.make(RequestParams("ab", {}, time_limit_s=0.01))


async def test_a_tier_limits_its_prompts_and_what_fits_is_cut_to_that():
    tiers = Tiers({**default_tiers(), "batch": TierConfig(delay_s=9, max_prompt_tokens=20)})
    made = maker(tiers=tiers)

    async def tokens(size, tier, **fields):
        identity = Identity("acme", tier)
        params = RequestParams([7] * size, {}, identity=identity, **fields)
        return len((await made.make(params)).token_ids)

    assert await tokens(20, "batch") == 20 and await tokens(60, "standard") == 60
    with pytest.raises(PromptTooLong, match="has 21 tokens, tier batch takes at most 20; shorten"):
        await tokens(21, "batch")
    with pytest.raises(PromptTooLong, match="tier batch"):
        await tokens(21, "standard", service_tier="flex")
    assert await tokens(60, "batch", truncate_prompt_tokens=-1) == 20
