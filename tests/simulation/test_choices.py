"""What is computed of requests with several choices,
and what is told of prompts, on virtual time."""

import asyncio

import pytest
from support.events import read_events
from support.virtual import PD, PROMPT, ask, attempt_of, run, unit

from core.config import PlacementConfig
from core.session import Role
from core.types import ChoiceFinished, PromptScored, SamplingParams, TextDelta
from worker.attempt import Attempt

LOCAL = PlacementConfig(path="local")
NUM_TOKENS = 100


def stop_of(choice, position, size=3, **shape):
    """A text of `size` letters that only this choice makes, beginning at a position."""
    sampling = {"n": 2, "max_tokens": NUM_TOKENS, "temperature": 1.0, "ignore_eos": True}
    tokens = run(lambda c: ask(c, **sampling), **shape)[0]
    texts = {c: "".join(chr(32 + t) for t in ids) for c, ids in tokens.items()}
    stop = texts[choice][position : position + size]
    assert texts[choice].index(stop) == position and stop not in texts[1 - choice]
    return stop, texts


async def talk(cluster, stop, cut=False):
    """Ask for two choices of which one meets the stop; returns events and computed positions."""
    sampling = SamplingParams(
        n=2, max_tokens=NUM_TOKENS, temperature=1.0, ignore_eos=True, stop=(stop,)
    )
    events, computed, num_cut = [], {}, 0
    request = cluster.request("r", PROMPT, sampling)

    def emit(event):
        nonlocal num_cut
        events.append(event)
        if cut and isinstance(event, ChoiceFinished) and not num_cut:
            num_cut = cluster.hub.reset("session")  # before the word of it has left

    task = asyncio.get_running_loop().create_task(cluster.orchestrator.run(request, emit))
    while not task.done():
        attempt = attempt_of(unit(cluster, Role.DECODE), "r")
        for choice, log in (attempt.logs if attempt else {}).items():
            computed[choice] = log.base + len(log.tokens)
        await asyncio.sleep(0.004)
    await task
    return events, computed, num_cut


@pytest.mark.parametrize("placement", [LOCAL, PD])
@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("position", [0, 12])
def test_a_choice_that_a_stop_string_ended_is_computed_no_further(placement, is_cut, position):
    stop, texts = stop_of(0, position, placement=placement)
    events, computed, num_cut = run(lambda c: talk(c, stop, is_cut), placement=placement)
    assert (num_cut > 0) == is_cut
    told = read_events(events)
    assert len(told[0]) == position + 3 and len(told[1]) == NUM_TOKENS
    assert "".join(e.text for e in events if isinstance(e, TextDelta) and e.choice == 1) == texts[1]
    assert events[-1].error is None and events[-1].timing.attempts[-1].endswith("ok")
    assert events[-1].usage.completion_tokens == position + 3 + NUM_TOKENS
    assert computed[0] < NUM_TOKENS // 2, "the rest of a stopped choice was computed for nobody"
    assert computed[1] > NUM_TOKENS - 3


def test_a_choice_that_was_over_before_its_kv_arrived_is_neither_computed_nor_kept():
    """Prefill told the first tokens; decode hears of the end while its choices share a sequence."""
    stop, texts = stop_of(0, 0, size=1)

    async def scenario(cluster):
        cluster.hub.extra_delay_s = lambda stream: 0.2 * (stream.kind == "fetch")
        decode = unit(cluster, Role.DECODE)
        talking = asyncio.ensure_future(talk(cluster, stop))
        while not decode.scheduler.running:
            await asyncio.sleep(0.001)
        attempt = attempt_of(decode, "r")
        assert attempt.finished_choices == {0}, "the end was heard of too late"
        running = [s.choices for s in decode.scheduler.running]
        events, computed, _ = await talking
        return running, sorted(attempt.logs), read_events(events), computed

    running, kept, told, computed = run(scenario)
    assert (running, kept) == ([(1,)], [1])
    assert [len(told[choice]) for choice in (0, 1)] == [1, NUM_TOKENS]
    assert list(computed) == [1]


@pytest.mark.parametrize("placement", [LOCAL, PD])
def test_scores_of_a_prompt_come_once_and_whole_though_the_session_is_cut(monkeypatch, placement):
    """Frames are made small here, so that the cut falls between two parts."""
    prompt = tuple(range(1, 91)) + tuple(range(1, 91))
    parts, num_cut, take = [], [], Attempt.take

    async def ask_it(cluster):
        sampling = SamplingParams(max_tokens=5, temperature=0.0, prompt_logprobs=20)
        return await cluster.generate(cluster.request("r", prompt, sampling))

    whole = run(ask_it, placement=placement)

    async def scenario(cluster):
        def taken(attempt, room_bytes):
            part = take(attempt, room_bytes)
            parts.extend(d.prompt_start for d in part.deltas if d.prompt_logprobs)
            if len(parts) == 3 and not num_cut:
                num_cut.append(cluster.hub.reset("session"))
            return part

        monkeypatch.setattr(Attempt, "take", taken)
        return await ask_it(cluster)

    events = run(scenario, placement=placement, max_message_bytes=10 << 10)
    assert num_cut[0] > 0 and len(set(parts)) < len(parts), "nothing was cut between two parts"
    scored = [i for i, e in enumerate(events) if isinstance(e, PromptScored)]
    assert scored == [0] and events[-1].error is None
    assert events[0].logprobs == whole[0].logprobs
    assert [s.token_id for s in events[0].logprobs] == list(prompt[1:])
    assert len(read_events(events)[0]) == 5
    assert events[-1].timing.attempts == (f"0:{placement.path}:ok",)
