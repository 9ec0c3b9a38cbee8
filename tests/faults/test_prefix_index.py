"""The prefix index loses its store, its entries and its workers while chats go on.

Nobody fails and no answer changes: only hits are lost, and they are back when the store is.
"""

import asyncio
import os
import random
import signal
import time
from contextlib import asynccontextmanager

import httpx
import pytest
from redis import asyncio as redis_asyncio
from support.process_cluster import ProcessCluster, config_of, is_gone, is_long, note, state_of
from support.talk import Talk

from cluster.redis import server as redis_server
from cluster.redis.server import RedisServer

BACK_S = 5.0
"""Hits are back after the store's return, as `docs/prefix-index.md` says: printed beside what was
measured, for a machine that does much else may take longer."""
LONGEST_S = 12 * BACK_S
AWAY_S = 30.0 if is_long() else 3.0
NUM_CHATS = 8 if is_long() else 3


@asynccontextmanager
async def started(monkeypatch):
    """A cluster of 2 and 2 whose Redis is ours to break; yields it, the server, a client."""
    monkeypatch.setattr(redis_server, "RIGHTS", "~* &* +@all")
    server = RedisServer()
    try:
        config = config_of(
            redis__url=server.url,
            router__replicas=1,
            # More than a next turn lacks at its holder, whatever speeds were measured here.
            placement__local_below_tokens=64,
        )
        async with ProcessCluster(config) as cluster:
            url = f"http://127.0.0.1:{cluster.local.addresses[0][0]}"
            async with httpx.AsyncClient(base_url=url, timeout=120) as http:
                yield cluster, server, http
    finally:
        if not is_gone(server.pid):
            os.kill(server.pid, signal.SIGCONT)
        server.stop()


@asynccontextmanager
async def commands(server):
    client = redis_asyncio.Redis.from_url(server.url)
    try:
        yield client
    finally:
        await client.aclose()


async def report(http):
    return (await http.get("/prefix-index")).json()


async def is_true(cluster, http):
    """At rest the view has as many blocks of each worker as the worker has."""
    seen = (await report(http))["workers"]
    held = {r["worker_id"]: r["load"]["cached_blocks"] for r in await cluster.replicas()}
    return {worker: seen.pop(worker, 0) for worker in held} == held and not seen


async def until_hits_are_back(cluster, http):
    """Wait for a view that is true; returns how long it took (seconds)."""
    began = time.monotonic()
    async with asyncio.timeout(LONGEST_S):
        while not await is_true(cluster, http):
            await asyncio.sleep(0.1)
    return time.monotonic() - began


async def chats(http, name):
    """Begin some chats that have nothing in common."""
    talks = [Talk(http, f"{n} {name}: tell me of the sea. " * 4) for n in range(NUM_CHATS)]
    await asyncio.gather(*(talk.turn() for talk in talks))
    return talks


async def next_turns(talks):
    """Ask all for their next turn: each says what it would have said without any cache."""
    turns = []
    for talk in talks:
        fresh = await talk.ask(cache_salt=f"nobody's {len(talk.turns)}")
        turn = await talk.turn()
        assert fresh.cached == 0 and turn.output == fresh.output
        turns.append(turn)
    return turns


async def hit_the_answers(talks):
    for turn, talk in zip(await next_turns(talks), talks, strict=True):
        holder = talk.turns[-2].decision["decode_worker"]
        assert turn.decision["decode_worker"] == holder and turn.cached == turn.reusable
        assert turn.cached > len(talk.turns[-2].prompt), "some of the answer"


async def empty(server):
    async with commands(server) as redis:
        assert await redis.dbsize() > 0
        await redis.flushall()


async def freeze(server):
    os.kill(server.pid, signal.SIGSTOP)
    while state_of(server.pid) != "T":
        await asyncio.sleep(0.01)


async def thaw(server):
    os.kill(server.pid, signal.SIGCONT)


async def kill(server):
    os.kill(server.pid, signal.SIGKILL)
    await asyncio.sleep(AWAY_S)


async def wait_until_it_answers(server):
    async with asyncio.timeout(LONGEST_S), commands(server) as redis:
        while True:
            try:
                await redis.ping()
            except (OSError, redis_asyncio.RedisError):
                await asyncio.sleep(0.01)
            else:
                return


