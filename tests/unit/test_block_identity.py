"""What a block is: names across the cluster, exact identities within one worker."""

import dataclasses
import json
import random
import re
from collections import Counter
from operator import attrgetter

import pytest
from support.tree import ROOT
from support.virtual import PROMPT, ask, run, unit
from test_scheduler import Engine, request

from cluster.local import Child, LocalCluster
from cluster.secrets import with_cluster_keys
from cluster.worker_process import RunningWorker
from core import block_hash as block_hash_module
from core.block_hash import block_hash, block_hashes, hash_key, root_hash
from core.config import BatonConfig, load_config
from core.errors import ConfigError, WorkerLost
from core.ids import seed_of
from core.session import Role
from engine.scheduling import sequence as sequence_module
from simulation.cluster import HASH_KEY

KEY = "a secret of sufficient length"


def test_names_depend_on_parent_tokens_scope_model_and_key():
    base = block_hash(root_hash("m", "t"), [1, 2])
    others = [
        block_hash(root_hash("m", "t"), [2, 1]),
        block_hash(root_hash("m", "u"), [1, 2]),
        block_hash(root_hash("n", "t"), [1, 2]),
        block_hash(root_hash("m", "t", b"key"), [1, 2]),
        block_hash(block_hash(root_hash("m", "t"), [0]), [1, 2]),
        block_hash(root_hash("m", "t", adapter="x"), [1, 2]),
        block_hash(root_hash("m", "t\0"), [1, 2]),
    ]
    assert len({base, *others}) == 8
    assert root_hash("ab", "c") != root_hash("a", "bc")
    assert root_hash("a", "b", adapter="c") != root_hash("a", "c", adapter="b")
    assert hash_key(KEY) == hash_key(KEY) != hash_key(KEY + ".")


def test_a_chain_in_one_pass_is_the_chain_block_by_block():
    parent = root_hash("m", "t", b"key")
    tokens = [random.Random(5).randrange(2**31) for _ in range(35)]
    expected = [parent]
    for start in range(0, 32, 8):
        expected.append(block_hash(expected[-1], tokens[start : start + 8]))
    assert block_hashes(parent, tokens, 8) == expected[1:]
    assert block_hashes(expected[2], tokens[16:], 8) == expected[3:]
    assert block_hashes(parent, tokens[:7], 8) == []


def test_the_documents_vectors_are_the_names():
    text = (ROOT / "docs" / "prefix-index.md").read_text()
    rows = json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1])
    assert len(rows) >= 4
    for row in rows:
        key = hash_key(row["cluster_key"]) if row["cluster_key"] else b""
        root = root_hash(row["content_digest"], row["scope"], key, row["adapter"])
        names = block_hashes(root, row["token_ids"], row["block_size_tokens"])
        assert root.hex() == row["root"]
        assert [name.hex() for name in names] == row["blocks"]


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
    wishes = beginnings_with_one_tail(300)
    computed, _, _ = answers(wishes, cache=False)
    cached, num_hit_tokens, pool = answers(wishes, cache=True)
    assert len(computed) == 600 and cached == computed
    assert num_hit_tokens >= 300 * 12, "the second of each pair finds all but its last block"
    names = Counter(
        pool.block_hash(block) for block in range(pool.num_blocks) if pool.identity(block)
    )
    assert names.total() > 1000
    assert (max(names.values()) > 1) == (digest_bytes < 16), "names met, or they did not"


def test_a_fork_goes_on_with_the_hashes_of_its_prompt(monkeypatch):
    hashed = []

    def counted(parent, token_ids, size):
        hashed.extend(hashes := block_hashes(parent, token_ids, size))
        return hashes

    monkeypatch.setattr(sequence_module, "block_hashes", counted)
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


@pytest.mark.parametrize("name", ["security.cluster_key", "seed_key"])
def test_secrets_of_a_cluster_are_made_if_there_are_none_and_never_shown(name):
    config = load_config(None, {}, {})
    made = [with_cluster_keys(config) for _ in range(2)]
    keys = {attrgetter(name)(m) for m in made}
    assert len(keys) == 2 and min(map(len, keys)) >= 32
    assert BatonConfig.model_validate_json(made[0].model_dump_json()) == made[0]
    chosen = load_config(None, {name: KEY}, {})
    assert attrgetter(name)(with_cluster_keys(chosen)) == KEY
    assert with_cluster_keys(made[0]) == made[0]
    assert KEY not in repr(chosen)
    with pytest.raises(ConfigError, match=f"{name} has 5 characters") as refused:
        load_config(None, {name: "12345"}, {})
    assert "12345" not in refused.value.message


def test_a_seed_key_that_the_hash_cannot_take_is_refused_before_the_first_request():
    assert seed_of("id", load_config(None, {"seed_key": "k" * 64}, {}).seed_key.encode()) > 0
    with pytest.raises(ConfigError, match="seed_key has 65 bytes"):
        load_config(None, {"seed_key": "k" * 65}, {})


async def test_all_children_of_a_cluster_get_the_same_secrets(monkeypatch):
    handed = []

    async def refuse(kind, config):
        handed.append((config.security.cluster_key, config.seed_key))
        raise WorkerLost("enough seen")

    monkeypatch.setattr(Child, "spawn", refuse)
    flags = {"redis.is_on": False, "pools.decode.replicas": 2}
    with pytest.raises(WorkerLost):
        await LocalCluster(load_config(None, flags, {})).start()
    assert len(handed) == 4 and len(set(handed)) == 1 and min(map(len, handed[0])) >= 32


async def test_a_worker_without_a_cluster_key_does_not_start():
    with pytest.raises(ConfigError, match="without security.cluster_key"):
        await RunningWorker.start(load_config(None, {}, {}), Role.DECODE, node="n")
