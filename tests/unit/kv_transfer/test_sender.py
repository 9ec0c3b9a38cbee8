"""The prefill side of a transfer alone: its receiver keeps no rule."""

import numpy as np
import pytest
from support.peers import (
    FIRST,
    NUM_TOKENS,
    OTHER,
    TRANSFER,
    SendCallbacks,
    blocks_of,
    finished,
    lost,
    offer_of,
    opened,
    partnered,
    run,
    settle,
)

from core.errors import Cancelled, KVTransferError, LayoutMismatch
from core.ports import SharedPool, StreamClosed
from kv_transfer import codec, frames
from kv_transfer.fenced_pool import FencedPool
from kv_transfer.sender import LAST_SUB_ATTEMPT, Sender


def test_a_transfer_goes_from_offer_to_ack():
    async def scenario(world):
        talk = await partnered(world)
        for layer in range(2):
            world.agent.publish(TRANSFER, 0, blocks_of(layer))
        world.agent.commit(TRANSFER, 0, FIRST, frozenset())
        frame, commit = await talk.hear(), await talk.hear()
        await finished(world, talk)
        return len(frame.entries), commit.num_entries, commit.first_tokens

    host = SendCallbacks()
    assert run(scenario, host) == (6, 6, FIRST)
    assert host.names() == ["reserved", "sent", "drained", "drained"]
    assert host.calls[-2:] == [
        ("drained", TRANSFER, 0),
        ("drained", TRANSFER, LAST_SUB_ATTEMPT),
    ]


def test_a_commit_does_not_wait_for_fragments_that_will_not_come():
    """Only what waits for a frame is waited with, for more to share it."""

    async def scenario(world):
        talk = await partnered(world)
        sender = world.agent._streams[TRANSFER].sender
        before = sender.has_fragments
        world.agent.publish(TRANSFER, 0, blocks_of(0))
        published = sender.has_fragments
        await talk.hear()
        after = sender.has_fragments
        world.agent.end_send(TRANSFER, None)
        return before, published, after

    assert run(scenario, SendCallbacks()) == (False, True, False)


def test_a_peer_is_told_once_that_every_first_token_was_final():
    """The worker ends its attempt right after, as a cancelled one: no Failed may follow."""

    async def scenario(world):
        talk = await partnered(world)
        world.agent.commit(TRANSFER, 0, FIRST, frozenset(FIRST))
        num_live = world.agent.num_live
        world.agent.end_send(TRANSFER, Cancelled("the request ended"))
        assert await talk.hear() == frames.Finished()
        with pytest.raises(StreamClosed):
            await talk.hear()
        return num_live

    host = SendCallbacks()
    assert run(scenario, host) == 0
    assert host.calls[1:] == [("drained", TRANSFER, 0), ("drained", TRANSFER, LAST_SUB_ATTEMPT)]


def test_a_sub_attempt_begun_while_the_transfer_ended_is_drained_too():
    """The worker heard of the end only after it had preempted the sequence once more."""

    async def scenario(world):
        await partnered(world)
        world.agent._streams[TRANSFER].sender.end(None)
        world.agent.restart(TRANSFER, 1)
        world.agent.end_send(TRANSFER, None)

    host = SendCallbacks()
    run(scenario, host)
    assert host.calls[-1] == ("drained", TRANSFER, 1)


def test_sub_attempts_before_the_one_that_finds_no_transfer_are_drained():
    """The new one may be pinned again, and its pins go when the transfer is ended."""

    async def scenario(world):
        world.agent.restart(TRANSFER, 3)
        return world.agent.num_unknown

    host = SendCallbacks()
    assert run(scenario, host) == 1
    assert host.calls == [("drained", TRANSFER, 2)]


def test_what_an_older_sub_attempt_publishes_is_not_sent():
    """The worker's loop may run ahead: its blocks belong to somebody else by then."""

    async def scenario(world):
        talk = await partnered(world)
        world.agent.restart(TRANSFER, 1)
        assert await talk.hear() == frames.Restart(1)
        world.agent.publish(TRANSFER, 0, blocks_of(0))
        world.agent.commit(TRANSFER, 0, FIRST, frozenset())
        await settle()
        world.agent.publish(TRANSFER, 1, blocks_of(1))
        frame = await talk.hear()
        world.agent.end_send(TRANSFER, None)
        return frame.sub_attempt, frame.entries["layer"].tolist()

    assert run(scenario, SendCallbacks()) == (1, [1, 1, 1])


def test_an_ack_that_crosses_with_the_end_is_not_reported():
    async def scenario(world):
        await partnered(world)
        sender = world.agent._streams[TRANSFER].sender
        world.agent.end_send(TRANSFER, Cancelled("the request ended"))
        sender.receive(frames.Ack(), 0.0)

    host = SendCallbacks()
    run(scenario, host)
    assert host.names() == ["reserved", "drained"]


