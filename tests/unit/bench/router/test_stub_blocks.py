"""The names that a stub worker would have cached, and what the prefix index is sent of them."""

from bench.router.stub_blocks import StubBlocks
from core.block_hash import block_hashes, naming_of

BLOCK = 4


def blocks_of(num_blocks):
    return StubBlocks(num_blocks, BLOCK, lambda scope: naming_of("digest", scope, BLOCK))


def names_of(tokens, scope="tenant"):
    return block_hashes(naming_of("digest", scope, BLOCK).root, tokens, BLOCK)


def test_leading_blocks_of_an_earlier_prompt_count_and_the_last_token_never():
    blocks = blocks_of(32)
    first = list(range(10))
    assert blocks.take("tenant", first) == 0
    assert blocks.take("tenant", [*first[:8], 99, 99, 99, 99]) == 8
    assert blocks.take("tenant", first[:8]) == 7, "one is computed, or there would be no logits"
    assert blocks.take("another", first) == 0, "tenants share nothing"
    assert blocks.take("tenant", [98, *first[1:]]) == 0


def test_what_is_published_is_what_is_held_and_the_oldest_goes():
    blocks = blocks_of(3)
    blocks.changes.begin_whole()
    tokens = list(range(5 * BLOCK))
    blocks.take("tenant", tokens[: 2 * BLOCK])
    assert blocks.changes.take(99) == (names_of(tokens)[:2], [])
    blocks.take("tenant", tokens)
    held = names_of(tokens)[2:]
    assert blocks.changes.take(99) == (held, names_of(tokens)[:2])
    assert len(blocks) == 3
    assert sorted(blocks.read(range(3))) == sorted(held)
    assert [*blocks.read(range(1)), *blocks.read(range(1, 3))] == blocks.read(range(3))
    assert not blocks.changes.is_whole_due


def test_a_prompt_longer_than_the_cache_leaves_its_end():
    blocks = blocks_of(2)
    tokens = list(range(3 * BLOCK))
    blocks.take("tenant", tokens)
    assert set(blocks.read(range(2))) == set(names_of(tokens)[1:])
