"""Models split over ranks, KV moved between any two splits: the same tokens as on one rank."""

import asyncio
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.in_process_cluster import NIXL, InProcessCluster, load, load_shards
from support.models import FAMILIES, TINY, random_model
from support.process_cluster import is_long
from support.samples import sample

from core.config import EngineConfig, TransferConfig
from core.errors import InvariantViolation, LayoutMismatch, ModelLoadError
from core.kv_layout import KVLayout
from engine.checkpoint.model_spec import read_model
from engine.model.sharding import Shard, check_split
from engine.model.weights import load_tensors
from kv_transfer.resharding import PoolView, common_grid
from simulation.hash_runner import MemoryKV

pytestmark = pytest.mark.sampled(2)

RNG = random.Random(5)
PROMPTS = [list(b"def main(argv):\n    "), [RNG.randrange(256) for _ in range(150)]]
SIZES = (1, 2, 4)


def engine(size=1, block=16, chunk=64):
    return EngineConfig(
        block_size_tokens=block,
        num_blocks=2048 // block,
        max_step_tokens=chunk,
        tensor_parallel_size=size,
    )


async def answers(first, second, dtype="float32", transport="inproc", repeat=False):
    wishes = [
        {"temperature": t, "n": n, "max_tokens": 16, "seed": 11, "logprobs": 0}
        for t, n in ((0.0, 1), (0.9, 2))
    ]
    async with InProcessCluster(TINY, dtype, first, second, transport=transport) as cluster:
        replies = await asyncio.gather(*(cluster.ask(p, **w) for p in PROMPTS for w in wishes))
        if repeat:
            replies = await asyncio.gather(*(cluster.ask(p, **w) for p in PROMPTS for w in wishes))
        for reply in replies:
            assert reply.ended.error is None and reply.ended.timing.path == "pd"
        return [r.tokens for r in replies], [r.ended.timing for r in replies]


_of_one_rank = []


async def of_one_rank():
    """The answers of unsplit workers, computed once."""
    if not _of_one_rank:
        _of_one_rank.append((await answers(engine(), engine()))[0])
    return _of_one_rank[0]


@pytest.mark.parametrize("transport", ["inproc", "grpc", "shm"])
@pytest.mark.parametrize(
    ("prefill", "decode"), sample([(p, d) for p in SIZES for d in SIZES if (p, d) != (1, 1)], 3)
)
async def test_any_prefill_size_hands_over_to_any_decode_size(prefill, decode, transport):
    for chunk in (64, 7):
        got, timing = await answers(
            engine(prefill, chunk=chunk), engine(decode), transport=transport
        )
        assert got == await of_one_rank()
        assert all(a.kv_bytes > 0 and a.kv_transport == transport for a in timing)


PAIRS = [(p, d) for p in SIZES for d in SIZES]


@pytest.mark.parametrize("transport", ["gloo", NIXL])
@pytest.mark.parametrize(("prefill", "decode"), PAIRS if is_long() else [(4, 2)])
async def test_any_size_hands_over_through_carriers(prefill, decode, transport):
    for chunk in (64, 7) if is_long() else (7,):
        for repeat in (False, True) if is_long() else (True,):
            first, second = engine(prefill, chunk=chunk), engine(decode)
            got, timing = await answers(first, second, transport=transport, repeat=repeat)
            assert got == await of_one_rank()
            assert all(a.kv_transport == transport for a in timing if a.kv_bytes)


@pytest.mark.parametrize(("first", "second"), [(4, 16), (16, 4), (8, 32), (32, 8)])
async def test_block_sizes_that_divide_one_another_hand_over(first, second):
    """With and without prefix hits on the decode side, and with both splits at once."""
    expected = await of_one_rank()
    for sizes in ((1, 1), (2, 4), (4, 1)):
        for repeat in (False, True):
            got, timing = await answers(
                engine(sizes[0], first), engine(sizes[1], second), repeat=repeat
            )
            assert got == expected
    assert all(a.kv_blocks for a in timing)


async def test_only_what_decode_lacks_is_sent_whatever_the_shapes():
    async with InProcessCluster(TINY, "float32", engine(2, 8), engine(4, 16)) as cluster:
        first = await cluster.ask(PROMPTS[1], max_tokens=3)
        again = await cluster.ask(PROMPTS[1], max_tokens=3)
        # 150 tokens: 19 wire blocks of 8; decode keeps 9 whole blocks of 16, so one wire block goes
        # again.
        part = cluster.spec.layout(8).block_bytes
        assert first.ended.timing.kv_bytes == 19 * part and again.ended.timing.kv_bytes == part
        assert first.tokens == again.tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_sixteen_bits_are_exact_between_equal_sizes(dtype):
    """Rounding differs between sizes; between equal ones nothing does, chunked or batched."""
    whole, _ = await answers(engine(2, chunk=512), engine(2), dtype)
    chunked, _ = await answers(engine(2, chunk=7), engine(2), dtype)
    assert whole == chunked


