"""The rules of the hand-over one by one, on virtual time, each fault checked to have happened."""

import asyncio
from dataclasses import replace

import pytest
from support.virtual import PROMPT, ask, expected, run, unit

from core.config import EngineConfig
from core.errors import (
    KVTransferError,
)
from core.ids import TransferId
from core.session import Role, StepFrame, Submit
from core.types import SamplingParams
from kv_transfer import codec, frames
from kv_transfer.frame_builder import FrameBuilder


def test_a_flipped_byte_is_caught_and_healed():
    async def scenario(cluster):
        flipped = []

        def flip(stream, message):
            if isinstance(message, bytes) and message[:1] == b"\x05" and not flipped:
                flipped.append(message)
                return message[:-5] + bytes([message[-5] ^ 4]) + message[-4:]
            return message

        cluster.hub.tamper = flip
        tokens, ended = await ask(cluster)
        return flipped, tokens, ended, unit(cluster, Role.DECODE).agent.num_resent

    flipped, tokens, ended, resent = run(scenario)
    assert flipped and resent == 1
    assert ended.error is None and ended.timing.attempts == ("0:pd:ok",)
    assert tokens == expected()


def test_a_prompt_is_load_where_it_is_computed_and_not_where_it_arrives():
    async def scenario(cluster):
        running = asyncio.ensure_future(ask(cluster))
        while not cluster.orchestrator.num_running:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        pending = {c.descriptor.role: c.pending_tokens for c in cluster.sessions.candidates()}
        await running
        return pending

    assert run(scenario) == {Role.PREFILL: len(PROMPT), Role.DECODE: 0}


def test_a_part_damaged_twice_redoes_the_attempt():
    async def scenario(cluster):
        target, flips = [], []

        def flip(stream, message):
            """Damage one part in its first frame, and again when it is sent again."""
            if not (isinstance(message, bytes) and message[:1] == b"\x05") or len(flips) == 2:
                return message
            entries = codec.decode(message)[1].entries
            parts = [tuple(int(e[name]) for name in ("layer", "shard", "block")) for e in entries]
            target[:] = target or [parts[0]]
            if target[0] not in parts:
                return message
            size = cluster.layout.layer_block_bytes
            at = len(message) - (len(parts) - parts.index(target[0])) * size
            flips.append(target[0])
            return message[:at] + bytes([message[at] ^ 4]) + message[at + 1 :]

        cluster.hub.tamper = flip
        return flips, await ask(cluster)

    flips, (tokens, ended) = run(scenario)
    assert len(flips) == 2 and len(set(flips)) == 1
    assert ended.error is None and ended.timing.attempts == ("0:pd:kv_transfer_failed", "1:pd:ok")
    assert tokens == expected()


def test_a_late_frame_after_the_blocks_are_reused_is_refused():
    """A frame is held back until its transfer has ended and the blocks belong to someone else."""

    async def scenario(cluster):
        held = []

        def hold(stream, message):
            if isinstance(message, bytes) and message[:1] == b"\x05" and not held:
                held.append((stream, message))
                return None
            return message

        cluster.hub.tamper = hold
        task = asyncio.get_running_loop().create_task(
            cluster.generate(cluster.request("victim", PROMPT, SamplingParams(max_tokens=4)))
        )
        while not held:
            await asyncio.sleep(0.001)
        receiver = next(iter(unit(cluster, Role.DECODE).agent._receivers.values()))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.1)
        cluster.hub.tamper = lambda stream, message: message
        other = asyncio.get_running_loop().create_task(
            ask(cluster, "other", tuple(range(60, 10, -1)))
        )
        await asyncio.sleep(0.15)
        pool = unit(cluster, Role.DECODE).pool
        reservation = receiver._blocks.reservation
        reused = [
            b
            for b, g in zip(reservation.block_ids, reservation.generations, strict=True)
            if pool.generation(b) != g
        ]
        # The frame arrives now, at the receiver it was meant for, as if the network had kept it.
        with pytest.raises(KVTransferError, match="new owner"):
            receiver._accept(codec.decode(held[0][1])[1])
        return reused, await other

    reused, (tokens, ended) = run(
        scenario, engine=EngineConfig(block_size_tokens=4, num_blocks=20, max_step_tokens=32)
    )
    assert reused, "the blocks were not reused, so nothing was proved"
    assert ended.error is None
    assert tokens == run(lambda c: ask(c, "other", tuple(range(60, 10, -1))))[0]


def test_a_part_that_was_never_sent_fails_the_attempt_at_once(monkeypatch):
    """The commit counts what was sent: a receiver that waited for the rest would wait for ever."""
    queue, left_out = FrameBuilder._queue, []

    def forgetful(self, entries):
        if not left_out:
            left_out.append(entries[:1])
            entries = entries[1:]
        queue(self, entries)

    monkeypatch.setattr(FrameBuilder, "_queue", forgetful)

    async def scenario(cluster):
        started_at = cluster.clock.now_s()
        tokens, ended = await ask(cluster)
        return tokens, ended, cluster.clock.now_s() - started_at

    tokens, ended, took_s = run(scenario)
    assert left_out and ended.error is None and took_s < 3
    assert ended.timing.attempts == ("0:pd:kv_transfer_failed", "1:pd:ok")
    assert tokens == expected()


def test_frames_leave_while_prefill_still_computes():
    async def scenario(cluster):
        frame_at, token_at = [], []
        loop = asyncio.get_running_loop()

        def watch(stream, message):
            if isinstance(message, bytes) and message[:1] == b"\x05":
                frame_at.append(loop.time())
            if isinstance(message, StepFrame) and message.deltas and not token_at:
                token_at.append(loop.time())
            return message

        cluster.hub.tamper = watch
        await ask(cluster)
        return frame_at, token_at

    frame_at, token_at = run(scenario)
    assert sum(at < token_at[0] for at in frame_at) >= len(frame_at) // 2


