"""Tiers on the whole cluster: a chat beside a batch job, from the permit to the last token."""

import asyncio

import pytest
from support.virtual import run

from core.config import EngineConfig, RouterConfig
from core.types import RequestEnded, SamplingParams, TextDelta

NUM_BATCH = 100
NUM_AT_ONCE = 8
ENGINE = EngineConfig(
    block_size_tokens=4, num_blocks=200, max_step_tokens=64, max_sequences=NUM_AT_ONCE
)


async def serve(cluster, name, num_tokens, tier, heard):
    """Run one request; who gets its first token and who ends is noted in order."""
    prompt = tuple((len(name) * 7 + i * 13 + hash_of(name)) % 90 + 1 for i in range(num_tokens))
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)

    def emit(event):
        if isinstance(event, TextDelta) and event.position == 0:
            heard.append(("first", name))
        if isinstance(event, RequestEnded):
            heard.append(("end" if event.error is None else "error", name))

    request = cluster.request(name, prompt, sampling, 300.0, tier=tier)
    await cluster.orchestrator.run(request, emit)


def hash_of(name):
    return sum(map(ord, name))


@pytest.mark.parametrize("max_running", [16, 256])
def test_a_chat_beside_a_hundred_long_batch_prompts_is_served_before_them(max_running):
    async def scenario(cluster):
        heard = []
        async with asyncio.TaskGroup() as tasks:
            for number in range(NUM_BATCH):
                tasks.create_task(serve(cluster, f"batch{number}", 160, "batch", heard))
            while sum(what == "end" for what, _ in heard) < 10:
                await asyncio.sleep(0.01)
            num_before = len(heard)
            await serve(cluster, "chat", 60, "interactive", heard)
            at = heard.index(("first", "chat"))
        return heard, heard[num_before:at], heard[at : heard.index(("end", "chat"))]

    router = RouterConfig(max_running=max_running)
    heard, until_first, until_end = run(scenario, engine=ENGINE, router=router, max_model_len=400)
    assert sum(what == "end" for what, _ in heard) == NUM_BATCH + 1, "and nobody is lost"
    # Those that were in hand go on; the ninety that waited do not go before it.
    firsts = [name for what, name in until_first if what == "first"]
    assert len(firsts) <= 2 and len(until_first) + len(until_end) <= 2 * NUM_AT_ONCE


def test_batch_work_ends_though_chats_never_pause():
    """Ageing: who has waited the delay of its tier stands level with newcomers."""

    async def scenario(cluster):
        heard = []
        batch = asyncio.ensure_future(serve(cluster, "batch", 160, "batch", heard))
        chats = []
        while not batch.done():
            name = f"chat{len(chats)}"
            chats.append(asyncio.ensure_future(serve(cluster, name, 120, "interactive", heard)))
            await asyncio.sleep(0.08)
            assert len(chats) < 4000, "it starves"
        await asyncio.gather(batch, *chats)
        return heard

    router = RouterConfig(max_running=4, max_queued=4000, queue_wait_s=300.0, deadline_s=300.0)
    engine = ENGINE.model_copy(update={"max_sequences": 2})
    heard = run(scenario, engine=engine, router=router, max_model_len=400)
    assert ("end", "batch") in heard
