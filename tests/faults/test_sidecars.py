"""The process that carries KV killed or stopped in mid-transfer:
exact answers another way, and back afterwards."""

import asyncio
import os
import signal
import time

import pytest
from support.in_process_cluster import InProcessCluster
from support.models import TINY
from support.process_cluster import note
from support.samples import sample

from core.config import EngineConfig, TransferConfig
from core.session import Role
from kv_transfer.receiver import Receiver
from kv_transfer.sidecar.stream import SidecarStream
from kv_transfer.transports import choice as transports

ENGINE = EngineConfig(block_size_tokens=16, num_blocks=96, max_step_tokens=32)
PROMPTS = [[(7 * n + 3 * k) % 200 + 5 for k in range(100)] for n in range(4)]
WISHES = {"temperature": 0.8, "seed": 5, "max_tokens": 12}


async def ask_all(cluster):
    replies = await asyncio.gather(*(cluster.ask(prompt, **WISHES) for prompt in PROMPTS))
    assert [r.ended.error for r in replies] == [None] * len(PROMPTS)
    return [r.tokens for r in replies], {r.ended.timing.kv_transport for r in replies}


CASES = [
    (role, number)
    for number in (signal.SIGKILL, signal.SIGSTOP)
    for role in (Role.PREFILL, Role.DECODE)
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("role", "number"), sample(CASES, 1))
async def test_a_carrier_lost_in_mid_transfer_costs_no_token(role, number, monkeypatch):
    async with InProcessCluster(TINY, engine=ENGINE) as cluster:
        expected, _ = await ask_all(cluster)
    transfer = TransferConfig(frame_bytes=4096)
    monkeypatch.setattr(transports, "REST_S", 1.0)
    async with InProcessCluster(
        TINY, engine=ENGINE, transport="gloo+grpc", transfer=transfer
    ) as cluster:
        arrive, accept, hit, hit_at, back_at = SidecarStream.arrive, Receiver._accept, [], [], []

        def arrive_and_hit(stream, slot, num_bytes, *, is_last):
            if num_bytes > transfer.frame_bytes and not hit:
                hit_at.append(time.monotonic())
                hit.append(cluster.sidecars[role][0].client)
                os.kill(hit[0]._process.pid, number)
            arrive(stream, slot, num_bytes, is_last=is_last)

        def accept_and_note(receiver, frame):
            accept(receiver, frame)
            if receiver._transport == "grpc":
                back_at.append(time.monotonic())

        monkeypatch.setattr(SidecarStream, "arrive", arrive_and_hit)
        monkeypatch.setattr(Receiver, "_accept", accept_and_note)
        # Prefix caches are empty, so every prompt travels in some dozens of frames, of which a link
        # holds six: when the first has come, most have not.
        async with asyncio.timeout(20):
            assert (await ask_all(cluster))[0] == expected
        assert hit, "no frame came, so nothing was proved"
        async with asyncio.timeout(10):
            await hit[
                0
            ].died.wait()  # a stopped one is killed once it has shown no pulse for a while
        assert any(unit.agent._network.num_fallen_back for unit in cluster.of_role(Role.DECODE))
        took_s = round(back_at[0] - hit_at[0], 3)
        print(f"{role.value} carrier, {number.name}: the first frame over grpc after {took_s} s")
        note(
            f"carriers_{role.value}_{number.name.lower()}",
            {"first_frame_another_way_after_s": took_s},
        )
        assert await ask_again(cluster, expected) == {"grpc"}
        network = cluster.sidecars[role][0]
        async with asyncio.timeout(30):
            while network.client is hit[0] or not network.client.is_ready:
                await asyncio.sleep(0.05)
        assert network.num_started == 2
        await asyncio.sleep(transports.REST_S)
        assert await ask_again(cluster, expected) == {"gloo"}


async def ask_again(cluster, expected):
    """With empty caches, so that everything travels."""
    for unit in cluster.units:
        unit.pool.drop_cache()
    tokens, transports = await ask_all(cluster)
    assert tokens == expected
    return transports
