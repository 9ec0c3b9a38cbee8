"""A prefix comes from a worker that has it to one that lacks it: real processes, Redis and models.

Answers are compared with those of the same prompts under another salt, where nothing is cached.
"""

import asyncio
import random

import httpx
import pytest
from support.process_cluster import ProcessCluster, config_of

RNG = random.Random(5)
SHARED = 900
"""Tokens of a prompt that others begin with, too: 56 blocks."""
BURST = 12
TIMING = {"x-baton-timing": "1"}


def prompt():
    return [RNG.randrange(32, 120) for _ in range(SHARED)]


def tail():
    return [RNG.randrange(32, 120) for _ in range(100)]


class Asking:
    """Completions by token ids, with their timing."""

    def __init__(self, cluster, http):
        self.url = f"http://127.0.0.1:{cluster.local.addresses[0][0]}"
        self.http = http

    async def ask(self, token_ids, max_tokens=12, salt=""):
        body = {
            "model": "baton-tiny",
            "prompt": token_ids,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
        }
        if salt:
            body["cache_salt"] = salt
        reply = await self.http.post(f"{self.url}/v1/completions", json=body, headers=TIMING)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def burst(self):
        """Ask for one prefix, and then for several prompts that begin with it, all at once.

        Returns:
            Each prompt and its reply.
        """
        shared = prompt()
        await self.ask(shared)
        await asyncio.sleep(0.5)  # the holder has published it
        prompts = [shared + tail() for _ in range(BURST)]
        replies = await asyncio.gather(*map(self.ask, prompts))
        return list(zip(prompts, replies, strict=True))

    async def metric(self, outcome):
        text = (await self.http.get(f"{self.url}/metrics")).text
        word = f'baton_prefix_fetches_total{{outcome="{outcome}"}} '
        return next(float(line[len(word) :]) for line in text.splitlines() if line.startswith(word))


async def is_exact(asking, token_ids, reply):
    """The answer is the one that a worker computes which knows nothing."""
    fresh = await asking.ask(token_ids, salt=f"salt-{RNG.random()}")
    assert fresh["timing"]["fetch_outcome"] == "" and not fresh["timing"]["cached_tokens"]
    assert fresh["choices"][0]["text"] == reply["choices"][0]["text"]
    assert fresh["choices"][0]["logprobs"] == reply["choices"][0]["logprobs"]


def config(path, prefill, decode, **changes):
    return config_of(
        placement__path=path,
        router__replicas=1,
        pools__prefill__replicas=prefill,
        pools__decode__replicas=decode,
        **changes,
    )


BURSTS = {
    "prefill from prefill": config("pd", 2, 1, pools__decode__engine__cache_prefixes=False),
    "decode from decode": config("local", 0, 2),
    "decode from decode over gRPC": config("local", 0, 2, transfer__transports=["grpc"]),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", BURSTS)
async def test_a_busy_holders_prefix_is_fetched_and_the_answer_is_exact(name):
    async with ProcessCluster(BURSTS[name]) as cluster, httpx.AsyncClient(timeout=120) as http:
        asking = Asking(cluster, http)
        async with asyncio.timeout(120):
            while True:
                replies = await asking.burst()
                fetched = [r for r in replies if r[1]["timing"]["fetched_tokens"]]
                if fetched:
                    break
        for token_ids, reply in fetched:
            timing = reply["timing"]
            decision = timing["why"]["decision"]
            assert timing["fetch_outcome"] == "fetched"
            assert decision["source"] != decision["prefill_worker"]
            assert decision["source"].startswith(name.split()[2])
            assert timing["fetched_tokens"] <= SHARED
            cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached >= timing["fetched_tokens"] > SHARED // 2
            await is_exact(asking, token_ids, reply)
        assert await asking.metric("fetched") >= len(fetched)
        assert not await cluster.leaked()


@pytest.mark.sampled(2)
async def test_a_prefill_worker_fetches_what_only_the_decode_worker_still_has():
    small = config(
        "pd",
        1,
        1,
        pools__prefill__engine__num_blocks=300,
        # Short steps: the tiny model computes a prompt in less time than two workers need to agree.
        pools__prefill__engine__max_step_tokens=17,
    )
    async with ProcessCluster(small) as cluster, httpx.AsyncClient(timeout=120) as http:
        asking = Asking(cluster, http)
        async with asyncio.timeout(120):
            while True:
                shared = prompt()
                await asking.ask(shared)
                for _ in range(6):  # they take all the blocks that the prefill worker has
                    await asking.ask(prompt(), max_tokens=2)
                await asyncio.sleep(0.5)
                token_ids = shared + tail()
                reply = await asking.ask(token_ids)
                timing = reply["timing"]
                if timing["fetched_tokens"]:
                    break
        assert timing["fetch_outcome"] == "fetched" and timing["attempts"] == ["0:pd:ok"]
        assert timing["why"]["decision"]["source"] == timing["decode_worker"]
        assert timing["fetched_tokens"] == SHARED // 16 * 16
        await is_exact(asking, token_ids, reply)
        assert not await cluster.leaked()