FAULTS = {
    "emptied": (empty, wait_until_it_answers),
    "frozen": (freeze, thaw),
    "killed": (kill, wait_until_it_answers),
}


@pytest.mark.sampled(3)
@pytest.mark.timeout(900)
async def test_a_store_emptied_frozen_or_killed_under_load_costs_hits_for_seconds(monkeypatch):
    async with started(monkeypatch) as (cluster, server, http):
        cluster.make_requests(8, max_tokens=20)
        await cluster.learn()
        took_s = {}
        for name, (begin, end) in FAULTS.items():
            load = asyncio.create_task(cluster.load(AWAY_S + 1.0, 4))
            await asyncio.sleep(0.3)
            killed = server.pid
            await begin(server)
            talks = await chats(http, name)
            await load
            verdict = cluster.verdict()
            assert verdict["wrong"] == [] and verdict["affected"] == 0, (name, verdict)
            assert verdict["requests"] > 0
            if name == "frozen":
                assert not await is_true(cluster, http), "nobody heard of these chats"
                await next_turns(talks)
            await end(server)
            assert (server.pid == killed) == (name != "killed")
            took_s[name] = await until_hits_are_back(cluster, http)
            await hit_the_answers(talks)
            cluster.answers.clear()
        print(f"hits are back after {took_s} s, promised are {BACK_S} s")
        note("prefix_index", {"back_s": took_s, "promised_s": BACK_S, "away_s": AWAY_S})


@pytest.mark.sampled(3)
@pytest.mark.timeout(600)
async def test_a_workers_death_takes_its_entries_and_its_chats_go_on_elsewhere(monkeypatch):
    async with started(monkeypatch) as (cluster, server, http):
        talks = await chats(http, "killed")
        await until_hits_are_back(cluster, http)
        victim = talks[0].turns[0].decision["decode_worker"]
        expected = [await talk.ask(cache_salt="nobody's") for talk in talks]
        os.kill(talks[0].turns[0].timing["decode_pid"], signal.SIGKILL)
        turns = await asyncio.gather(*(talk.turn() for talk in talks))
        assert [t.output for t in turns] == [e.output for e in expected]
        assert all(t.decision["decode_worker"] != victim for t in turns)
        async with asyncio.timeout(LONGEST_S):
            while victim in (await report(http))["workers"]:
                await asyncio.sleep(0.05)
        await cluster.wait_whole()
        await until_hits_are_back(cluster, http)
        await hit_the_answers(talks)


@pytest.mark.sampled(3)
@pytest.mark.timeout(600)
async def test_entries_of_nobody_and_of_the_dead_are_counted_and_change_no_answer(monkeypatch):
    rng = random.Random(5)
    async with started(monkeypatch) as (cluster, server, http):
        talks = await chats(http, "forged")
        await until_hits_are_back(cluster, http)
        async with commands(server) as redis:
            logs = sorted(key for key in await redis.keys("*") if key.endswith(b":log"))
            assert len(logs) == 4
            batches = {key: [f[b"e"] for _, f in await redis.xrange(key)] for key in logs}
            victim = talks[0].turns[0].decision["decode_worker"]
            dead = next(key for key in logs if victim.encode() in key)
            os.kill(talks[0].turns[0].timing["decode_pid"], signal.SIGKILL)
            await cluster.wait_whole()
            alive = [key for key in await redis.keys("*") if key.endswith(b":log") and key != dead]
            assert len(alive) == 4
            for key in alive:
                # What it said before it died, what another says, what nobody says.
                other = batches[next(k for k in logs if k not in (key, dead))]
                for entry in (batches[dead][-1], other[-1], rng.randbytes(400), b"", b"\xff" * 64):
                    await redis.xadd(key, {"e": entry})
                await redis.xadd(key, {"f": b"no entry at all"})
                await redis.set(key[: -len(b"log")] + b"head", rng.randbytes(40))
            await redis.xadd(dead, {"e": batches[dead][-1]})
            async with asyncio.timeout(LONGEST_S):
                while (await report(http))["refused"].get("forged", 0) < 12:
                    await asyncio.sleep(0.05)
        seen = await report(http)
        assert victim not in seen["workers"] and seen["refused"]["malformed"] >= 4, seen
        await next_turns(talks)
        await until_hits_are_back(cluster, http)
        await hit_the_answers(talks)
        print(f"refused: {(await report(http))['refused']}")