@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_model_gives_the_logits_of_the_whole_and_no_rank_reads_it_all(tmp_path, family):
    reference = random_model(tmp_path, family)
    spec, whole = load(tmp_path, "float32")
    sizes = [n for n in (2, 4) if not _refuses(spec, n)]
    assert sizes, "this family was not split at all"
    ids = [RNG.randrange(3, 96) for _ in range(23)]
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0, -1].numpy()
    for size in sizes:
        logits = _last_logits(load_shards(tmp_path, "float32", size), ids)
        np.testing.assert_allclose(logits, expected, atol=2e-4)
        total = sum(t.numel() for t in load_tensors(Shard(spec), torch.device("cpu")).values())
        parts = [
            sum(t.numel() for t in load_tensors(Shard(spec, r, size), torch.device("cpu")).values())
            for r in range(size)
        ]
        assert max(parts) < 0.75 * total
        assert total <= sum(parts) < 1.5 * total


def test_a_split_model_refuses_an_id_that_no_rank_has_a_row_for():
    for token_id in (264, -1):
        with pytest.raises(InvariantViolation, match="not from 0 to 263"):
            _last_logits(load_shards(TINY, "float32", 2), [1, token_id, 3])


def _refuses(spec, size):
    try:
        check_split(spec, size)
    except ModelLoadError:
        return True
    return False


def _last_logits(models, ids):
    """One prompt through all ranks; rank 0 is given the last row."""
    from concurrent.futures import ThreadPoolExecutor

    from engine.model.attention import AttentionInputs

    spec = models[0].spec
    inputs = AttentionInputs(np.arange(len(ids)), np.array([0, len(ids)]), np.array([[0, 1]]))

    def run(model):
        kv = torch.zeros(
            (spec.num_layers, 2, 2, 16, model.shard.num_kv_heads, spec.head_size), dtype=model.dtype
        )
        rows = np.array([len(ids) - 1])
        return model.forward(np.array(ids), inputs, kv, rows, lambda _: None, [0])

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(run, models))[0][0].numpy()


def test_a_size_that_divides_nothing_is_refused_with_the_sizes_that_do():
    with pytest.raises(
        ModelLoadError, match=r"tensor_parallel_size 3 .*8 query heads.*possible: \[1, 2, 4, 8\]"
    ):
        check_split(read_model(TINY), 3)


SHAPES = [
    (k, n, b)
    for k in (1, 2, 4, 6, 8)
    for n in (1, 2, 3, 4, 8, 16)
    for b in (4, 8, 16)
    if k % n == 0 or n % k == 0
]


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8])
def test_every_byte_arrives_in_its_place_between_any_two_shapes(heads):
    """The whole matrix of shards and block sizes; every element is numbered by what it is."""
    shapes = [(n, b) for k, n, b in SHAPES if k == heads]
    for theirs in shapes:
        for mine in shapes:
            _move(heads, theirs, mine, num_tokens=RNG.randrange(1, 40), have=RNG.random() < 0.3)


def _layout(heads, shape):
    return KVLayout("m", "float32", 2, heads, 3, shape[1], shape[0])


def _fill(kv, layout, tables, num_tokens):
    """Element (layer, kv, token, head, i) of every copy is its own number."""
    for layer in range(layout.num_layers):
        for shard in range(layout.num_shards):
            first = shard // layout.num_copies * layout.heads_per_shard
            for token in range(num_tokens):
                block, slot = divmod(token, layout.block_size_tokens)
                array = _array(kv, layout, layer, tables[block], shard)
                for which in range(2):
                    for head in range(layout.heads_per_shard):
                        for i in range(3):
                            array[which, slot, head, i] = _number(
                                layer, which, token, first + head, i
                            )


def _number(layer, which, token, head, i):
    return (((layer * 2 + which) * 64 + token) * 8 + head) * 3 + i + 1


def _array(kv, layout, layer, block_id, shard):
    shape = (2, layout.block_size_tokens, layout.heads_per_shard, 3)
    return np.frombuffer(kv.view(layer, block_id, shard), np.float32).reshape(shape)


