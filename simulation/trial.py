"""One seed: a load, a fault schedule, and the invariants of reliability checked while it runs.

Owns the course of a trial. Does not know how loads are drawn, how faults are carried out, nor what
is checked: `loads`, `faults`, `clients`, `invariants`, `fairness` and the other modules of
invariants do.

    I1 tokens, text and scores equal the reference    I2 positions without gap or repeat, one ending
    I3 blocks and requests are conserved              I4, I5 follow from I1: any cross-talk shows
    I6 queues stay under their bounds                 I7 an error is justified by the faults met
    I8 nobody who moves is taken for dead             I9 no message is over its transport's limit
    L1 every request ends by its deadline             L2 after the last fault, service is whole
    L3 at rest nothing is left                        L4 a ready worker is used
    F1 to F4 bounded overtaking at every worker       X1 no exception is left that nobody caught
    C1 to C4 cached prefixes, and what routers know   Q1 to Q4 quotas of keys
    P1 pools of a tier's own stay its own             H1 enough faults bit
"""

from __future__ import annotations

import asyncio
import contextlib
import random

from simulation.clients import SimClient
from simulation.cluster import SimCluster
from simulation.fairness import Fairness
from simulation.faults.injector import Injector
from simulation.faults.kinds import Kind
from simulation.invariants import Watch, check_recovery, check_rest
from simulation.loop import run_virtual
from simulation.oracle import Oracle
from simulation.plan import PlannedRequest, TrialPlan
from simulation.pool_invariants import PoolWatch
from simulation.prefix_invariants import PrefixWatch
from simulation.quota_invariants import QuotaWatch
from simulation.report import Report
from simulation.shape import VOCABULARY
from simulation.traps import Place

MIN_BITTEN = 5


def run_trial(plan: TrialPlan) -> Report:
    """Run one plan and check everything."""
    return run_virtual(_trial(plan))


async def _trial(plan: TrialPlan) -> Report:
    report = Report(style=plan.style.value, requests=len(plan.requests))
    cluster = SimCluster(plan.shape, plan.seed)
    await cluster.start()
    injector = Injector(cluster, plan.faults, random.Random(plan.seed + 7))
    clients: list[SimClient] = []

    async def one(index: int, planned: PlannedRequest) -> None:
        await asyncio.sleep(planned.start_s)
        client = SimClient(cluster, plan, planned, index, report)
        clients.append(client)
        await client.run()

    quotas = QuotaWatch(cluster, report)
    looks = [Fairness(cluster, report).look, PrefixWatch(cluster, report).look, quotas.look]
    PoolWatch(cluster, report)
    watch = Watch(cluster, report, looks)
    watching = asyncio.get_running_loop().create_task(watch.run())
    async with asyncio.TaskGroup() as tasks:
        for index, planned in enumerate(plan.requests):
            tasks.create_task(one(index, planned))
        tasks.create_task(injector.run())
    # With the watch still on: recovery must keep the promises, too.
    await check_recovery(cluster, injector.injection.store_back_at, report)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching  # a watch that broke has watched nothing: that is no clean trial
    await check_rest(cluster, report)
    await quotas.check_rest()
    oracle = Oracle(cluster.layout, VOCABULARY, plan.shape.max_model_len + 70)
    for client in clients:
        client.compare(oracle)
    _count(cluster, injector, report)
    if plan.faults and report.bitten.total() < min(MIN_BITTEN, len(plan.faults)):
        report.violated(f"H1 only {report.bitten.total()} faults bit")
    await cluster.stop()  # after the checks: stopping cleans up what they look for
    return report


def _count(cluster: SimCluster, injector: Injector, report: Report) -> None:
    report.bitten.update(injector.injection.bitten)
    report.bitten[Kind.DECODER_RAISES] += cluster.traps.sprung[Place.DECODER]
    report.bitten[Kind.EMIT_RAISES] += cluster.traps.sprung[Place.EMIT]
    report.steps = cluster.num_steps
    report.virtual_s = cluster.clock.now_s()
    report.preemptions = cluster.num_preemptions
    report.transitions.update(cluster.transitions)