def test_no_block_is_read_any_more_once_everything_has_arrived():
    """Blocks are free again with the acknowledgement, not only when the stream has ended."""

    async def scenario(world):
        talk = await partnered(world)
        sender = world.agent._streams[TRANSFER].sender
        for layer in range(2):
            world.agent.publish(TRANSFER, 0, blocks_of(layer))
        sender.receive(frames.Ack(), 0.0)
        found = sender.is_closed, sender.has_fragments
        await finished(world, talk)
        return found

    host = SendCallbacks()
    assert run(scenario, host) == (True, False)
    assert host.names()[:3] == ["reserved", "sent", "drained"]


def test_a_handshake_that_failed_closes_the_transfer_and_says_only_why():
    async def scenario(world):
        world.agent.offer(offer_of(world))
        await opened(world)
        world.agent.start(TRANSFER, NUM_TOKENS)
        sender = world.agent._streams[TRANSFER].sender
        sender.refuse(LayoutMismatch("other blocks"))
        found = sender.is_closed, [type(m).__name__ for m in sender._control]
        await settle()
        world.agent.end_send(TRANSFER, None)
        return found

    host = SendCallbacks()
    is_closed, queued = run(scenario, host)
    assert is_closed and queued == ["Failed"]
    assert host.names()[:2] == ["lost", "drained"]


def test_parts_are_sent_again_so_often_and_no_more():
    async def scenario(world):
        talk = await partnered(world)
        world.agent.publish(TRANSFER, 0, blocks_of(0))
        await talk.hear()
        for _ in range(frames.MAX_RESENDS):
            await talk.say(frames.Resend(0, ((0, 0, 1),)))
            assert (await talk.hear()).entries["block"].tolist() == [1]
        assert "lost" not in world.host.names()
        await talk.say(frames.Resend(0, ((0, 0, 1),)))
        await settle()

    assert "asked for 65 fragments again, the limit is 64" in lost(scenario).message


@pytest.mark.parametrize("asked", [((1, 0, 2),), ((0, 0, 1), (1, 0, 2)), ((1, 0, 2), (0, 0, 1))])
def test_parts_that_were_never_sent_cannot_be_asked_for(asked):
    async def scenario(world):
        talk = await partnered(world)
        world.agent.publish(TRANSFER, 0, blocks_of(0))
        await talk.hear()
        await talk.say(frames.Resend(0, asked))
        await settle()

    assert f"asked for {len(asked)} fragments again, the limit is 64, of what was sent" in (
        lost(scenario).message
    )


def test_whoever_asks_for_no_part_again_is_not_served_further():
    """Each such question would cost a look at all that was sent, and none would count."""

    async def scenario(world):
        talk = await partnered(world)
        await talk.say(frames.Resend(0, ()))
        await settle()

    assert "asked for no fragment again" in lost(scenario).message


@pytest.mark.parametrize("have_tokens", [NUM_TOKENS, NUM_TOKENS + 4, 3])
def test_nobody_has_the_whole_prompt_or_a_part_of_a_block(have_tokens):
    """The last token is always computed: with a claim of all there is nothing to wait for."""

    async def scenario(world):
        world.agent.offer(offer_of(world))
        talk = await opened(world)
        world.agent.start(TRANSFER, NUM_TOKENS)
        await talk.hear()
        await talk.say(frames.Reserved(0, have_tokens))
        await settle()

    host = SendCallbacks()
    error = lost(scenario, host)
    assert f"claims to have {have_tokens} tokens" in error.message
    assert "reserved" not in host.names()


def test_a_second_reserved_ends_the_transfer():
    async def scenario(world):
        talk = await partnered(world)
        await talk.say(frames.Reserved(0, 4))
        await settle()

    host = SendCallbacks()
    assert "reserved twice" in lost(scenario, host).message
    assert host.names().count("reserved") == 1


def test_a_fetch_stream_that_breaks_is_told_of_as_lost():
    async def scenario(world):
        talk = await partnered(world)
        talk.stream.reset()
        await settle()

    assert lost(scenario).message == "the decode worker's fetch stream was lost"


# --- the pool is replaced ------------------------------------------------------------------------


def test_a_pool_that_was_replaced_since_the_offer_is_not_served():
    async def scenario(world):
        world.agent.offer(offer_of(world))
        world.kv.replace()
        talk = await opened(world)
        answer = await talk.hear()
        assert "generation 2, this transfer was promised in 1" in answer.message
        return answer.kind

    host = SendCallbacks()
    assert run(scenario, host) == "KVTransferError"
    assert host.names()[:2] == ["lost", "drained"]


