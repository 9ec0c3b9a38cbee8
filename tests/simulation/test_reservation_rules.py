"""Reservations on a decode worker: who waits, who is refused, and who is next."""

import asyncio

from support.virtual import PROMPT, Heard, ask, run

from core.config import EngineConfig, RouterConfig, TransferConfig
from core.errors import (
    PoolExhausted,
    PromptTooLong,
)
from core.session import Role, Task
from core.types import SamplingParams
from engine.scheduling.queues import MAX_UNANSWERED
from kv_transfer.transitions import Transition


def test_a_full_decode_pool_makes_requests_wait_in_line_and_loses_none():
    async def scenario(cluster):
        return await asyncio.gather(
            *(ask(cluster, f"r{i}", PROMPT[i:], max_tokens=20) for i in range(8))
        )

    tight = EngineConfig(block_size_tokens=4, num_blocks=40, max_step_tokens=64)
    replies = run(scenario, engine=tight, transfer=TransferConfig(reserve_wait_s=60))
    assert all(ended.error is None for _, ended in replies)


def test_a_reservation_that_waits_too_long_is_refused_with_numbers_unless_it_is_next():
    """The head of the line stays: blocks are kept for it.
    Whoever is behind may fare better elsewhere."""

    async def scenario(cluster):
        heard = Heard(cluster)
        hog = asyncio.get_running_loop().create_task(
            ask(cluster, "hog", PROMPT, max_tokens=40, ignore_eos=True)
        )
        await asyncio.sleep(0.5)
        head = asyncio.get_running_loop().create_task(
            ask(cluster, "head", tuple(range(90, 10, -1)), max_tokens=5)
        )
        await asyncio.sleep(0.1)
        _, behind = await ask(cluster, "behind", tuple(range(80, 10, -1)), max_tokens=5)
        await hog
        return heard.retries, [end for _, end in heard.attempts], behind, (await head)[1]

    refused, ended, behind, head = run(
        scenario,
        engine=EngineConfig(block_size_tokens=4, num_blocks=30, max_step_tokens=64),
        transfer=TransferConfig(reserve_wait_s=0.05),
        step_s=0.05,
    )
    assert head.error is None and head.timing.attempts == ("0:pd:ok",)
    assert behind.error is None, "a full worker is no fault, however often it refuses"
    codes = [attempt.partition(":pd:")[2] for attempt in behind.timing.attempts]
    assert codes == ["pool_exhausted"] * len(refused) + ["ok"]
    assert len(refused) > RouterConfig().max_fault_attempts and all(
        isinstance(error, PoolExhausted) for error in refused
    )
    assert "no 18 free blocks within 0.05 s" in refused[0].message
    refusals = [e.error for e in ended if e.task is Task.DECODE and e.error is not None]
    assert len(refusals) == len(refused), "who refuses ends its own part at once"
    assert all(e.message.startswith("no 18 free blocks within 0.05 s") for e in refusals)


def test_what_can_never_fit_is_refused_by_the_worker_too():
    async def scenario(cluster):
        return await ask(cluster, prompt=PROMPT, max_tokens=120)

    tokens, ended = run(
        scenario, engine=EngineConfig(block_size_tokens=4, num_blocks=20, max_step_tokens=64)
    )
    assert isinstance(ended.error, PromptTooLong) and "pool holds 20" in ended.error.message
    assert tokens == {}


def test_more_prompts_at_once_than_may_be_announced_all_find_their_partners():
    """A roomy pool must not start a prompt whose partner was never told of it:
    it would be held for ever."""

    async def scenario(cluster):
        return await asyncio.gather(
            *(ask(cluster, name=f"r{i}", max_tokens=3) for i in range(3 * MAX_UNANSWERED))
        )

    roomy = EngineConfig(
        block_size_tokens=4, num_blocks=2000, max_step_tokens=2000, max_sequences=64
    )
    replies = run(scenario, engine=roomy)
    assert len(replies) == 24 and all(
        ended.error is None and ended.timing.path == "pd" for _, ended in replies
    )


def test_a_place_that_comes_free_in_the_midst_of_a_long_step_is_the_next_reservations():
    async def scenario(cluster):
        loop = asyncio.get_running_loop()
        node, decode = next(
            (n, u) for n, u in cluster.units.items() if u.descriptor.role is Role.DECODE
        )
        hog = loop.create_task(ask(cluster, "hog", max_tokens=60, ignore_eos=True))
        sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
        leaver = cluster.routers[0].open(
            cluster.request("leaver", tuple(range(60, 80)), sampling), asyncio.Event()
        )
        while len(decode.scheduler.running) < 2:
            await asyncio.sleep(0.01)
        waiting = loop.create_task(ask(cluster, "waiting", tuple(range(20, 40)), max_tokens=2))
        while not decode.scheduler.waiting.num_reservations:
            await asyncio.sleep(0.01)
        cluster.runners[node].slow_for_s = 2.0
        while not cluster.runners[node].num_bitten:
            await asyncio.sleep(0.01)
        num_steps = cluster.num_steps
        _, receive_agent = decode.transfers.agents
        num_arrived = receive_agent.transitions[Transition.RECEIVER_ARRIVED]
        await leaver.close()
        while decode.scheduler.waiting.num_reservations:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        num_arrived = receive_agent.transitions[Transition.RECEIVER_ARRIVED] - num_arrived
        num_decode_steps = cluster.num_steps - num_steps
        return num_decode_steps, num_arrived, (await hog)[1], (await waiting)[1]

    few = EngineConfig(block_size_tokens=4, num_blocks=200, max_step_tokens=64, max_sequences=2)
    num_steps, num_arrived, *endings = run(scenario, engine=few)
    assert num_steps == 0 and all(ended.error is None for ended in endings)
    assert num_arrived == 1, "who sends was told in the same step"
