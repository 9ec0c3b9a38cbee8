"""What an operator is told while a cluster falls apart and heals, and what `/ready` says."""

import asyncio
import logging

import pytest
from support.virtual import ask, run, unit

from core import events
from core.config import PlacementConfig
from core.ports import StoreFailed
from core.session import PoolId, Role
from prefix_index.mirror import FAILURES_TO_BREAK, MembershipMirror
from router.observe.readiness import ClusterView, pools_of, state_of

AUTO = PlacementConfig(path="auto", local_below_tokens=0)
BOTH = {PoolId(Role.PREFILL): 1, PoolId(Role.DECODE): 1}


@pytest.fixture
def told(caplog):
    """Events so far: names, and fields by name."""
    caplog.set_level(logging.INFO, events.LOGGER.name)

    def read(*names):
        found = [(r.event, r.fields) for r in caplog.records if hasattr(r, "event")]
        return [(name, fields) for name, fields in found if not names or name in names]

    return read


def names(found):
    return [name for name, _ in found]


def problems(cluster, store="ok", configured=BOTH, **changes):
    """What `/ready` would say: the state, and the codes of all problems."""
    view = ClusterView(
        workers=cluster.sessions.views(),
        configured=configured,
        store=store,
        **{"is_draining": False, "is_starting": False, "canary_error": "", **changes},
    )
    found = view.problems()
    is_ready = not changes
    return state_of(found, is_ready=is_ready), [problem.code for problem in found]


def test_a_worker_that_dies_is_told_of_with_pid_and_reason_and_a_new_one_joins(told):
    async def scenario(cluster):
        await ask(cluster, "warm")
        assert problems(cluster) == ("ready", [])
        worker = unit(cluster, Role.DECODE).descriptor
        node = next(n for n, u in cluster.units.items() if u.descriptor.role is Role.DECODE)
        await cluster.kill(node)
        await asyncio.sleep(1.0)
        assert problems(cluster) == ("degraded", ["pool_empty"])
        assert pools_of(cluster.sessions.views(), BOTH)["decode"] == {
            "ready": 0,
            "total": 0,
            "configured": 1,
        }
        await cluster.add(Role.DECODE)
        await asyncio.sleep(1.0)
        assert problems(cluster) == ("ready", [])
        two = {**BOTH, PoolId(Role.DECODE): 2}
        assert problems(cluster, configured=two) == ("degraded", ["pool_short"])
        return worker

    worker = run(scenario, placement=AUTO)
    found = told("worker_joined", "worker_link_lost", "worker_lost", "worker_left")
    assert names(found) == ["worker_joined"] * 2 + [
        "worker_link_lost",
        "worker_lost",
        "worker_left",
        "worker_joined",
    ]
    lost = found[3][1]
    assert lost["worker_pid"] == worker.pid and lost["worker_id"] == worker.worker_id
    assert lost["role"] == "decode" and lost["reason"].endswith(" died")


async def end(cluster, node):
    """Drain a worker and stop it, as SIGTERM does; that it is no member is known later."""
    unit = cluster.units[node]
    await unit.drain(5.0)
    await unit.stop()
    cluster.hub.crash(node)
    await asyncio.sleep(2.0)
    del cluster.units[node]
    cluster.membership.leave(node)


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_worker_that_was_told_to_end_is_no_fault_unless_it_had_failed(told, has_failed):
    async def scenario(cluster):
        await ask(cluster, "warm")
        stream = asyncio.create_task(ask(cluster, "moves", max_tokens=60))
        while not (nodes := busy(cluster, Role.DECODE)):
            await asyncio.sleep(0.001)
        worker = cluster.units[nodes[0]]
        if has_failed:
            worker.availability.fatal = asyncio.get_running_loop().create_future()
            worker.break_down(StoreFailed("a part of it has gone"))
            assert isinstance(worker.fatal.exception(), StoreFailed)
        await end(cluster, nodes[0])
        return await stream

    _, ended = run(scenario, placement=AUTO, decode=2)
    assert ended.error is None and len(ended.timing.attempts) == 2
    found = told("worker_leaving", "worker_link_lost", "worker_lost", "worker_left")
    in_order = ["worker_leaving", "worker_left"]
    assert names(found) == (
        ["worker_link_lost", "worker_lost", "worker_left"] if has_failed else in_order
    )


