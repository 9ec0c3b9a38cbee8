"""The loads of `baton bench router`: how many requests, when, and with which prompts."""

import itertools
import os.path

import pytest

from bench.router.plan import RouterLoad, RouterPlan


def some_prompts(load, count):
    return list(itertools.islice(load.prompts(), count))


def test_the_loads_follow_from_the_plan():
    plan = RouterPlan(
        rate=50,
        seconds=4,
        streams=9,
        overload=3,
        max_concurrent=5,
        output_tokens=8,
        first_token_ms=20,
        token_ms=10,
    )
    assert plan.answer_s == pytest.approx(0.1) and plan.capacity_per_s == pytest.approx(50)
    first_token, streams, overload = (
        plan.first_token_load(),
        plan.stream_load(),
        plan.overload_load(),
    )
    assert (first_token.requests, first_token.rate) == (200, 50)
    assert (streams.requests, streams.rate, streams.output_tokens) == (9, 0, 400)
    assert (overload.requests, overload.rate) == (600, pytest.approx(150))
    longest = max(load.prompt_tokens + load.output_tokens for load in (first_token, streams))
    assert plan.max_model_len == longest


def test_prompts_have_their_length_share_a_beginning_within_a_group_and_never_repeat():
    load = RouterLoad(100, prompt_tokens=101, output_tokens=4, shared_tokens=41, groups=3)
    prompts = some_prompts(load, 100)
    assert {len(prompt) for prompt in prompts} == {101}
    assert len(set(prompts)) == 100
    assert len({prompt[:41] for prompt in prompts}) == 3
    in_common = {len(os.path.commonprefix(pair)) for pair in itertools.pairwise(prompts)}
    assert max(in_common) < 60, "what follows the beginning is a prompt's own"
    assert some_prompts(load, 5) == prompts[:5], "every run offers the same"


def test_clients_share_a_load_and_send_nothing_twice():
    load = RouterLoad(10, prompt_tokens=50, output_tokens=4, rate=20, shared_tokens=20, seed=3)
    shares = load.split(3)
    assert [share.requests for share in shares] == [4, 3, 3]
    assert sum(share.rate for share in shares) == pytest.approx(20)
    due = [planned for share in shares for planned in share.requests_due()]
    assert [planned.index for planned in due] == list(range(10))
    assert len({planned.due_s for planned in due if planned.due_s}) == 7, "no two keep time"
    prompts = [prompt for share in shares for prompt in some_prompts(share, share.requests)]
    assert len(set(prompts)) == 10
    beginnings = {prompt[:20] for prompt in some_prompts(load, 99)}
    assert {prompt[:20] for prompt in prompts} <= beginnings, "groups are the same for all"
    assert len(RouterLoad(2, 8, 4).split(5)) == 2, "a client without a request is not started"
    assert all(planned.due_s is None for planned in RouterLoad(2, 8, 4).requests_due())
