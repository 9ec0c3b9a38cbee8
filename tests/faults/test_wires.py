"""The wire between decode and prefill misbehaves, and the one between routers and workers."""

import asyncio

import pytest
from support.process_cluster import ProcessCluster, config_of, is_long, note
from support.samples import sample

FLIPS = 200 if is_long() else 12


def proxies(cluster, kind):
    return [p for (_, k), p in cluster.local.proxies.items() if k == kind]


async def under(cluster, seconds, start, stop=lambda: None):
    cluster.answers.clear()
    load = asyncio.create_task(cluster.load(seconds, 12))
    await asyncio.sleep(0.7)
    start()
    await asyncio.sleep(seconds * 0.6)
    stop()
    await load
    verdict = cluster.verdict()
    assert verdict["wrong"] == []
    return verdict


@pytest.mark.sampled(3)
@pytest.mark.timeout(600)
async def test_flipped_bits_of_kv_are_all_refused_before_a_token():
    async with ProcessCluster(config_of(placement__path="pd"), proxied=["transfer"]) as cluster:
        cluster.make_requests(24, max_tokens=12)
        await cluster.learn()
        flips = 0
        while flips < FLIPS:
            cluster.answers.clear()
            load = asyncio.create_task(cluster.load(3, 8))
            while not load.done():
                for proxy in proxies(cluster, "transfer"):
                    proxy.flips = 1
                await asyncio.sleep(0.05)
            await load
            verdict = cluster.verdict()
            assert verdict["wrong"] == [] or all(
                "came damaged twice" in w for w in verdict["wrong"]
            ), verdict["wrong"]
            assert not any("inexact" in w for w in verdict["wrong"])
            flips = sum(p.bitten["flip"] for p in proxies(cluster, "transfer"))
        assert await cluster.leaked() == {}
        note("flips", {"flips": flips, "inexact": 0})


@pytest.mark.sampled(3)
@pytest.mark.timeout(300)
async def test_delay_cuts_truncation_blackholes_and_one_way_loss_change_nothing():
    async with ProcessCluster(config_of(), proxied=["transfer", "session"]) as cluster:
        cluster.make_requests(24, max_tokens=60)
        await cluster.learn()
        for kind in sample(["transfer", "session"], 1):
            wires = proxies(cluster, kind)

            def set_all(name, value, wires=wires):
                for wire in wires:
                    setattr(wire, name, value)

            def bitten(*names, wires=wires):
                return sum(wire.bitten[name] for wire in wires for name in names)

            async def until_bitten(names, seconds, start, stop=lambda: None, bitten=bitten):
                """Again, if nothing crossed a wire meanwhile."""
                before = bitten(*names)
                while bitten(*names) == before:
                    await under(cluster, seconds, start, stop)
                    await cluster.wait_whole()

            await until_bitten(
                ["delay"],
                2.5,
                lambda s=set_all: s("delay_s", 0.05),
                lambda s=set_all: s("delay_s", 0.0),
            )
            await until_bitten(["cut"], 2.5, lambda w=wires: [x.cut() for x in w])
            await until_bitten(["truncate"], 2.5, lambda s=set_all: s("truncate", 1))
            for routes in sample([("up", "down"), ("up",), ("down",)], 1):
                # Nobody fetches from a decode worker: a wire that nothing crosses proves nothing.
                one = next(
                    p
                    for (seat, k), p in cluster.local.proxies.items()
                    if k == kind and seat.startswith("prefill")
                )
                # With both blocked, what does not go up is not answered.
                await until_bitten(
                    [f"blocked {route}" for route in routes],
                    7,
                    lambda o=one, r=routes: o.block(*r),
                    one.unblock,
                )
        assert await cluster.leaked() == {}
