"""Tenants of one tier on the whole cluster: a flood of one beside a request of another."""

import asyncio
from dataclasses import replace

import pytest
from support.virtual import run

from core.config import EngineConfig, RouterConfig
from core.scopes import scope_of
from core.types import CANARY_TIER, RequestEnded, SamplingParams, TextDelta

NUM_AT_ONCE = 8
NUM_MANY = 60
LONG_TOKENS = 200
FLOOD_S = 2.0
SOON_S = 1.0
"""A flood's first answer ends much later."""
ENGINE = EngineConfig(
    block_size_tokens=4, num_blocks=400, max_step_tokens=64, max_sequences=NUM_AT_ONCE
)


def request_of(cluster, tenant, name, num_output_tokens, tier="interactive"):
    prompt = tuple((sum(map(ord, name)) + i * 13) % 90 + 1 for i in range(20))
    sampling = SamplingParams(max_tokens=num_output_tokens, temperature=0.0, ignore_eos=True)
    scope = scope_of(tenant, "") if tenant else ""
    request = cluster.request(name, prompt, sampling, 900.0, scope=scope, tier=tier)
    return replace(request, tenant=tenant)


class Flood:
    """One tenant's long answers, more than can run; notes when each ends."""

    def __init__(self, cluster, *, reads=True):
        self.cluster, self.ended, self.errors = cluster, 0, []
        self.reads, self.tokens, self.tasks = reads, {}, []

    async def begin(self):
        for number in range(NUM_MANY):
            one = request_of(self.cluster, "a", f"many{number}", LONG_TOKENS)
            self.tasks.append(asyncio.create_task(self._serve(one)))
        await asyncio.sleep(FLOOD_S)
        assert not self.ended, "every place is taken for longer"

    async def _serve(self, request):
        def emit(event):
            if isinstance(event, TextDelta):
                self.tokens.setdefault(request.request_id, []).extend(event.token_ids)
                if self.reads:
                    self.cluster.orchestrator.consumed(request.run_key, event.position + 1)
            if isinstance(event, RequestEnded):
                self.ended += 1
                self.errors += [event.error] if event.error else []

        await self.cluster.orchestrator.run(request, emit)

    async def end(self):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def served_s(cluster, request):
    """Seconds until a request is served to its end."""
    ended, since_s = [], cluster.clock.now_s()

    def emit(event):
        if isinstance(event, RequestEnded):
            ended.append(event.error)

    await cluster.orchestrator.run(request, emit)
    assert ended == [None]
    return cluster.clock.now_s() - since_s


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "reads nothing"])
@pytest.mark.parametrize("max_running", [16, 256])
def test_a_tenants_flood_of_long_answers_keeps_no_other_waiting(max_running, reads):
    async def scenario(cluster):
        flood = Flood(cluster, reads=reads)
        await flood.begin()
        waits_s = [
            await served_s(cluster, request_of(cluster, "b", f"chat{n}", 8)) for n in range(5)
        ]
        await flood.end()
        return waits_s

    router = RouterConfig(max_running=max_running, credit_positions=150)
    waits_s = run(scenario, engine=ENGINE, router=router, max_model_len=400)
    assert max(waits_s) < SOON_S, waits_s


def test_a_router_stays_ready_beside_a_flood():
    async def scenario(cluster):
        flood = Flood(cluster)
        await flood.begin()
        canary = request_of(cluster, "", "canary", 4, CANARY_TIER)
        wait_s = await served_s(cluster, canary)
        await flood.end()
        return wait_s

    assert run(scenario, engine=ENGINE, max_model_len=400) < SOON_S


def test_what_yielded_to_others_ends_token_for_token():
    async def scenario(cluster, num_chats):
        flood = Flood(cluster)
        await flood.begin()
        for number in range(num_chats):
            await served_s(cluster, request_of(cluster, "b", f"chat{number}", 8))
        await asyncio.gather(*flood.tasks)
        num_preemptions = sum(unit.scheduler.num_preemptions for unit in cluster.units.values())
        return flood.tokens, flood.errors, num_preemptions

    sizes = {"engine": ENGINE, "max_model_len": 400}
    alone, _, _ = run(lambda cluster: scenario(cluster, 0), **sizes)
    beside, errors, num_preemptions = run(lambda cluster: scenario(cluster, 5), **sizes)
    assert not errors and num_preemptions, "somebody yielded"
    assert beside == alone and len(alone) == NUM_MANY
