"""A router or a peer that says what cannot be: its own attempt ends, on virtual time."""

import asyncio
from dataclasses import replace

import pytest
from support.virtual import PROMPT, Heard, ask, attempt_of, expected, run, unit

from core.errors import InvalidRequest
from core.session import Role, Submit, Task
from core.types import Logprob, SamplingParams
from kv_transfer import codec, frames

LONG = {"max_tokens": 30, "ignore_eos": True}


@pytest.mark.parametrize(
    ("first_tokens", "why"),
    [
        ({0: Logprob(2**31 - 1, -0.5)}, "first token"),
        ({1: Logprob(5, -0.5)}, "first tokens came for choices [1], not [0]"),
        ({0: Logprob(5, -0.5), 1: Logprob(5, -0.5)}, "came for choices [0, 1], not [0]"),
    ],
)
def test_first_tokens_that_cannot_be_end_the_attempt_and_no_rank(first_tokens, why, caplog):
    async def scenario(cluster):
        spoiled, heard = [], Heard(cluster)

        def lie(stream, message):
            if not isinstance(message, bytes):
                return message
            number, told = codec.decode(message)
            if isinstance(told, frames.Commit) and not spoiled:
                spoiled.append(told)
                return codec.encode(number, replace(told, first_tokens=first_tokens))
            return message

        cluster.hub.tamper = lie
        answer = await ask(cluster, **LONG)
        return answer, len(spoiled), [end for _, end in heard.attempts]

    (tokens, ended), num_spoiled, ends = run(scenario)
    assert num_spoiled == 1 and ended.error is None and tokens == expected(**LONG)
    assert ended.timing.attempts[0] == "0:pd:kv_transfer_failed" and len(ended.timing.attempts) == 2
    [error] = [e.error for e in ends if e.task is Task.DECODE and e.error is not None]
    assert why in error.message
    assert not [r for r in caplog.records if r.levelname == "ERROR"], "it was taken for a bug"


def test_a_submit_that_a_router_spoils_ends_its_request_and_no_other():
    """As a bug, or somebody, in a router may: the clients of the others hear nothing of it."""

    async def scenario(cluster):
        spoiled = []

        def spoil(stream, message):
            if isinstance(message, Submit) and message.request.request_id.startswith("bad~"):
                spoiled.append(message)
                tokens = (*message.request.token_ids[:-1], 2**31)
                return replace(message, request=replace(message.request, token_ids=tokens))
            return message

        cluster.hub.tamper = spoil
        answers = await asyncio.gather(*(ask(cluster, name, **LONG) for name in ("bad", "good")))
        return answers, len(spoiled), [u.is_ready for u in cluster.units.values()]

    ((_, bad), (tokens, good)), num_spoiled, ready = run(scenario)
    assert num_spoiled == 2 and type(bad.error) is InvalidRequest
    assert bad.error.message == "prompt has token id 2147483648, must be from 0 to 96"
    assert good.error is None and tokens == expected(**LONG) and ready == [True, True]
    assert len(good.timing.attempts) == 1


def test_a_transfer_id_that_is_in_use_ends_the_newcomer_alone():
    async def scenario(cluster):
        seen, refused, still = [], {}, {}

        def spy(stream, message):
            if isinstance(message, Submit) and message.task is not Task.LOCAL:
                seen.append(message)
            return message

        cluster.hub.tamper = spy
        running = asyncio.get_running_loop().create_task(ask(cluster, **LONG))
        prefill, decode = unit(cluster, Role.PREFILL), unit(cluster, Role.DECODE)
        while not (attempt_of(prefill, "r") and attempt_of(decode, "r")):
            await asyncio.sleep(0.0001)
        for of, submit in zip((prefill, decode), seen, strict=True):
            request = cluster.request("thief", PROMPT, SamplingParams(max_tokens=4))
            of.attempts.submit("thief", replace(submit, request=request))
            refused[submit.task] = of.attempts.by_run["thief"].ended.error
            of.attempts.cancel("thief", 0)
        answer = await running
        await asyncio.sleep(1.0)
        for of, submit in zip((prefill, decode), seen, strict=True):
            role = of.role
            closing = role._draining if submit.task is Task.PREFILL else role._closing
            closing[submit.transfer_id] = {} if submit.task is Task.PREFILL else []
            request = cluster.request("late", PROMPT, SamplingParams(max_tokens=4))
            of.attempts.submit("thief", replace(submit, request=request))
            still[submit.task] = of.attempts.by_run["late"].ended.error
            of.attempts.cancel("late", 0)
            del closing[submit.transfer_id]
        return answer, refused, still

    (tokens, ended), refused, still = run(scenario)
    for errors in (refused, still):  # under way, and over but still being read or written
        assert set(errors) == {Task.PREFILL, Task.DECODE}
        assert all("names a transfer that is here" in error.message for error in errors.values())
    assert ended.error is None and tokens == expected(**LONG)
    assert len(ended.timing.attempts) == 1
