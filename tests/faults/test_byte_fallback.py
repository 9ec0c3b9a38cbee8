"""Answers of broken bytes harm nobody: not their neighbours, not the link, not the request itself.

A tokenizer with byte fallback judges a run of bytes as a whole, so text that was certain can
change, and the incremental decoder refuses to go on. Any client can ask for that. A thousand times
in `make test-long`.
"""

import asyncio
import json
import random

import httpx
import pytest
from support.byte_fallback import PIECE_IDS, byte_id, write_folder
from support.process_cluster import ProcessCluster, config_of, is_long, note
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from protos.baton.v1 import generation_pb2 as pb

ATTACKS = 1000 if is_long() else 60
ATTACKERS = 4
NEIGHBOURS = 4
OUTPUT_TOKENS = 24
TIMEOUT_S = 30.0
WHOLE = (0x41, 0x42, 0xC3, 0xA9)
"""A, B, and the two of é: whole characters when nothing broken follows."""
BROKEN = (0xE2, 0xFF, 0x80, 0xF0, 0x9F)


class Attack:
    """A request whose only likely tokens are bytes, good and broken, and some text."""

    def __init__(self, number):
        self.number = number
        self.rng = random.Random(number)
        broken = self.rng.sample(BROKEN, k=self.rng.randint(1, len(BROKEN)))
        pieces = self.rng.sample(sorted(PIECE_IDS), k=1)
        self.token_ids = [
            *map(byte_id, (*WHOLE, *broken)),
            *(PIECE_IDS[piece] for piece in pieces),
        ]
        self.is_biased = number % 2 == 0
        self.temperature = (
            10.0 if self.is_biased else 50.0
        )  # nearly even, whatever the model thinks
        self.tokens, self.text, self.finish, self.error = [], "", "", ""

    async def over_grpc(self, cluster):
        sampling = pb.SamplingOptions(temperature=self.temperature, seed=self.number)
        if self.is_biased:
            for token_id in self.token_ids:
                sampling.logit_bias[token_id] = 100
        else:
            sampling.allowed_token_ids.extend(self.token_ids)
        stopping = pb.StoppingOptions(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        request = pb.GenerateRequest(text="th", sampling=sampling, stopping=stopping)
        answer = await cluster.carry(request, TIMEOUT_S)
        self.tokens, self.text = answer.tokens.get(0, []), answer.text.get(0, "")
        self.finish = answer.finish.get(0, "") and "length"
        self.error = answer.error or answer.disorder

    async def over_http(self, cluster, http):
        body = {
            "prompt": "th",
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
            "temperature": self.temperature,
            "seed": self.number,
            "stream": True,
            "return_token_ids": True,
        }
        if self.is_biased:
            body["logit_bias"] = {str(token_id): 100 for token_id in self.token_ids}
        else:
            body["allowed_token_ids"] = self.token_ids
        url = f"http://127.0.0.1:{cluster.local.http_port}/v1/completions"
        try:
            async with asyncio.timeout(TIMEOUT_S), http.stream("POST", url, json=body) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line[6:]))
        except (httpx.HTTPError, TimeoutError) as error:
            self.error = repr(error)

    def _take(self, chunk):
        if "error" in chunk:
            self.error = str(chunk["error"])
            return
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self.tokens += choice.get("token_ids") or []
            self.finish = choice["finish_reason"] or self.finish

    def wrong(self):
        """What is wrong with the answer; empty if nothing is."""
        if self.error or self.finish != "length" or len(self.tokens) != OUTPUT_TOKENS:
            return f"attack {self.number}: {self.error} {self.finish} {len(self.tokens)} tokens"
        letters = {token_id: piece.strip("▁") for piece, token_id in PIECE_IDS.items()}
        wanted = "".join(letters.get(token_id, "") for token_id in self.tokens)
        found = "".join(letter for letter in self.text if letter in "th")
        return "" if found == wanted else f"attack {self.number}: {found} instead of {wanted}"


def breaks(tokenizer, token_ids):
    """Does the tokenizers library's own stream refuse these tokens?"""
    stream = DecodeStream(ids=[], skip_special_tokens=True)
    try:
        for token_id in token_ids:
            stream.step(tokenizer, token_id)
    except Exception as error:
        assert "Invalid prefix" in str(error)
        return True
    return False


async def watch(cluster, http, workers, troubles):
    """Every worker stays linked and the router ready, all the while."""
    url = f"http://127.0.0.1:{cluster.local.http_port}/ready"
    while True:
        ready = await http.get(url)
        live = {r["worker_id"] for r in await cluster.replicas() if r["state"] == "live"}
        if ready.status_code != 200 or live != workers:
            troubles.append((ready.status_code, sorted(workers - live)))
        await asyncio.sleep(0.2)


async def attack(cluster, http, attacks):
    pending = iter(attacks)

    async def one():
        for each in pending:
            if each.number % 4 < 2:
                await each.over_grpc(cluster)
            else:
                await each.over_http(cluster, http)

    await asyncio.gather(*(one() for _ in range(ATTACKERS)))


def make_neighbours(cluster):
    """As the cluster makes them, but in plain ASCII: what goes wrong came from elsewhere."""
    cluster.make_requests(2 * NEIGHBOURS, max_tokens=40)
    for request in cluster.requests:
        request.sampling.allowed_token_ids.extend(map(byte_id, range(0x20, 0x7F)))


@pytest.mark.sampled(3)
@pytest.mark.timeout(1200)
async def test_answers_of_broken_bytes_harm_nobody(tmp_path):
    folder = write_folder(tmp_path / "model")
    config = config_of(
        model__path=str(folder),
        placement__path="pd",
        router__replicas=1,
        pools__prefill__replicas=1,
        pools__decode__replicas=1,
    )
    async with ProcessCluster(config) as cluster, httpx.AsyncClient(timeout=TIMEOUT_S) as http:
        make_neighbours(cluster)
        await cluster.learn()
        workers = {r["worker_id"] for r in await cluster.replicas()}
        troubles, attacks = [], [Attack(number) for number in range(ATTACKS)]
        watcher = asyncio.create_task(watch(cluster, http, workers, troubles))
        attacking = asyncio.create_task(attack(cluster, http, attacks))
        while not attacking.done():
            await cluster.load(2, NEIGHBOURS, TIMEOUT_S)
        await attacking
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        wrong = [text for each in attacks if (text := each.wrong())]
        num_breaking = sum(breaks(tokenizer, each.tokens) for each in attacks)
        verdict = cluster.verdict()
        facts = {
            "attacks": len(attacks),
            "breaking": num_breaking,
            "wrong_attacks": len(wrong),
            "neighbours": verdict["requests"],
            "wrong_neighbours": len(verdict["wrong"]),
            "unready_or_unlinked": len(troubles),
        }
        print(facts, wrong[:3], troubles[:3])
        note("byte_fallback", facts)
        assert troubles == []
        assert verdict["wrong"] == [] and verdict["affected"] == 0
        assert wrong == []
        assert num_breaking >= len(attacks) // 4, "the attack did not bite, so nothing was proved"
        assert any("\ufffd" in each.text for each in attacks)
        assert await cluster.leaked() == {}
