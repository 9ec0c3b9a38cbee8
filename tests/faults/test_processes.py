"""Processes killed and stopped at random moments under load: nothing lost,
nothing repeated, nothing inexact.

The control arm runs first on the same cluster. A sample in `make test`, 3,000 affected requests in
`make test-long` (0 of n bounds the loss at 3/n with 95 % confidence).
"""

import asyncio

import pytest
from support.process_cluster import ProcessCluster, config_of, is_long, note
from support.samples import sample

TARGET = {"float32": 2000, "bfloat16": 1000} if is_long() else {"float32": 8, "bfloat16": 3}
KINDS = [(what, role) for what in ("kill", "hang") for role in ("decode", "prefill", "router")]
# In 16 bits one is enough: who takes over a request does not know its numbers' type.
SAMPLE = {"float32": sample(KINDS, 3), "bfloat16": sample(KINDS, 1)}
HANG_S = 6.0 if is_long() else 4.5
KILL_LOAD_S = 5.0 if is_long() else 3.5


@pytest.mark.timeout(2400)
@pytest.mark.asyncio(loop_scope="session")
async def test_kills_and_hangs_of_every_role_lose_repeat_and_change_nothing(learned):
    await kill_and_hang(learned, "float32")


@pytest.mark.sampled(3)
@pytest.mark.timeout(2400)
async def test_kills_and_hangs_change_nothing_in_16_bits():
    async with ProcessCluster(config_of("bfloat16")) as cluster:
        cluster.make_requests(48 if is_long() else 16, max_tokens=80)
        await cluster.learn()
        await kill_and_hang(cluster, "bfloat16")


async def kill_and_hang(cluster, dtype):
    """Every kind of fault until each touched a request, and all together as many as are wanted."""
    # Control arm: the same load without a fault, and how long its clients wait between two
    # messages.
    await cluster.load(20 if is_long() else 4, 32 if is_long() else 16)
    assert cluster.verdict()["wrong"] == [] and cluster.verdict()["affected"] == 0
    control = _quantiles([a.longest_gap_s for _, a in cluster.answers])
    kinds = KINDS if is_long() else SAMPLE[dtype]
    figures = {kind: [] for kind in kinds}
    affected = 0
    while untouched := [k for k in kinds if affected < TARGET[dtype] or not figures[k]]:
        for what, role in untouched:
            cluster.answers.clear()
            load = asyncio.create_task(
                cluster.load(KILL_LOAD_S if what == "kill" else HANG_S + 1, 32 if is_long() else 16)
            )
            await asyncio.sleep(cluster.rng.uniform(0.6, 2.0))
            await (cluster.kill(role) if what == "kill" else cluster.hang(role, HANG_S))
            await load
            verdict = cluster.verdict()
            assert verdict["wrong"] == [], (what, role)
            affected += verdict["affected"]
            figures[what, role] += [a.longest_gap_s for _, a in cluster.answers if a.is_affected]
            await cluster.wait_whole()
    assert await cluster.leaked() == {}
    rows = {
        f"{what} {role}": {"affected": len(gaps), **_quantiles(gaps)}
        for (what, role), gaps in figures.items()
    }
    print(dtype, affected, control, rows)
    note(
        f"processes_{dtype}",
        {
            "dtype": dtype,
            "affected": affected,
            "lost": 0,
            "inexact": 0,
            "control_gap_s": control,
            "client_gap_s": rows,
        },
    )


def _quantiles(gaps):
    ordered = sorted(gaps) or [0.0]
    return {
        f"p{q}": round(ordered[min(len(ordered) - 1, int(q / 100 * len(ordered)))], 3)
        for q in (50, 95, 99)
    }


async def restart(cluster, role, pid):
    """Terminate a process under load; returns how many requests moved to another worker."""
    cluster.answers.clear()
    load = asyncio.create_task(cluster.load(3, 12))
    await asyncio.sleep(1.0)
    code = await cluster.terminate(role, pid)
    await load
    assert code == 0, f"{role} ended with {code}"
    assert cluster.verdict()["wrong"] == []
    await cluster.wait_whole()
    return sum(a.attempts[0].endswith("draining") for _, a in cluster.answers if a.attempts)


@pytest.mark.sampled(3)
@pytest.mark.timeout(300)
@pytest.mark.asyncio(loop_scope="session")
async def test_a_rolling_restart_of_every_process_under_load_is_not_noticed(learned):
    """SIGTERM: workers let their requests move,
    routers end theirs so that clients resume elsewhere.

    One process of each role in `make test`.
    """
    cluster, moved = learned, 0
    for role in ("decode", "prefill", "router"):
        for pid in cluster.pids(role)[: None if is_long() else 1]:
            moved += await restart(cluster, role, pid)
    while not moved:  # every client was between two requests, and nothing there to move
        moved += await restart(cluster, "decode", cluster.pids("decode")[0])
    assert await cluster.leaked() == {}
