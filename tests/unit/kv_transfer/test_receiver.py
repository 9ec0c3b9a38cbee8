"""The decode side of a transfer alone, fetching from a source that keeps no rule."""

import pytest
from support.peers import (
    FIRST,
    TABLE,
    TRANSFER,
    ReceiveCallbacks,
    failure,
    fetched,
    reserved,
    run,
    settle,
)

from core.errors import (
    ChecksumMismatch,
    DeadlineExceeded,
    KVTransferError,
    PoolExhausted,
    PromptTooLong,
    TransferNotFound,
    WorkerLost,
    to_wire,
)
from kv_transfer import codec, frames
from kv_transfer.transitions import Transition


def test_all_parts_arrive_and_lie_where_they_were_reserved():
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source, table=(9, 8, 7))
        for layer in range(2):
            await source.frame(0, source.entries(layer))
        await source.commit(0, FIRST)
        await settle()
        equal = [
            bytes(world.kv.view(layer, mine, 0)) == bytes(source.kv.view(layer, theirs, 0))
            for layer in range(2)
            for mine, theirs in zip((9, 8, 7), TABLE, strict=True)
        ]
        world.agent.ack(TRANSFER)
        return equal, await source.hear()

    host = ReceiveCallbacks()
    equal, answer = run(scenario, host)
    assert equal == [True] * 6 and answer == frames.Ack()
    assert host.names() == ["starting", "arrived", "closed"]
    assert host.calls[1][2] == FIRST and host.calls[1][3].num_bytes == 6 * 64


def test_a_commit_over_other_parts_than_came_is_refused():
    """Every part is good by itself; together they are not what the sender sent."""

    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        for layer in range(2):
            await source.frame(0, source.entries(layer))
        await source.commit(0, FIRST, frames.combined_checksum(source.checksums) ^ 1)
        await settle()

    error = failure(scenario)
    assert isinstance(error, ChecksumMismatch) and "over all fragments" in error.message


@pytest.mark.parametrize("num_entries", [0, 5])
def test_a_commit_over_fewer_parts_than_the_reservation_needs_is_refused(num_entries):
    """All parts are here; whoever counts fewer of them may not know the last."""

    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        for layer in range(2):
            await source.frame(0, source.entries(layer))
        checksum = frames.combined_checksum(source.checksums)
        await source.say(frames.Commit(0, num_entries, checksum, FIRST, frozenset()))
        await settle()

    message = f"6 fragments are here and the commit counts {num_entries}, the reservation needs 6"
    assert failure(scenario).message == message


def test_a_restart_forgets_what_came_before_it():
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        for layer in range(2):
            await source.frame(0, source.entries(layer))
        await source.say(frames.Restart(1))
        await source.frame(1, source.entries(0))
        for_all = source.entries(1)
        _, tallies = source.pool.gather(for_all)
        source.checksums[1, 0] = frames.keyed_checksums(TRANSFER, 1, for_all, tallies)
        await source.commit(1, FIRST)
        await settle()
        before = world.host.names()
        await source.frame(1, source.entries(1))
        await settle()
        after = world.host.names()
        world.agent.ack(TRANSFER)
        await settle()
        return before, after

    before, after = run(scenario, ReceiveCallbacks())
    assert before == ["starting"], "parts of the old sub-attempt were counted"
    assert after == ["starting", "arrived"]


def test_frames_of_an_older_sub_attempt_are_dropped_and_counted():
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        await source.say(frames.Restart(1))
        await source.frame(0, source.entries(0))
        await settle()
        untouched = not any(world.kv.view(0, 0, 0))
        world.agent.end_fetch(TRANSFER)
        await settle()
        return untouched, world.agent.num_late_frames

    assert run(scenario, ReceiveCallbacks()) == (True, 1)


def test_what_comes_after_everything_has_arrived_is_not_written():
    """The sequence may be attached already: its blocks are its own."""

    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        for layer in range(2):
            await source.frame(0, source.entries(layer))
        await source.commit(0, FIRST)
        await settle()
        world.kv.view(0, 0, 0)[:] = bytes(64)
        await source.frame(0, source.entries(0))
        await source.commit(0, FIRST)
        await settle()
        is_untouched = not any(world.kv.view(0, 0, 0))
        world.agent.ack(TRANSFER)
        await settle()
        return is_untouched, world.agent.num_late_frames

    host = ReceiveCallbacks()
    assert run(scenario, host) == (True, 1)
    assert host.names() == ["starting", "arrived", "closed"]


def test_a_frame_before_anything_was_started_is_no_late_one_but_a_fault():
    async def scenario(world):
        source = await fetched(world)
        await source.frame(0, source.entries(0))
        await settle()

    assert failure(scenario).message == "a frame of 3 fragments was not expected"


@pytest.mark.parametrize("num_valid_tokens", [0, 5, 2**32 - 1])
def test_a_part_cannot_hold_more_tokens_than_its_block(num_valid_tokens):
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        entries = source.entries(0)
        entries["num_valid_tokens"][1] = num_valid_tokens
        await source.frame(0, entries)
        await settle()
        assert not any(world.kv.view(0, 0, 0)), "bytes were written before the claims were checked"

    assert "block 1, which is not in this transfer" in failure(scenario).message