def test_no_frame_is_built_from_a_replaced_pool():
    async def scenario(world):
        talk = await partnered(world)
        world.agent.publish(TRANSFER, 0, blocks_of(0))
        world.kv.replace()
        with pytest.raises(StreamClosed):  # and no frame before it
            await talk.hear()

    host = SendCallbacks()
    run(scenario, host)
    assert host.names() == ["reserved", "lost", "drained"]
    assert "generation 2, this transfer was promised in 1" in host.error("lost").message


@pytest.mark.parametrize("is_current", [True, False])
def test_a_peer_that_mapped_an_older_pool_is_told_at_once(is_current):
    """Its early Open waited here while the ranks started again: it would read the old memory."""

    class Shared:
        generation = 1

        def shared(self):
            return SharedPool(b"n" * 16, (), ())

    fence = FencedPool(Shared(), 1)
    if is_current:
        fence.check_mapping(b"n" * 16)
        return
    with pytest.raises(KVTransferError, match="mapped a KV pool that was replaced"):
        fence.check_mapping(b"o" * 16)


# --- messages that can be sent -------------------------------------------------------------------


@pytest.mark.parametrize("is_mapped", [True, False])
@pytest.mark.parametrize("frame_bytes", [4096, 1 << 20, 1 << 24])
@pytest.mark.parametrize("fragment_bytes", [64, 1024, 4096, 16384, 3 << 20])
def test_a_frame_with_its_entries_is_as_long_as_allowed(is_mapped, frame_bytes, fragment_bytes):
    count = frames.fragments_per_frame(frame_bytes, fragment_bytes, is_mapped=is_mapped)
    payload = None if is_mapped else memoryview(bytes(count * fragment_bytes))
    data = codec.encode_frame(1, 0, np.zeros(count, frames.ENTRY), payload)
    assert len(data) <= frames.MAX_MESSAGE_BYTES
    assert len(data) <= frame_bytes or count == 1
    if count > 1 and not is_mapped:
        assert len(data) + fragment_bytes + frames.ENTRY.itemsize > frame_bytes
    if is_mapped:
        assert count * fragment_bytes <= max(fragment_bytes, frames.MAPPED_FRAMES * frame_bytes)


def test_what_no_transport_carries_is_refused_where_it_is_made():
    payload = memoryview(bytes(frames.MAX_MESSAGE_BYTES))
    with pytest.raises(KVTransferError, match="a message has at most 16777216"):
        codec.encode_frame(1, 0, np.zeros(1, frames.ENTRY), payload)
    parts = tuple((0, 0, n) for n in range(100_000))
    with pytest.raises(KVTransferError, match="1200003 bytes, the limit is 1048576"):
        codec.encode(0, frames.Resend(0, parts))


def test_workers_whose_parts_no_message_carries_do_not_fit_together(monkeypatch):
    """It is said when they meet: trying again on a fresh stream would never help."""
    monkeypatch.setattr(frames, "MAX_MESSAGE_BYTES", 100)

    async def scenario(world):
        world.agent.offer(offer_of(world))
        talk = await opened(world)
        return await talk.hear()

    host = SendCallbacks()
    answer = run(scenario, host)
    assert answer.kind == "LayoutMismatch" and "lower engine.block_size_tokens" in answer.message
    assert isinstance(host.error("lost"), LayoutMismatch)


# --- faults of this side -------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["publish", "take_kv", "receive", "open"])
def test_a_bug_in_a_sender_fails_its_transfer_alone(what, monkeypatch, caplog):
    whole = getattr(Sender, what)

    def breaks(self, *args):
        if self.offer.transfer_id == TRANSFER:
            raise ValueError("cannot reshape array")
        return whole(self, *args)

    monkeypatch.setattr(Sender, what, breaks)

    async def scenario(world):
        talks = []
        for name in (TRANSFER, OTHER):
            world.agent.offer(offer_of(world, name))
            talks.append(await opened(world, name))
            world.agent.start(name, NUM_TOKENS)
        await settle()
        for talk in talks:
            try:
                await talk.say(frames.Reserved(0, 0))
            except Exception:
                assert talk is talks[0]
        await settle()
        for name in (TRANSFER, OTHER):
            world.agent.publish(name, 0, blocks_of(0))
        await talks[1].hear()
        frame = await talks[1].hear()
        await settle()
        world.agent.end_send(OTHER, None)
        return len(frame.entries)

    host = SendCallbacks()
    assert run(scenario, host) == 3
    assert "ValueError: cannot reshape array" in caplog.text
    error = host.error("lost")
    assert isinstance(error, KVTransferError) and error.is_retryable
    assert host.names()[-1] == "drained" and "lost" not in host.names(OTHER)
