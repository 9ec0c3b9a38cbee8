"""What a block is: names across the cluster, exact identities within one worker."""

import dataclasses
import random
from collections import Counter

import pytest
from support.stepping import Engine, request
from support.virtual import PROMPT, ask, run, unit

from core import block_hash as block_hash_module
from core.block_hash import block_hash, block_hashes, root_hash
from core.session import Role
from simulation.shape import HASH_KEY


def beginnings_with_one_tail(count):
    """Prompts that begin differently and go on alike, each asked twice, in two scopes."""
    rng = random.Random(3)
    tail = [1, 2, 3, 4] * 3
    prompts = [[rng.randrange(50) for _ in range(4)] + tail for _ in range(count)]
    return [
        dataclasses.replace(
            request(f"{index}-{turn}", prompt, max_tokens=3, ignore_eos=True),
            scope=f"tenant{index % 2}",
        )
        for turn in range(2)
        for index, prompt in enumerate(prompts)
    ]


def answers(wishes, *, cache):
    engine = Engine(num_blocks=1300, budget=512, cache=cache)
    num_hit_tokens = 0
    for wish in wishes:
        sequence = engine.submit(wish)
        engine.run(limit=10**6)
        num_hit_tokens += sequence.num_prefix_hit_tokens
    return engine.tokens, num_hit_tokens, engine.pool


@pytest.mark.parametrize("digest_bytes", [1, 16])
def test_answers_do_not_depend_on_the_cache_however_short_the_names_are(digest_bytes, monkeypatch):
    """With names of one byte nearly every block has the name of many others."""
    monkeypatch.setattr(block_hash_module, "DIGEST_BYTES", digest_bytes)
    count = 120
    wishes = beginnings_with_one_tail(count)
    computed, _, _ = answers(wishes, cache=False)
    cached, num_hit_tokens, pool = answers(wishes, cache=True)
    assert len(computed) == 2 * count and cached == computed
    assert num_hit_tokens >= count * 12, "the second of each pair finds all but its last block"
    names = Counter(
        pool.block_hash(block) for block in range(pool.num_blocks) if pool.identity(block)
    )
    assert names.total() > 3 * count, "more than names of one byte there are"
    assert (max(names.values()) > 1) == (digest_bytes < 16), "names met, or they did not"


def test_a_fork_goes_on_with_the_hashes_of_its_prompt(monkeypatch):
    hashed = []

    def counted(parent, token_ids, size):
        hashed.extend(hashes := block_hashes(parent, token_ids, size))
        return hashes

    monkeypatch.setattr(block_hash_module, "block_hashes", counted)
    engine = Engine(num_blocks=200, budget=64)
    engine.submit(request("r", range(1, 41), n=4, temperature=1.0, max_tokens=9, ignore_eos=True))
    engine.run()
    # 10 full blocks of prompt; each of 4 choices computes 8 tokens of its own, which fill 2.
    assert len(hashed) == 10 + 4 * 2


def test_a_fork_shares_nothing_that_it_changes():
    engine = Engine()
    sequence = engine.submit(request("r", range(9), n=2))
    engine.step()
    forks = list(engine.scheduler.running)
    assert [f.choices for f in forks] == [(0,), (1,)] and sequence.is_finished
    for name in ("token_ids", "block_table", "parents", "spare_blocks", "_hashes"):
        assert getattr(forks[0], name) is not getattr(forks[1], name)
    assert forks[0].parents == forks[1].parents and len(forks[0].parents) == 3


def test_blocks_of_an_answer_are_found_after_it_and_after_a_preemption():
    engine = Engine()
    first = engine.submit(request("a", range(8), max_tokens=9, ignore_eos=True))
    engine.step()
    engine.scheduler.preempt(first)
    assert first.parents == []
    engine.run()
    answer = engine.tokens["a", 0]
    second = engine.submit(request("b", [*range(8), *answer], max_tokens=1))
    engine.run()
    assert second.num_prefix_hit_tokens == 16


def test_looking_for_a_prefix_changes_nothing():
    engine = Engine()
    sequence = engine.submit(request("r", range(9)))
    assert engine.scheduler.tables.find_prefix(sequence) == []
    assert engine.pool.root("") == 0


def test_every_worker_names_blocks_with_the_clusters_key():
    async def scenario(cluster):
        await ask(cluster)
        digest = cluster.layout.content_digest
        name = block_hash(root_hash(digest, "", HASH_KEY), PROMPT[:4])
        pools = [unit(cluster, role).pool for role in Role]
        return [name in map(p.block_hash, range(p.num_blocks)) for p in pools]

    assert run(scenario) == [True, True]
