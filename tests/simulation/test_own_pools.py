"""Pools of a tier of its own, on the whole cluster: who runs there, and what follows a death."""

import asyncio
from dataclasses import replace

import pytest
from support.events import read_events
from support.virtual import PROMPT, expected, run

from core.config import PlacementConfig, TierConfig
from core.session import Role
from core.types import RequestEnded, SamplingParams, TextDelta
from simulation.loads import make_plan
from simulation.pool_invariants import PoolWatch
from simulation.report import Report
from simulation.trial import run_trial
from worker.attempt import Attempt

SAMPLING = SamplingParams(max_tokens=12, temperature=0.0)
OWN = {"decode": {"replicas": 1}}
AUTO = PlacementConfig(path="auto", local_below_tokens=1)


def tiers(**more):
    return {
        "standard": TierConfig(),
        "batch": TierConfig.model_validate({"pools": OWN, **more}),
    }


async def ask(cluster, name, tier, on_token=lambda: None):
    """Run one request; returns its events, and where it ran at last."""
    events = []

    def emit(event):
        events.append(event)
        if isinstance(event, TextDelta):
            on_token()

    request = cluster.request(name, PROMPT, SAMPLING, tier=tier)
    await cluster.orchestrator.run(request, emit)
    assert isinstance(events[-1], RequestEnded) and events[-1].error is None, events[-1]
    return events, events[-1].timing.why["decision"]


def own_workers(cluster):
    return [node for node, unit in cluster.units.items() if unit.descriptor.tier == "batch"]


def test_a_tier_runs_in_its_own_pool_and_nobody_else_does():
    async def scenario(cluster):
        watch = Report()
        PoolWatch(cluster, watch)
        (own,) = own_workers(cluster)
        found = await asyncio.gather(
            *(ask(cluster, f"{tier}{i}", tier) for tier in tiers() for i in range(6))
        )
        assert watch.violations == [] and watch.spills == 0
        return own, [decision["decode_worker"] for _, decision in found]

    own, workers = run(scenario, tiers=tiers(), placement=AUTO)
    assert workers == 6 * ["decode2"] + 6 * [own]


async def lose_its_worker(cluster, spares):
    """Kill the own worker once a request has its first token; `spares` come later."""
    (own,) = own_workers(cluster)
    tasks = []

    def kill():
        if not tasks:
            tasks.append(asyncio.ensure_future(die()))

    async def die():
        cluster.membership.starting += spares
        await cluster.kill(own)
        for _ in range(spares):
            await asyncio.sleep(2.0)
            await cluster.add(Role.DECODE, "batch")
            cluster.membership.starting -= 1

    events, decision = await ask(cluster, "r", "batch", kill)
    await tasks[0]
    return read_events(events), decision, len(events[-1].timing.attempts)


@pytest.mark.parametrize("number", [0, 1])
def test_a_request_whose_own_worker_dies_goes_on_at_those_to_whom_its_tier_spills(number):
    spill_to = [["shared"], ["standard"]][number]
    tokens, decision, num_attempts = run(
        lambda cluster: lose_its_worker(cluster, 0), tiers=tiers(spill_to=spill_to), placement=AUTO
    )
    assert num_attempts == 2 and decision["decode_worker"] == "decode2"
    assert "spilled from batch to shared: no worker of batch can take it" in decision["reason"]
    assert tokens == expected(), "and not a token is lost, repeated or changed"


def test_a_request_that_may_not_spill_waits_for_its_own_pool():
    # The shared prefill pool would decode for those who have nobody else: on path pd it may not.
    tokens, decision, num_attempts = run(lambda cluster: lose_its_worker(cluster, 1), tiers=tiers())
    assert num_attempts == 2 and decision["decode_worker"] == "decode-batch4"
    assert tokens == expected()


def planned(seed):
    plan = make_plan(seed)
    return any(t.pools.decode or t.pools.prefill for t in plan.shape.tiers.values())


OWNING = [seed for seed in range(60) if planned(seed)]


def test_a_share_of_the_trials_has_pools_of_a_tiers_own():
    assert 8 < len(OWNING) < 40


def test_the_search_sees_who_runs_in_a_pool_of_others(monkeypatch):
    """P1: tiers change their names on the way to the workers, and one trial is enough."""
    submit = Attempt.__init__

    def renamed(self, *args, **more):
        submit(self, *args, **more)
        wrong = {"batch": "standard", "standard": "interactive", "interactive": "standard"}
        tier = self.submit.request.tier
        request = replace(self.submit.request, tier=wrong.get(tier, tier))
        self.submit = replace(self.submit, request=request)

    monkeypatch.setattr(Attempt, "__init__", renamed)
    violations = [v for seed in OWNING[:4] for v in run_trial(make_plan(seed)).violations]
    assert any(v.startswith("P1 ") and "ran in a pool of others" in v for v in violations)