def busy(cluster, role):
    return [n for n, u in cluster.units.items() if u.descriptor.role is role and u.attempts.by_run]


def test_a_session_that_breaks_and_comes_back_is_told_of_both_times(told):
    async def scenario(cluster):
        await ask(cluster, "warm")
        await asyncio.sleep(1.0)
        cluster.hub.reset("session")
        seen = set()
        for _ in range(200):
            seen.update(problems(cluster)[1])
            await asyncio.sleep(0.001)
        assert "worker_reconnecting" in seen and problems(cluster) == ("ready", [])

    run(scenario, placement=AUTO)
    found = told("worker_link_lost", "worker_link_back", "worker_lost")
    assert sorted(names(found)) == ["worker_link_back"] * 2 + ["worker_link_lost"] * 2
    assert all(fields["reason"] for name, fields in found if name == "worker_link_lost")


def test_a_worker_that_hangs_is_lost_once_however_often_it_is_dialled(told):
    async def scenario(cluster):
        await ask(cluster, "warm")
        node = next(n for n, u in cluster.units.items() if u.descriptor.role is Role.DECODE)
        pause = asyncio.create_task(cluster.pause(node, 12.0))
        await asyncio.sleep(5.0)
        assert problems(cluster) == ("degraded", ["pool_empty", "worker_lost"])
        await pause
        await asyncio.sleep(5.0)
        assert problems(cluster) == ("ready", [])

    run(scenario, placement=AUTO)
    found = told("worker_lost", "worker_link_back")
    assert names(found) == ["worker_lost", "worker_link_back"]
    assert "silent for 3 s" in found[0][1]["reason"]


def test_ranks_that_die_are_told_of_by_the_worker_and_the_router(told):
    async def scenario(cluster):
        await ask(cluster, "warm")
        unit(cluster, Role.DECODE)._runner.die_between_steps()
        await asyncio.sleep(0.1)
        assert problems(cluster) == ("degraded", ["pool_empty", "worker_paused"])
        await asyncio.sleep(3.0)
        assert problems(cluster) == ("ready", [])

    run(scenario, placement=AUTO)
    found = told("ranks_lost", "worker_paused", "worker_resumed")
    assert names(found) == ["ranks_lost", "worker_paused", "worker_resumed"]
    assert "rank group died" in found[0][1]["reason"]


def test_a_drain_and_a_router_that_goes_are_told_of_by_the_worker(told):
    async def scenario(cluster):
        await ask(cluster, "warm")
        node = next(n for n, u in cluster.units.items() if u.descriptor.role is Role.DECODE)
        await cluster.drain(node)
        cluster.kill_router(cluster.routers[0].name)
        await asyncio.sleep(20.0)

    run(scenario, placement=AUTO)
    assert names(told("drain_begun", "drain_ended")) == ["drain_begun", "drain_ended"]
    assert names(told("router_connected"))[:2] == ["router_connected"] * 2
    assert "router_gone" in names(told())


def test_everything_that_keeps_a_router_from_serving_is_said(told):
    async def scenario(cluster):
        await ask(cluster, "warm")
        why = "no decode worker is live"
        return [
            problems(cluster, is_draining=True),
            problems(cluster, is_starting=True, canary_error="no canary has run yet"),
            problems(cluster, canary_error=why),
            problems(cluster, store="down"),
            problems(cluster, store="off"),
        ]

    assert run(scenario) == [
        ("not_ready", ["draining"]),
        ("not_ready", ["starting"]),
        ("not_ready", ["no_request_gets_through"]),
        ("degraded", ["store_unreachable"]),
        ("ready", []),
    ]


async def test_a_store_is_told_of_when_it_goes_and_when_it_comes(told):
    class Store:
        is_up = True

        async def put(self, members, ttl_s):
            if not self.is_up:
                raise StoreFailed("connection refused")

    store = Store()
    mirror = MembershipMirror(store, list)
    for is_up in (True, True, False, True):
        store.is_up = is_up
        for _ in range(2 * FAILURES_TO_BREAK):
            await mirror.write_once()
    assert told() == [
        ("store_up", {}),
        ("store_down", {"reason": "connection refused"}),
        ("store_up", {}),
    ]