@pytest.mark.parametrize(("field", "first_beyond"), [("layer", 2), ("shard", 1), ("block", 3)])
def test_a_part_lies_within_the_transfer(field, first_beyond):
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        entries = source.entries(0)
        payload, _ = source.pool.gather(entries)
        entries[field][2] = first_beyond
        await source.stream.send(codec.encode_frame(source.number, 0, entries, payload))
        await settle()
        assert not any(world.kv.view(0, 0, 0)), "bytes were written before the claims were checked"

    message = failure(scenario).message
    assert f"{field} {first_beyond}" in message and "not in this transfer" in message


@pytest.mark.parametrize("num_bytes", [0, 3 * 64 - 1, 3 * 64 + 1, 4 * 64])
def test_a_frame_has_as_many_bytes_as_its_parts(num_bytes):
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        payload = memoryview(bytes(range(1, 251)) * 2)[:num_bytes]
        data = codec.encode_frame(source.number, 0, source.entries(0), payload)
        await source.stream.send(data)
        await settle()
        assert not any(any(world.kv.view(0, block, 0)) for block in range(4))

    assert failure(scenario).message == f"a frame has {num_bytes} bytes for 3 fragments"


def test_a_frame_without_bytes_needs_a_pool_that_is_mapped():
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        await source.stream.send(codec.encode_frame(source.number, 0, source.entries(0), None))
        await settle()
        assert not any(any(world.kv.view(0, block, 0)) for block in range(4))

    message = "a frame of 3 fragments names blocks of no pool that is mapped here"
    assert failure(scenario).message == message


def test_a_message_of_the_other_end_is_refused():
    async def scenario(world):
        source = await fetched(world)
        await source.say(frames.Ack())
        await settle()

    assert "sent Ack, which is not its to send" in failure(scenario).message


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_frame_is_refused_for_the_blocks_that_were_handed_out_again_and_for_no_other(taken):
    others = [block for block in range(3) if block != taken]

    async def scenario(world):
        source = await fetched(world)
        generations = tuple(int(block == taken) for block in range(3))
        await reserved(world, source, table=(9, 8, 7), generations=generations)
        for block in others:
            await source.frame(0, source.entries(0)[block : block + 1])
        await settle()
        assert world.host.names() == ["starting"]
        assert all(any(world.kv.view(0, (9, 8, 7)[block], 0)) for block in others)
        await source.frame(0, source.entries(1))
        await settle()
        written = [b for b in (9, 8, 7) if any(world.kv.view(1, b, 0))]
        assert written == [], "a part of a refused frame was written"

    assert f"block {(9, 8, 7)[taken]} has a new owner" in failure(scenario).message


def test_what_crosses_with_the_end_is_not_reported():
    """The worker gave the blocks up: to attach them now would take them from their next owner."""

    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        for layer in range(2):
            await source.frame(0, source.entries(layer))
        await settle()
        receiver = world.agent._receivers[TRANSFER]
        world.agent.end_fetch(TRANSFER)
        whole = frames.combined_checksum(source.checksums)
        receiver.receive(frames.Commit(0, source.checksums.size, whole, FIRST, frozenset()))
        return receiver.is_closed

    host = ReceiveCallbacks()
    assert run(scenario, host)
    assert host.names() == ["starting", "closed"]


# --- the sender has no more to send --------------------------------------------------------------


def test_a_transfer_that_the_peer_does_not_know_is_told_as_such():
    """Its error is one of its own: the router counts it, and makes the attempt again."""

    async def scenario(world):
        source = await fetched(world)
        await source.say(frames.NotFound())
        await settle()
        assert world.agent.transitions[Transition.RECEIVER_NOT_FOUND] == 1

    error = failure(scenario)
    assert type(error) is TransferNotFound
    assert error.message == "the prefill worker does not know this transfer"


@pytest.mark.parametrize(("theirs", "kind"), [
    (WorkerLost("its rank died"), WorkerLost),
    (PoolExhausted("no room"), PoolExhausted),
    (PromptTooLong("9 tokens of 8"), KVTransferError),
    (DeadlineExceeded("too late"), KVTransferError),
])  # fmt: skip
def test_a_peer_that_gives_up_says_why_and_whether_another_attempt_helps_is_not_its_to_say(
    theirs, kind
):
    async def scenario(world):
        source = await fetched(world)
        await source.say(frames.Failed(*to_wire(theirs)))
        await settle()

    error = failure(scenario)
    assert type(error) is kind and error.is_retryable
    assert error.message == f"the prefill worker gave up: {theirs.message}"


def test_a_transfer_whose_tokens_were_all_final_is_finished_and_nothing_failed():
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        await source.say(frames.Finished())
        await settle()
        return world.agent.num_live, world.agent.transitions[Transition.RECEIVER_FINISHED]

    host = ReceiveCallbacks()
    assert run(scenario, host) == (0, 1)
    assert host.names() == ["starting", "finished", "closed"]


def test_a_second_starting_ends_the_stream_and_the_worker_reserves_once():
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        await source.start()
        await settle()

    host = ReceiveCallbacks()
    run(scenario, host)
    assert host.names() == ["starting", "failed", "closed"]
    assert "started this transfer twice" in host.error("failed").message
