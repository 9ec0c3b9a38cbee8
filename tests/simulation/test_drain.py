"""Workers and routers leave service: nothing is lost, nothing is inexact, nothing is waited for."""

import asyncio

from support import virtual

from core.config import RouterConfig
from core.errors import Draining
from core.session import Role, Submit


def run(scenario, **shape):
    return virtual.run(scenario, **{"prefill": 2, "decode": 2, **shape})


def ask(cluster, name="r", **sampling):
    return virtual.ask(cluster, name, **{"max_tokens": 60, "ignore_eos": True, **sampling})


def nodes(cluster, role):
    return [n for n, u in cluster.units.items() if u.descriptor.role is role]


def test_a_draining_decode_worker_lets_its_streams_move_at_once():
    async def scenario(cluster):
        tasks = [asyncio.ensure_future(ask(cluster, f"r{i}", n=1 + i % 2)) for i in range(6)]
        await asyncio.sleep(0.3)
        started_at = cluster.clock.now_s()
        is_empty = await cluster.drain(nodes(cluster, Role.DECODE)[0])
        took_s = cluster.clock.now_s() - started_at
        return is_empty, took_s, [await t for t in tasks]

    is_empty, took_s, answers = run(scenario)
    calm = run(lambda c: asyncio.gather(*(ask(c, f"r{i}", n=1 + i % 2) for i in range(6))))
    assert is_empty and took_s < 1
    assert [tokens for tokens, _ in answers] == [tokens for tokens, _ in calm]
    moved = [ended.timing.attempts for _, ended in answers if len(ended.timing.attempts) > 1]
    assert moved and all(a[0].endswith(":draining") for a in moved)


def test_a_draining_prefill_worker_finishes_its_hand_overs():
    async def scenario(cluster):
        tasks = [asyncio.ensure_future(ask(cluster, f"r{i}", max_tokens=8)) for i in range(8)]
        await asyncio.sleep(0.02)
        is_empty = await cluster.drain(nodes(cluster, Role.PREFILL)[0])
        return is_empty, [await t for t in tasks]

    is_empty, answers = run(scenario)
    assert is_empty and all(ended.error is None for _, ended in answers)


def test_what_was_placed_on_a_worker_before_its_drain_was_heard_of_moves():
    """It has nothing to do and could leave at once; the request's Submit is on its way to it."""

    async def scenario(cluster):
        loop = asyncio.get_running_loop()
        node = nodes(cluster, Role.DECODE)[0]
        worker = cluster.units[node].worker
        draining, ends = [], []

        def note(where, _, attempt):
            if where == node:
                ends.append(attempt.ended.error)

        def leave(stream, message):
            is_submit = isinstance(getattr(message, "message", None), Submit)
            if is_submit and stream.peer.node == node and not draining:
                draining.append(loop.create_task(cluster.drain(node)))
            return [message]

        cluster.hub.mangle = leave
        cluster.on_attempt_ended.append(note)
        _, ended = await ask(cluster)
        return worker.num_attempts, await draining[0], ends, ended

    num_attempts, is_empty, [error], ended = run(scenario)
    assert num_attempts == 1 and is_empty
    assert isinstance(error, Draining)
    assert error.message == "the worker is shutting down; another one will take the request"
    assert ended.timing.attempts == ("0:pd:draining", "1:pd:ok")


def test_a_move_is_no_fault_however_often_it_happens():
    """More moves than fault attempts are allowed, one after the other."""

    async def scenario(cluster):
        leaving = []
        task = asyncio.ensure_future(ask(cluster, max_tokens=100))
        for _ in range(6):
            await asyncio.sleep(0.15)
            attempts = [
                n
                for n, u in cluster.units.items()
                if u.worker.attempts and u.descriptor.role is Role.DECODE
            ]
            if attempts:
                await cluster.add(Role.DECODE)
                leaving.append(asyncio.ensure_future(cluster.drain(attempts[0])))
        await asyncio.gather(*leaving)
        return await task

    tokens, ended = run(scenario)
    assert ended.error is None and len(ended.timing.attempts) >= 5
    assert tokens == run(lambda c: ask(c, max_tokens=100))[0]


def test_the_only_worker_drains_and_the_request_waits_for_the_next_one():
    async def scenario(cluster):
        task = asyncio.ensure_future(ask(cluster))
        await asyncio.sleep(0.3)
        cluster.membership.starting += 1
        await cluster.drain(nodes(cluster, Role.DECODE)[0])
        await asyncio.sleep(6)
        await cluster.add(Role.DECODE)
        cluster.membership.starting -= 1
        return await task

    tokens, ended = run(scenario, decode=1)
    assert ended.error is None and tokens == run(lambda c: ask(c), decode=1)[0]


def test_a_draining_router_sends_its_waiting_requests_elsewhere_too():
    """Not only what runs: a client in the queue must hear "draining",
    which makes it resume, and not "cancelled"."""

    async def scenario(cluster):
        tasks = [asyncio.ensure_future(ask(cluster, f"r{i}", max_tokens=100)) for i in range(3)]
        await asyncio.sleep(0.05)
        await cluster.orchestrator.drain(0.1)
        return [(await t)[1].error for t in tasks]

    errors = run(scenario, router=RouterConfig(max_running=1, max_queued=8))
    assert [type(e) for e in errors] == [Draining] * 3
