"""What is refused at borders that real clients seldom touch."""

import asyncio
import math
from types import SimpleNamespace

import pytest
from support.models import TINY

from core.config import load_config
from core.errors import (
    ConfigError,
    InvalidRequest,
    PoolExhausted,
    Unavailable,
    WorkerLost,
)
from core.session import TokenDelta
from core.types import FinishReason, Path, SamplingParams
from protos.baton.v1 import generation_pb2 as pb
from router.choice_output import ChoiceOutput
from router.grpc.requests import chat_prompt, generate_params
from router.observe.recorder import Recorder
from router.observe.why import Explanations
from router.request_state import AttemptState, RequestState
from router.service import MAX_DETOKENIZE_TOKENS, GenerationService
from router.text.detokenizing import TextModel
from router.text.tokenizing import TokenizerPool

ALLOWED = ("enable_thinking",)


def test_a_group_that_is_given_as_a_value_is_named():
    with pytest.raises(ConfigError, match="router"):
        load_config(None, {}, {"BATON_ROUTER": "3", "BATON_ROUTER__HTTP_PORT": "1"})


def test_files_that_are_empty_lists_or_not_text(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("")
    assert load_config(path, {}, {}) == load_config(None, {}, {})
    for content, words in ((b"[1]", "list"), (b"\xff\xfe\x00", "read"), (b"a: [", "YAML")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            load_config(path, {}, {})


def test_grpc_requests_without_what_they_need():
    with pytest.raises(InvalidRequest, match="input is missing"):
        generate_params(pb.GenerateRequest(), None)
    talk = [pb.ChatMessage(role="user", content="x", name="me")]
    with pytest.raises(InvalidRequest, match="messages is empty"):
        chat_prompt([], pb.ChatOptions(), ALLOWED, False)
    both = pb.ChatOptions(continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(InvalidRequest, match="exclude each other"):
        chat_prompt(talk, both, ALLOWED, False)
    assert chat_prompt(talk, pb.ChatOptions(), ALLOWED, False).messages == [
        {"role": "user", "content": "x", "name": "me"}
    ]
    odd = pb.ChatOptions()
    for number in (math.nan, math.inf):
        odd.template_kwargs.fields[ALLOWED[0]].number_value = number
        with pytest.raises(InvalidRequest, match="template_kwargs is no JSON"):
            chat_prompt(talk, odd, ALLOWED, False)
    odd.template_kwargs.Clear()
    odd.template_kwargs.update({"evil": 1})
    with pytest.raises(InvalidRequest, match="evil"):
        chat_prompt(talk, odd, ALLOWED, False)


def choice(**sampling):
    return ChoiceOutput(0, SamplingParams(**sampling), TextModel(TINY).decoder((97,)))


def delta(position, text, finish=None):
    return TokenDelta("r", 0, 0, position, tuple(text.encode()), finish=finish)


def test_a_choice_that_is_over_takes_nothing_and_an_end_alone_releases_what_was_held():
    held = choice(stop=("xyz",))
    assert [e.text for e in held.accept(delta(0, "axy"))] == ["a"]
    last = held.accept(TokenDelta("r", 0, 0, 3, (), finish=FinishReason.LENGTH))
    assert (
        last[0].text == "xy"
        and last[1].reason is FinishReason.LENGTH
        and held.accept(delta(3, "b")) == []
    )
    empty = choice()
    assert empty.accept(TokenDelta("r", 0, 0, 0, ())) == []
    split = choice(stop=("\ufffd",))
    split.accept(TokenDelta("r", 0, 0, 0, (0xE6,)))
    assert (
        split.accept(TokenDelta("r", 0, 0, 1, (), finish=FinishReason.LENGTH))[-1].stop_match
        == "\ufffd"
    )


async def test_too_many_tokens_to_turn_into_text():
    service = GenerationService.__new__(GenerationService)
    service._builder = SimpleNamespace(check_model=lambda name: None)
    with pytest.raises(InvalidRequest, match=f"limit is {MAX_DETOKENIZE_TOKENS}"):
        await service.detokenize("", [0] * (MAX_DETOKENIZE_TOKENS + 1))


async def test_a_tokenizer_process_that_died_is_replaced():
    pool = TokenizerPool(TINY, 5.0)
    try:
        assert await pool.encode("a") == [97]
        process = pool._children._children[0]._process
        process.kill()
        await process.wait()
        assert await pool.encode("a") == [97]
    finally:
        await pool.stop()
    broken = TokenizerPool(TINY.parent / "nowhere", 5.0)
    with pytest.raises(Unavailable, match="ended before it was ready"):
        await broken.encode("a")


async def test_an_attempt_fails_once_and_on_what_it_cannot_deliver():
    def deliver(message, *, is_decode):
        raise WorkerLost("positions are missing")

    pair = SimpleNamespace(decode=SimpleNamespace(worker_id="d"), path=Path.PD)
    request = SimpleNamespace(sampling=SamplingParams())
    run = SimpleNamespace(
        deliver=deliver, excluded=set(), request=request, has_prompt_scores=False,
        finished_choices=(),
    )  # fmt: skip
    attempt = AttemptState(
        run,
        0,
        pair,
        asyncio.get_running_loop().create_future(),
        0.0,
        lambda _: None,
        lambda _: None,
    )
    attempt.on_delta("d", delta(5, "x"))
    with pytest.raises(WorkerLost, match="missing"):
        attempt.finished.result()
    attempt.fail(Unavailable("too late"))
    attempt.on_delta("d", delta(6, "x"))
    with pytest.raises(WorkerLost):
        attempt.finished.result()


@pytest.mark.parametrize(
    ("prompt_logprobs", "expected"), [(None, ["d1", "p1", "d2"]), (0, ["p1", "d1", "d2"])]
)
async def test_decode_does_not_overtake_the_scores_of_the_prompt(prompt_logprobs, expected):
    """Its announcement of the first token may come before the prefill worker's,
    which alone has the scores."""
    told = []
    said = {"d1": delta(0, "a"), "p1": delta(0, "a"), "d2": delta(1, "b")}
    pair = SimpleNamespace(
        prefill=SimpleNamespace(worker_id="p"), decode=SimpleNamespace(worker_id="d"), path=Path.PD
    )
    run = SimpleNamespace(
        deliver=lambda message, *, is_decode: told.append(
            next(name for name, one in said.items() if one is message)
        ),
        excluded=set(), is_whole=False, has_prompt_scores=False, finished_choices=(),
        request=SimpleNamespace(sampling=SamplingParams(prompt_logprobs=prompt_logprobs)),
    )  # fmt: skip
    attempt = AttemptState(
        run,
        0,
        pair,
        asyncio.get_running_loop().create_future(),
        0.0,
        lambda _: None,
        lambda _: None,
    )
    for worker_id, message in (("d", "d1"), ("p", "p1"), ("d", "d2")):
        attempt.on_delta(worker_id, said[message])
    assert told == expected and attempt.decode_spoke
    # The prefill worker is lost before it spoke: the attempt fails, and the next one computes the
    # scores.
    alone = AttemptState(
        run,
        1,
        pair,
        asyncio.get_running_loop().create_future(),
        0.0,
        lambda _: None,
        lambda _: None,
    )
    alone.on_delta("d", said["d1"])
    alone.on_lost("p", WorkerLost("gone"))
    assert alone.finished.done() == (prompt_logprobs is not None)
    assert prompt_logprobs is None or isinstance(alone.finished.exception(), WorkerLost)


@pytest.mark.parametrize("reporter", ["p", "d"])
async def test_want_of_room_is_decodes_whoever_reports_it(reporter):
    """The next attempt avoids the full worker, not the prefill worker that was refused."""
    pair = SimpleNamespace(
        prefill=SimpleNamespace(worker_id="p"), decode=SimpleNamespace(worker_id="d"), path=Path.PD
    )
    run = SimpleNamespace(excluded=set(), note_timings=lambda timings: None)
    attempt = AttemptState(
        run,
        0,
        pair,
        asyncio.get_running_loop().create_future(),
        0.0,
        lambda _: None,
        lambda _: None,
    )
    attempt.on_ended(
        reporter, SimpleNamespace(timings=None, error=PoolExhausted("no 20 free blocks"))
    )
    assert isinstance(attempt.finished.exception(), PoolExhausted) and run.excluded == {"d"}


@pytest.mark.parametrize(("order", "exposed_s"), [("pd", 1.0), ("dpd", 0.0)])
def test_nothing_is_exposed_when_decode_speaks_first(order, exposed_s):
    """Each word comes a second after the one before;
    without this rule a whole decode step would be counted."""
    now_s = iter(range(10))
    run = RequestState.__new__(RequestState)
    run.clock, run.choices = (
        SimpleNamespace(now_s=lambda: float(next(now_s))),
        [SimpleNamespace(accept=lambda _: ())],
    )
    run.prefill_spoke_at, run.exposed_transfer_s, run.has_prompt_scores = None, 0.0, False
    run.current = SimpleNamespace(decode_spoke=False)
    for who in order:
        run.deliver(delta(0, "x"), is_decode=who == "d")
        run.current.decode_spoke = run.current.decode_spoke or who == "d"
    assert run.exposed_transfer_s == exposed_s


def test_without_a_request_log_requests_are_still_counted():
    seen = []
    telemetry = SimpleNamespace(request_ended=lambda run, ended, door: seen.append(run))
    recorder = Recorder(telemetry, shedding=None, explanations=Explanations(), log=None)
    for tier in ("standard", "canary"):
        request = SimpleNamespace(tier=tier, request_id=tier)
        recorder.request_ended(SimpleNamespace(request=request, placement=None), None)
    assert len(seen) == 1