def _move(heads, from_shape, to_shape, num_tokens, have):
    source, target = _layout(heads, from_shape), _layout(heads, to_shape)
    grid = common_grid(source, *target.shape)
    assert grid == common_grid(target, *source.shape), "both ends must find the same grid"
    kv, other = MemoryKV(source, 16), MemoryKV(target, 16)
    tables, others = list(range(15, 3, -1)), tuple(range(2, 14))
    _fill(kv, source, tables, num_tokens)
    third = MemoryKV(target, 16)
    sender, receiver, pulling = (
        PoolView(kv.segments(), source, grid),
        PoolView(other.segments(), target, grid),
        PoolView(third.segments(), target, grid),
    )
    assert sender.fragment_bytes == receiver.fragment_bytes
    have_tokens = (
        (num_tokens - 1) // target.block_size_tokens * target.block_size_tokens if have else 0
    )
    first, seen = grid.blocks_for(have_tokens), set()
    for layer in range(source.num_layers):
        for begin in range(
            have_tokens // source.block_size_tokens, source.blocks_for(num_tokens), 3
        ):
            end = min(begin + 3, source.blocks_for(num_tokens))
            held = (
                min(end * source.block_size_tokens, num_tokens) - begin * source.block_size_tokens
            )
            entries = sender.entries(layer, begin, tuple(tables[begin:end]), held)
            entries = entries[entries["block"] >= first]
            seen.update((layer, int(e["shard"]), int(e["block"])) for e in entries)
            targets = np.asarray(others)[entries["block"] // receiver.blocks_per_block]
            # Over a wire and within one memory alike; the tallies agree at every stage.
            payload, sent = sender.gather(entries)
            assert (sent == sender.checksum(entries)).all()
            assert (receiver.scatter(entries, targets, payload) == sent).all()
            assert (pulling.pull(sender, entries, targets) == sent).all()
    expected = MemoryKV(target, 16)
    _fill(expected, target, others, num_tokens)
    for layer in range(2):
        for shard in range(target.num_shards):
            for token in range(num_tokens):
                block, slot = divmod(token, target.block_size_tokens)
                got = _array(other, target, layer, others[block], shard)[:, slot]
                want = _array(expected, target, layer, others[block], shard)[:, slot]
                assert (got == (want if token >= have_tokens else 0)).all(), (
                    from_shape,
                    to_shape,
                    token,
                )
    assert all(
        bytes(a) == bytes(b) for a, b in zip(other.segments(), third.segments(), strict=True)
    )


def test_shapes_that_cannot_meet_are_refused_with_their_numbers():
    layout = KVLayout("m", "float32", 2, 4, 3, 16)
    with pytest.raises(LayoutMismatch, match="blocks of 16 tokens here and of 12 there"):
        common_grid(layout, 1, 12)
    with pytest.raises(LayoutMismatch, match="3 shards of 4 KV heads"):
        common_grid(layout, 3, 16)
    for shards, block in ((0, 16), (1, 0)):
        with pytest.raises(LayoutMismatch):
            common_grid(layout, shards, block)


def test_every_difference_between_two_identities_is_named():
    layout = KVLayout("m", "float32", 2, 4, 3, 16)
    other = replace(layout, dtype="bfloat16", num_layers=3, tokenizer_digest="t")
    found = layout.differences(other.identity)
    assert found == [
        "tokenizer is none here and t there",
        "dtype is float32 here and bfloat16 there",
        "layers is 2 here and 3 there",
    ]
    assert layout.differences("") and not layout.differences(
        replace(layout, num_shards=4, block_size_tokens=4).identity
    )


async def test_blocks_that_do_not_divide_are_refused_at_once_and_other_pairs_go_on():
    async with InProcessCluster(
        TINY, "float32", engine(1, 16), engine(1, 24), transfer=TransferConfig(lease_s=60)
    ) as cluster:
        async with asyncio.timeout(30):  # the refusal ends it, not the lease
            odd = await cluster.ask(PROMPTS[0], max_tokens=5)
    assert odd.ended.error is not None


def test_workers_with_another_tokenizer_do_not_match(tmp_path):
    shutil.copytree(TINY, tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    mine, theirs = read_model(TINY).layout(16), read_model(tmp_path / "other").layout(16)
    assert mine.content_digest != theirs.content_digest
    (difference,) = mine.differences(theirs.identity)
    assert difference.startswith("tokenizer is ")
