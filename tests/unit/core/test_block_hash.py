"""Names of blocks across the cluster."""

from core.block_hash import block_hash, hash_key, root_hash

KEY = "a secret of sufficient length"


def test_names_depend_on_parent_tokens_scope_model_and_key():
    base = block_hash(root_hash("m", "t"), [1, 2])
    others = [
        block_hash(root_hash("m", "t"), [2, 1]),
        block_hash(root_hash("m", "u"), [1, 2]),
        block_hash(root_hash("n", "t"), [1, 2]),
        block_hash(root_hash("m", "t", b"key"), [1, 2]),
        block_hash(block_hash(root_hash("m", "t"), [0]), [1, 2]),
    ]
    assert len({base, *others}) == 6
    assert root_hash("ab", "c") != root_hash("a", "bc")
    assert hash_key(KEY) == hash_key(KEY) != hash_key(KEY + ".")
