"""A scheduler over the hash model, stepped by hand.

Owns the engine of unit tests and the requests and hand-overs for it.
"""

import asyncio

from core.kv_layout import KVLayout
from core.types import GenerateRequest, Logprob, SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import Limits
from engine.scheduling.events import Sampled, SequenceFailed
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Handover
from simulation.hash_runner import HashModel, MemoryKV


class Engine:
    """Checks the books at every step and keeps what was drawn, by request and choice."""

    def __init__(
        self,
        num_blocks=64,
        budget=32,
        block=4,
        max_sequences=8,
        cache=True,
        max_len=400,
        changes=None,
        order=None,
    ):
        layout = KVLayout("m", "uint8", 2, 1, 8, block)
        self.pool = BlockPool(num_blocks, changes)
        self.scheduler = Scheduler(
            self.pool,
            Limits(block, budget, max_sequences, max_len, cache),
            layout.content_digest,
            order=order,
        )
        self.model = HashModel(
            layout, MemoryKV(layout, num_blocks), 50, self._wait, lambda plan: 0.0
        )
        self.budget, self.tokens, self.finish, self.failed = budget, {}, {}, []
        self.num_steps = 0

    async def _wait(self, seconds):
        return None

    def submit(self, request, choices=None, emitted=(), age_s=0.0):
        choices = choices or tuple(range(request.sampling.n))
        sequence = self.scheduler.new_sequence(request, 1, choices, emitted, 0.0, age_s=age_s)
        self.scheduler.submit(sequence)
        return sequence

    def arrive(self, request, now_s=0.0, age_s=0.0):
        sequence = self.scheduler.new_sequence(request, 1, (0,), (), now_s, age_s=age_s)
        self.scheduler.submit_arrival(sequence)
        self.scheduler.reserve_in_turn(now_s)
        return sequence

    def drawn(self, token_id, sequence):
        """First tokens as a prefill worker would have drawn them."""
        return {choice: Logprob(token_id, 0.0) for choice in sequence.choices}

    def step(self, change=None):
        plan = self.scheduler.plan(0.0)
        self.pool.check()
        assert plan.num_tokens <= self.budget
        assert len({i.sequence_key for i in plan.items}) == len(plan.items)
        writable = [
            i.block_table[p // self.scheduler.limits.block_size_tokens]
            for i in plan.items
            for p in {i.start, i.start + len(i.token_ids) - 1}
        ]
        assert all(self.pool.references(b) >= 1 for b in writable)
        result = asyncio.run(self.model.execute(plan, lambda *_: None))
        if change is not None:
            result = change(plan, result)
        for event in self.scheduler.commit(plan, result, 0.0):
            if isinstance(event, Sampled):
                out = self.tokens.setdefault((event.sequence.request.request_id, event.choice), [])
                assert event.position == len(out)
                out.append(event.token.token_id)
                if event.finish:
                    self.finish[event.sequence.request.request_id, event.choice] = event.finish
            elif isinstance(event, SequenceFailed):
                self.failed.append(event.sequence.request.request_id)
        self.pool.check()
        self.num_steps += 1
        return plan

    def run_to(self, is_so, limit=200):
        while not is_so():
            self.step()
            assert self.num_steps < limit, "it does not come to that"

    def run(self, limit=4000):
        while self.scheduler.has_work:
            self.step()
            assert self.num_steps < limit, "somebody starves"
        assert self.pool.num_held == 0
        return self.tokens


SMALL = {"max_tokens": 2, "ignore_eos": True}
"""Sampling of a request that is soon done."""


def hand_over(engine, name, partner, size=40):
    """Submit a small request whose KV a partner is to get."""
    small = request(name, [1] * size, **SMALL)
    handover = Handover(partner)
    sequence = engine.scheduler.new_sequence(small, 1, (0,), (), 0.0, handover=handover)
    engine.scheduler.submit(sequence)
    return sequence


def lengths(plan):
    """Tokens that each sequence computes in a step, by its key."""
    return {item.sequence_key: len(item.token_ids) for item in plan.items}


def request(name, prompt, tier="standard", **sampling):
    return GenerateRequest(
        name,
        "m",
        tuple(prompt),
        SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling}),
        5,
        0.0,
        (0,),
        tier,
    )
