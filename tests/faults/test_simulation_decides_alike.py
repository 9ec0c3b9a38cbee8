"""The same schedules on virtual time and on real processes,
the same decisions in order.

A schedule is a row of requests, each with a fault tied to a position of its stream, so that both
sides meet it in the same state. What is compared is what was decided: attempts with path and
reason, moves, reconnects, the ending. Fifty schedules in `make test-long`, a sample in `make test`.
"""

import asyncio
import os
import random
import signal
from dataclasses import replace

import pytest
from support.process_cluster import is_gone, is_long, note

from client.stream import Client
from core.config import PlacementConfig, RouterConfig
from core.session import Role
from core.types import RequestEnded, SamplingParams, TextDelta
from protos.baton.v1 import generation_pb2 as pb
from simulation.cluster import SimCluster
from simulation.loop import run_virtual
from simulation.shape import ClusterShape

NUM_SCHEDULES = 50 if is_long() else 3
FAULTS = [
    "none",
    "kill decode",
    "kill prefill",
    "drain decode",
    "rank death",
    "kill router",
    "leave",
]
LOCAL_BELOW = 8


def schedule(seed):
    """(fault, after how many tokens, is the prompt long, choices) for each request in turn."""
    rng = random.Random(seed)
    return [
        (
            rng.choice(FAULTS) if i else FAULTS[seed % len(FAULTS)],
            rng.randint(3, 20),
            rng.random() < 0.7,
            rng.choice([1, 1, 2]),
        )
        for i in range(3)
    ]


# --- on virtual time ------------------------------------------------------------------------------


def simulated(rows):
    async def main():
        shape = ClusterShape(
            routers=2,
            placement=PlacementConfig(local_below_tokens=LOCAL_BELOW, min_local_saving=1.0),
            router=RouterConfig(replicas=2),
            max_model_len=400,
        )
        cluster = SimCluster(shape, seed=1)
        await cluster.start()
        await asyncio.sleep(1)
        decisions = []
        for number, row in enumerate(rows):
            decisions.append(await simulated_request(cluster, f"r{number}", row))
            await asyncio.sleep(8)
        await cluster.rest()
        await cluster.stop()
        return decisions

    return run_virtual(main())


async def simulated_request(cluster, name, row):
    fault, after, is_long_prompt, n = row
    # Prompts have no beginning in common: what is cached where would decide, and there differ.
    prompt = (60 + int(name[1:]), *range(1, 59)) if is_long_prompt else (5, 6, 7)
    params = SamplingParams(max_tokens=60, n=n, temperature=0.0, ignore_eos=True)
    request, have, reconnects, pending = cluster.request(name, prompt, params), [0] * n, 0, fault
    while True:
        router = cluster.routers[reconnects % 2]
        wake = asyncio.Event()
        stream = router.open(
            replace(request, resume_from=tuple(have)) if reconnects else request, wake
        )
        while router.is_alive:
            wake.clear()
            for event in stream.take():
                if isinstance(event, TextDelta):
                    have[event.choice] = event.position + len(event.token_ids)
                elif isinstance(event, RequestEnded):
                    code = event.error.code if event.error else "finished"
                    return (
                        f"{fault}: {' '.join(event.timing.attempts)} reconnects={reconnects} {code}"
                    )
            if have[0] >= after and pending:
                pending, todo = "", pending
                if todo == "leave":
                    await asyncio.get_running_loop().create_task(
                        stream.close(), context=router.context.copy()
                    )
                    return "leave: left"
                await simulated_fault(cluster, router, todo)
            await wake.wait()
        reconnects += 1


async def simulated_fault(cluster, router, fault):
    loop = asyncio.get_running_loop()
    busy = {
        role: next(
            (
                n
                for n, u in cluster.units.items()
                if u.attempts.by_run and u.descriptor.role is role
            ),
            None,
        )
        for role in Role
    }
    match fault:
        case "kill decode" | "kill prefill":
            role = Role(fault.split()[1])
            node = busy[role] or next(
                n for n, u in cluster.units.items() if u.descriptor.role is role
            )
            await cluster.kill(node)
            loop.create_task(cluster.add(role))
        case "drain decode":
            loop.create_task(cluster.drain(busy[Role.DECODE]))
            loop.create_task(cluster.add(Role.DECODE))
        case "rank death":
            cluster.runners[busy[Role.DECODE]].dies_next = True
        case "kill router":
            new = cluster.kill_router(router.name)
            new.start()
            loop.call_later(0.5, setattr, new, "is_alive", True)


# --- on real processes ----------------------------------------------------------------------------


async def real(cluster, rows):
    decisions = []
    for number, row in enumerate(rows):
        decisions.append(await real_request(cluster, f"{number}-{id(rows)}", row))
        await cluster.wait_whole()
        assert await cluster.leaked() == {}
    return decisions


async def real_request(cluster, name, row):
    fault, after, is_long_prompt, n = row
    text = "def main(argv):\n    for value in argv: print(value)\n" * 3 if is_long_prompt else "x"
    text = f"{name} {text}" if is_long_prompt else text
    request = pb.GenerateRequest(
        text=text,
        request_id=name,
        sampling=pb.SamplingOptions(temperature=0, n=n),
        stopping=pb.StoppingOptions(max_tokens=700, ignore_eos=True),
        response=pb.ResponseOptions(timing=True),
    )
    pending, have = fault, 0
    async with Client(cluster.addresses) as client:
        async for message in client.generate(request):
            kind = message.WhichOneof("event")
            if kind == "delta" and message.delta.choice == 0:
                have = message.delta.position + len(message.delta.tokens)
            if have >= after and pending and kind != "summary":
                pending, todo = "", pending
                if todo == "leave":
                    return "leave: left"
                await real_fault(cluster, todo)
            if kind == "summary":
                attempts = " ".join(message.summary.timing.attempts)
                return f"{fault}: {attempts} reconnects={client.num_reconnects} finished"
    return f"{fault}: no ending"


async def real_fault(cluster, fault):
    await asyncio.sleep(0.7)  # longer than a beat: then routers know who runs it
    replicas = await cluster.replicas()
    busy = {r["role"]: r for r in replicas if r["load"]["running"]}
    decode = busy.get("decode") or next(r for r in replicas if r["role"] == "decode")
    match fault:
        case "kill decode":
            pid = decode["pid"]
        case "kill prefill":
            pid = next(r for r in replicas if r["role"] == "prefill")["pid"]
        case "rank death":
            pid = decode["rank_pids"][0]
        case "kill router":
            pid = cluster.local._routers[0].process.pid
        case "drain decode":
            os.kill(decode["pid"], signal.SIGTERM)
            return
        case _:
            return
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        while not is_gone(pid):
            await asyncio.sleep(0.005)


@pytest.mark.sampled(3)
@pytest.mark.timeout(2400)
@pytest.mark.asyncio(loop_scope="session")
async def test_the_simulation_and_real_processes_decide_alike(shared):
    rows = [schedule(seed) for seed in range(NUM_SCHEDULES)]
    expected = await asyncio.to_thread(lambda: [simulated(row) for row in rows])
    assert shared.local.config.placement.local_below_tokens == LOCAL_BELOW
    for row, decisions in zip(rows, expected, strict=True):
        assert await real(shared, row) == decisions
    seen = " ".join(d for row in expected for d in row)
    assert "worker_lost" in seen
    note(
        "twin",
        {"schedules": NUM_SCHEDULES, "decisions": sum(len(d) for d in expected), "equal": True},
    )
