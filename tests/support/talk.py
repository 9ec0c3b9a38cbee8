"""Conversations over HTTP, and what each turn must find cached.

Owns the history of one chat and the arithmetic of its prefix.
"""

import asyncio
from dataclasses import dataclass

BLOCK = 16
PUBLISHED_S = 60
"""Until a router's view has what was computed, which takes 50 ms on a machine with nothing else."""


@dataclass
class Turn:
    """One answer, who gave it, and how much of its prompt the turn before had left in a cache."""

    prompt: list
    output: list
    text: str
    cached: int
    reusable: int
    """Tokens of whole blocks that the prompt shares with the turn before it and its answer."""
    timing: dict

    @property
    def decision(self):
        return self.timing["why"]["decision"]

    @property
    def foreseen(self):
        """What the router thought the chosen worker had."""
        return len(self.prompt) - self.decision["uncached_tokens"]


class Talk:
    """One chat; `fields` go with each request."""

    def __init__(self, http, first="Tell me of the sea. " * 8, **fields):
        self.http = http
        self.fields = {"max_tokens": 40, "temperature": 0, "ignore_eos": True, **fields}
        self.messages = [{"role": "user", "content": first}]
        self.turns = []

    async def turn(self, then="And then?", **fields):
        """Ask with the whole history; the answer and the next question join it."""
        turn = await self.ask(self.turns[-1] if self.turns else None, **fields)
        self.turns.append(turn)
        self.messages += [
            {"role": "assistant", "content": turn.text},
            {"role": "user", "content": then},
        ]
        return turn

    async def until_published(self):
        """Wait until the router knows that the last turn's worker has all that it computed."""
        turn = self.turns[-1]
        body = {"prompt": [*turn.prompt, *turn.output]}
        if "cache_salt" in self.fields:
            body["cache_salt"] = self.fields["cache_salt"]
        whole = (len(body["prompt"]) - 1) // BLOCK * BLOCK
        async with asyncio.timeout(PUBLISHED_S):
            while True:
                reply = await self.http.post("/prefix-index/explain", json=body)
                assert reply.status_code == 200, reply.text
                held = {row["worker"]: row["leading_tokens"] for row in reply.json()["workers"]}
                if held.get(turn.decision["decode_worker"], 0) >= whole:
                    return
                await asyncio.sleep(0.1)

    async def ask(self, before=None, **fields):
        """Ask and change nothing."""
        body = {"messages": self.messages, "return_token_ids": True, **self.fields, **fields}
        reply = await self.http.post(
            "/v1/chat/completions", json=body, headers={"x-baton-timing": "1"}
        )
        assert reply.status_code == 200, reply.text
        body = reply.json()
        choice = body["choices"][0]
        prompt = body["prompt_token_ids"]
        return Turn(
            prompt,
            choice["token_ids"],
            choice["message"]["content"],
            body["usage"]["prompt_tokens_details"]["cached_tokens"],
            reusable(before, prompt) if before else 0,
            body["timing"],
        )


def reusable(before, prompt):
    """How much of a prompt the turn before has left in full blocks."""
    # The last token of an answer is drawn and never computed.
    known = [*before.prompt, *before.output][:-1]
    # And the last of a prompt is always computed, for what follows it.
    known = known[: len(prompt) - 1]
    pairs = enumerate(zip(known, prompt, strict=False))
    same = next((index for index, (a, b) in pairs if a != b), len(known))
    return same // BLOCK * BLOCK