def test_an_open_before_its_submit_is_parked_and_one_without_is_not_found():
    async def scenario(cluster):
        prefill, decode = unit(cluster, Role.PREFILL), unit(cluster, Role.DECODE)
        order = frames.Open(
            TransferId(b"x" * 16), decode.descriptor.worker_id, decode.descriptor.incarnation,
            cluster.layout.identity, *cluster.layout.shape,
        )  # fmt: skip
        stream = await cluster.hub.dial("stranger", prefill.descriptor.transfer_address)
        started_at = cluster.clock.now_s()
        await stream.send(codec.encode(0, order))
        answer = codec.decode(await stream.recv())[1]
        return answer, cluster.clock.now_s() - started_at, prefill.agent.num_unknown

    answer, waited_s, unknown = run(scenario)
    assert answer == frames.NotFound() and unknown == 1
    assert 1.0 <= waited_s < 1.2


def test_a_burst_whose_submits_reach_prefill_late_loses_no_attempt():
    """The decode worker opens at once what the prefill worker has not heard of yet."""

    async def scenario(cluster):
        loop, hub = asyncio.get_running_loop(), cluster.hub
        prefill = unit(cluster, Role.PREFILL)

        def late(stream, message):
            if isinstance(getattr(message, "message", None), Submit):
                if stream.peer.node == prefill.descriptor.worker_id:
                    stream.last_arrival = max(stream.last_arrival, loop.time() + 0.3)
            return [message]

        hub.mangle = late
        replies = asyncio.gather(
            *(ask(cluster, f"r{i}", PROMPT[:6], max_tokens=2) for i in range(100))
        )
        await asyncio.sleep(0.2)
        num_parked = prefill.agent.num_live
        return num_parked, await replies

    num_parked, replies = run(scenario)
    assert num_parked == 100
    assert [ended.timing.attempts for _, ended in replies] == [("0:pd:ok",)] * 100


def test_a_fetch_by_a_peer_that_submit_did_not_name_is_refused():
    async def scenario(cluster):
        prefill = unit(cluster, Role.PREFILL)
        stolen = []

        def spy(stream, message):
            if isinstance(message, Submit) and message.task == "prefill" and not stolen:
                stolen.append(message)
            return message

        cluster.hub.tamper = spy
        running = asyncio.get_running_loop().create_task(ask(cluster, max_tokens=20))
        while not prefill.agent._streams:
            await asyncio.sleep(0.0001)
        order = frames.Open(
            stolen[0].transfer_id, stolen[0].peer_id, stolen[0].peer_incarnation ^ 2,
            cluster.layout.identity, *cluster.layout.shape,
        )  # fmt: skip
        stream = await cluster.hub.dial("thief", prefill.descriptor.transfer_address)
        await stream.send(codec.encode(0, order))
        return codec.decode(await stream.recv())[1], await running

    answer, (tokens, ended) = run(scenario)
    assert answer == frames.NotFound()
    assert ended.error is None and tokens == expected(max_tokens=20)


def test_source_blocks_are_freed_when_decode_never_comes():
    async def scenario(cluster):
        lost = cluster.hub.listen("nowhere", "fetch", None)
        del cluster.hub._listeners[lost]
        decode = unit(cluster, Role.DECODE)
        cluster.membership.join(replace(decode.descriptor, transfer_address=lost))
        prefill = unit(cluster, Role.PREFILL)
        real = decode.agent.fetch
        decode.agent.fetch = lambda order: None
        task = asyncio.get_running_loop().create_task(
            cluster.generate(cluster.request("r", PROMPT, SamplingParams(max_tokens=4), 30))
        )
        await asyncio.sleep(1)
        held = prefill.pool.num_held
        await cluster.sessions.close()
        cluster.hub.reset("session")
        await asyncio.sleep(7.5)
        freed = prefill.pool.num_held
        decode.agent.fetch = real
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return held, freed

    held, freed = run(scenario)
    assert held > 0
    assert freed == 0


def test_prefix_hits_leave_before_the_first_chunk_is_computed():
    async def scenario(cluster):
        await ask(cluster, "first", max_tokens=4)
        unit(cluster, Role.DECODE).pool.drop_cache()
        frame_at, steps = [], []
        prefill = unit(cluster, Role.PREFILL)

        def watch(stream, message):
            if isinstance(message, bytes) and message[:1] == b"\x05":
                frame_at.append((cluster.clock.now_s(), len(codec.decode(message)[1].entries)))
            return message

        cluster.hub.tamper = watch
        commit = prefill.scheduler.commit

        def committing(plan, result, now_s):
            steps.append(now_s)
            return commit(plan, result, now_s)

        prefill.scheduler.commit = committing
        tokens, ended = await ask(cluster, "second", max_tokens=4)
        return frame_at, steps, ended, tokens

    frame_at, steps, ended, tokens = run(scenario, step_s=0.05)
    assert ended.usage.cached_tokens == 56
    assert (
        frame_at[0][0] < steps[0] - 0.03
        and sum(n for at, n in frame_at if at < steps[0] - 0.03) >= 14 * 3
    )
    assert tokens == expected(max_tokens=4)


@pytest.mark.parametrize(("max_tokens", "path"), [(1, "local"), (2, "pd")])
def test_a_request_for_one_token_is_not_handed_over(max_tokens, path):
    """Prefill would draw that token itself: there is nothing to decode elsewhere."""

    async def scenario(cluster):
        tokens, ended = await ask(cluster, max_tokens=max_tokens, ignore_eos=True)
        return len(tokens[0]), ended.timing.attempts

    assert run(scenario) == (max_tokens, (f"0:{path}:ok",))
