"""Names of blocks across the cluster."""

import json
import random
import re

from support.tree import ROOT

from core.block_hash import block_hash, block_hashes, hash_key, root_hash

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
