"""Names of blocks across the cluster."""

import json
import random
import re

from support.tree import ROOT

from core.block_hash import block_hash, block_hashes, branch_hash, hash_key, naming_of, root_hash
from core.scopes import PUBLIC_SCOPE, with_public

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


def names_of(scope, tokens, slices=(1000,), key=b"key"):
    """Names as a prompt of several slices gets them."""
    naming = naming_of("m", scope, 4, key)
    names = []
    start = 0
    for end in (*slices, len(tokens)):
        naming.extend(names, tokens[start:end], 4)
        start = min(end, len(tokens))
    return names


def test_tenants_share_the_names_of_public_blocks_and_no_others():
    tokens = list(range(30))
    plain = names_of("acme\n", tokens)
    acme, bulk = (names_of(with_public(f"{t}\n", 14), tokens) for t in ("acme", "bulk"))
    public = block_hashes(root_hash("m", PUBLIC_SCOPE, b"key"), tokens[:12], 4)
    assert acme[:3] == bulk[:3] == public, "a block that is public in part is not"
    assert len({*plain, *acme[3:], *bulk[3:], *public}) == 7 + 4 + 4 + 3
    branch = branch_hash(public[-1], root_hash("m", "acme\n", b"key"))
    assert acme[3:] == block_hashes(branch, tokens[12:], 4)
    assert names_of(with_public("acme\n", 3), tokens) == plain, "less than a block"


def test_a_chain_is_the_same_in_any_slices():
    tokens = list(range(41))
    for scope in ("acme\n", with_public("acme\n", 16), with_public("acme\n", 999)):
        whole = names_of(scope, tokens)
        assert len(whole) == 10
        for slices in ((4,), (8, 16, 24), (16,), (20,), tuple(range(4, 40, 4))):
            assert names_of(scope, tokens, slices) == whole, (scope, slices)


def test_the_documents_vectors_are_the_names():
    text = (ROOT / "docs" / "prefix-index.md").read_text()
    rows = json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1])
    assert len(rows) >= 4
    for row in rows:
        key = hash_key(row["cluster_key"]) if row["cluster_key"] else b""
        if "public_tokens" in row:
            scope = with_public(row["scope"], row["public_tokens"])
            naming = naming_of(row["content_digest"], scope, row["block_size_tokens"], key)
            names = []
            naming.extend(names, row["token_ids"], row["block_size_tokens"])
            assert [name.hex() for name in names] == row["blocks"]
            continue
        root = root_hash(row["content_digest"], row["scope"], key, row["adapter"])
        names = block_hashes(root, row["token_ids"], row["block_size_tokens"])
        assert root.hex() == row["root"]
        assert [name.hex() for name in names] == row["blocks"]
