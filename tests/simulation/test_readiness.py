"""Whether a router says that it is ready, on virtual time: only while requests can get through."""

import asyncio

import pytest
from support.virtual import PD, run

from core.clocks import LoopClock
from core.config import PlacementConfig, RouterConfig
from core.ids import Ids
from core.session import Role
from router.observe.canary import Canary
from router.observe.readiness import Proof
from router.request_params import ServedModel
from simulation.shape import VOCABULARY

MODEL = ServedModel("hash", VOCABULARY, 200, (), "float32")


async def watch(cluster, lost, *, must_cross):
    """Let a canary run, then take workers away and bring new ones;
    returns what it said and when."""
    told = []

    proof = Proof(cluster.sessions.live_roles, frozenset(Role), must_cross=must_cross)
    canary = Canary(
        MODEL, RouterConfig(), cluster.orchestrator, cluster.sessions, LoopClock(), Ids(), proof
    )

    async def follow():
        while True:
            await proof.checked.wait()
            told.append(proof.is_good)

    following = asyncio.create_task(follow())
    canary.start()
    await asyncio.sleep(5.0)
    states = [(proof.is_good, proof.error)]
    for role in lost:
        nodes = [n for n, u in cluster.units.items() if u.descriptor.role is role]
        for node in nodes:
            await cluster.kill(node)
    await asyncio.sleep(8.0)
    states.append((proof.is_good, proof.error))
    told_then = told[-1]
    for role in lost:
        await cluster.add(role)
    await asyncio.sleep(8.0)
    states.append((proof.is_good, proof.error))
    await canary.stop()
    following.cancel()
    return states, (told[0], told_then, told[-1])


@pytest.mark.parametrize("role", list(Role))
def test_a_path_that_needs_both_pools_is_not_ready_while_one_is_empty(role):
    states, told = run(lambda c: watch(c, [role], must_cross=True), placement=PD)
    gone = f"no {role.value} worker is live"
    assert states == [(True, ""), (False, gone), (True, "")]
    assert told == (True, False, True)


def test_a_path_that_one_worker_can_serve_alone_is_ready_while_there_is_one():
    auto = PlacementConfig(path="auto", local_below_tokens=0)
    one_gone, _ = run(lambda c: watch(c, [Role.DECODE], must_cross=False), placement=auto)
    assert [is_good for is_good, _ in one_gone] == [True, True, True]
    all_gone, told = run(lambda c: watch(c, list(Role), must_cross=False), placement=auto)
    why = "no decode and no prefill worker is live"
    assert all_gone == [(True, ""), (False, why), (True, "")] and told == (True, False, True)
