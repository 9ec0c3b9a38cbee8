"""Who waits for whom, on the whole cluster above its capacity."""

import asyncio
import statistics

from support.virtual import PROMPT, ask, run, unit

from core.config import EngineConfig
from core.session import Role
from core.types import RequestEnded, SamplingParams, TextDelta
from engine.scheduling.block_supply import MAX_OVERTAKEN

TIGHT = EngineConfig(
    block_size_tokens=4,
    num_blocks=100,
    max_step_tokens=64,
    max_sequences=16,
    cache_prefixes=False,
)


class Watch:
    """One request: when it began and ended, and its longest standstill between two tokens."""

    def __init__(self, loop):
        self.loop = loop
        self.started_s = self.heard_s = loop.time()
        self.ended_s = None
        self.error = None
        self.still = (0.0, 0.0, 0.0)

    def __call__(self, event):
        now_s = self.loop.time()
        if isinstance(event, TextDelta):
            if event.position:
                self.still = max(self.still, (now_s - self.heard_s, self.heard_s, now_s))
            self.heard_s = now_s
        elif isinstance(event, RequestEnded):
            self.ended_s, self.error = now_s, event.error


async def load(cluster, interval_s, for_s):
    """Short answers, and a long one among twelve, a little faster than they can be served."""
    loop = asyncio.get_running_loop()
    watches = []
    async with asyncio.TaskGroup() as tasks:
        for i in range(int(for_s / interval_s)):
            is_long = i % 12 == 0
            prompt = tuple((k * 7 + i) % 90 + 1 for k in range(60 if is_long else 40))
            sampling = SamplingParams(
                max_tokens=200 if is_long else 20, temperature=0.0, ignore_eos=True
            )
            watches.append(Watch(loop))
            tasks.create_task(
                cluster.orchestrator.run(
                    cluster.request(f"r{i}", prompt, sampling, 100.0), watches[-1]
                )
            )
            await asyncio.sleep(interval_s)
    return watches


def test_nobody_stands_still_in_mid_answer_while_many_later_ones_are_served():
    async def scenario(cluster):
        watches = await load(cluster, 0.055, 16.0)
        return watches, unit(cluster, Role.DECODE).scheduler.num_preemptions

    watches, num_preemptions = run(scenario, prefill=2, engine=TIGHT, max_model_len=400)
    assert num_preemptions > 20, "the load was meant to be more than the pool holds"
    assert all(w.error is None for w in watches)
    for watch in watches:
        _, stopped_s, went_on_s = watch.still
        later = [w for w in watches if w.started_s > stopped_s and w.ended_s < went_on_s]
        assert len(later) <= MAX_OVERTAKEN


def test_small_hand_overs_pass_a_giant_that_waits_for_blocks_and_it_is_served():
    async def scenario(cluster):
        loop = asyncio.get_running_loop()
        ends = {}

        async def one(name, prompt, **sampling):
            reply = await ask(cluster, name, prompt, ignore_eos=True, **sampling)
            ends[name] = loop.time()
            return reply[1]

        tasks = [loop.create_task(one("hog", PROMPT, max_tokens=60))]
        await asyncio.sleep(0.3)
        tasks.append(loop.create_task(one("giant", tuple(range(1, 90)) * 4, max_tokens=4)))
        await asyncio.sleep(0.1)
        for i in range(4):
            tasks.append(loop.create_task(one(f"small{i}", (i + 1,) * 20, max_tokens=4)))
        return await asyncio.gather(*tasks), ends

    endings, ends = run(scenario, engine=TIGHT, max_model_len=400, step_s=0.02)
    assert [e.error for e in endings] == [None] * 6
    assert all(e.timing.attempts == ("0:pd:ok",) for e in endings)
    assert max(ends[f"small{i}"] for i in range(4)) < ends["hog"] < ends["giant"]


def test_no_more_answers_run_at_once_than_a_step_has_tokens_for():
    narrow = TIGHT.model_copy(update={"max_step_tokens": 8})

    async def scenario(cluster):
        asks = (ask(cluster, f"r{i}", (i + 1,) * 8, max_tokens=50) for i in range(14))
        tasks = [asyncio.get_running_loop().create_task(coroutine) for coroutine in asks]
        most = 0
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.05)
            most = max(most, len(unit(cluster, Role.DECODE).scheduler.running))
        return most, [task.result()[1].error for task in tasks]

    most, errors = run(scenario, engine=narrow, step_s=0.02)
    assert errors == [None] * 14
    assert most == 7, "one token of a step is a prompt's"


def test_a_stopped_decode_worker_holds_up_no_hand_over_to_a_healthy_one():
    def first_tokens_s(pause_s):
        async def scenario(cluster):
            await asyncio.sleep(0.2)  # until the router has heard of everyone
            node = next(n for n, u in cluster.units.items() if u.descriptor.role is Role.DECODE)
            pause = asyncio.get_running_loop().create_task(cluster.pause(node, pause_s))
            await asyncio.sleep(0.01)
            replies = await asyncio.gather(
                *(ask(cluster, f"r{i}", (i + 1,) * 30, max_tokens=2) for i in range(40))
            )
            await pause
            assert all(ended.error is None for _, ended in replies)
            found = [ended.timing for _, ended in replies if len(ended.timing.attempts) == 1]
            return [a.ttft_s for a in found if a.decode_worker != node]

        return run(scenario, prefill=1, decode=2, engine=TIGHT)

    control, healthy = first_tokens_s(0.001), first_tokens_s(2.0)
    assert len(control) >= len(healthy) >= 10, "some did wait for the stopped one"
    assert statistics.median(healthy) <= 1.2 * statistics.median(control)
