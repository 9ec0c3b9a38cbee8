"""The rules of the hand-over one by one, on virtual time, each fault checked to have happened."""

import asyncio
from dataclasses import replace

import pytest
from support.events import read_events

from core.config import EngineConfig, PlacementConfig, RouterConfig, TransferConfig
from core.errors import (
    Cancelled,
    Draining,
    DuplicateRequest,
    KVTransferError,
    NoWorker,
    PoolExhausted,
    PromptTooLong,
    Quarantined,
    WorkerLost,
)
from core.ids import TransferId
from core.session import Credit, Role, StepFrame, Submit
from core.types import RequestEnded, SamplingParams, TextDelta
from engine.scheduler import MAX_ANNOUNCED
from kv_transfer import frames
from simulation.cluster import Shape, SimCluster
from simulation.loop import run_virtual

PROMPT = tuple(range(1, 60))
PD = PlacementConfig(path="pd")


def run(scenario, **shape):
    """Run a scenario on a fresh cluster, then check that nothing is left."""

    async def main():
        cluster = SimCluster(Shape(**{"prefill": 1, "decode": 1, "placement": PD, **shape}), seed=1)
        await cluster.start()
        result = await scenario(cluster)
        await cluster.rest()
        await cluster.stop()
        return result

    return run_virtual(main())


async def ask(cluster, name="r", prompt=PROMPT, timeout_s=120.0, **sampling):
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **sampling})
    events = await cluster.generate(cluster.request(name, prompt, params, timeout_s))
    return read_events(events), events[-1]


def attempt_of(unit, name):
    """A worker's attempt at a request: workers know it by a key of the run, which begins with the request's id."""
    return next((a for key, a in unit.worker.attempts.items() if key.startswith(f"{name}~")), None)


def unit(cluster, role):
    return next(u for u in cluster.units.values() if u.descriptor.role is role)


def expected(**sampling):
    return run(lambda c: ask(c, **sampling))[0]


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
        return flipped, tokens, ended, unit(cluster, Role.DECODE).agent.num_healed

    flipped, tokens, ended, healed = run(scenario)
    assert flipped and healed == 1
    assert ended.error is None and ended.anatomy.attempts == ("0:pd:ok",)
    assert tokens == expected()


def test_a_part_damaged_twice_redoes_the_attempt():
    async def scenario(cluster):
        target, flips = [], []

        def flip(stream, message):
            """Damage one part in its first frame, and again when it is sent again."""
            if not (isinstance(message, bytes) and message[:1] == b"\x05") or len(flips) == 2:
                return message
            entries = frames.decode(message)[1].entries
            parts = [(e.layer, e.shard, e.block) for e in entries]
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
    assert ended.error is None and ended.anatomy.attempts == ("0:pd:kv_transfer_failed", "1:pd:ok")
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
        other = asyncio.get_running_loop().create_task(ask(cluster, "other", tuple(range(60, 10, -1))))
        await asyncio.sleep(0.15)
        pool = unit(cluster, Role.DECODE).pool
        reservation = receiver._reservation
        reused = [
            b for b, g in zip(reservation.block_ids, reservation.generations, strict=True) if pool.generation(b) != g
        ]
        # The frame arrives now, at the receiver it was meant for, as if the network had kept it.
        with pytest.raises(KVTransferError, match="new owner"):
            receiver._accept(frames.decode(held[0][1])[1])
        return reused, await other

    reused, (tokens, ended) = run(scenario, engine=EngineConfig(block_size_tokens=4, num_blocks=20, max_step_tokens=32))
    assert reused, "the blocks were not reused, so nothing was proved"
    assert ended.error is None
    assert tokens == run(lambda c: ask(c, "other", tuple(range(60, 10, -1))))[0]


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
            cluster.layout.content_digest, *cluster.layout.shape,
        )  # fmt: skip
        stream = await cluster.hub.dial("stranger", prefill.descriptor.transfer_address)
        started_at = cluster.clock.now_s()
        await stream.send(frames.encode(0, order))
        answer = frames.decode(await stream.recv())[1]
        return answer, cluster.clock.now_s() - started_at, prefill.agent.num_unknown

    answer, waited_s, unknown = run(scenario)
    assert answer == frames.NotFound() and unknown == 1
    assert 1.0 <= waited_s < 1.2


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
        while not prefill.agent._senders:
            await asyncio.sleep(0.0001)
        order = frames.Open(
            stolen[0].transfer_id, stolen[0].peer_id, stolen[0].peer_incarnation ^ 2,
            cluster.layout.content_digest, *cluster.layout.shape,
        )  # fmt: skip
        stream = await cluster.hub.dial("thief", prefill.descriptor.transfer_address)
        await stream.send(frames.encode(0, order))
        return frames.decode(await stream.recv())[1], await running

    answer, (tokens, ended) = run(scenario)
    assert answer == frames.NotFound()
    assert ended.error is None and tokens == expected(max_tokens=20)


def test_a_dropped_session_resumes_without_gap_or_repeat():
    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(ask(cluster, max_tokens=40))
        cuts = 0
        for _ in range(3):
            await asyncio.sleep(0.12)
            cuts += cluster.hub.reset("session")
        tokens, ended = await running
        return cuts, tokens, ended, sum(link.num_reconnects for link in cluster.links.all())

    cuts, tokens, ended, reconnects = run(scenario)
    assert cuts > 0 and reconnects > 0
    assert ended.error is None and ended.anatomy.attempts == ("0:pd:ok",)
    assert tokens == expected(max_tokens=40)


def test_a_worker_cancels_the_requests_of_a_router_that_stays_away():
    async def scenario(cluster):
        request = cluster.request("orphan", PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
        task = asyncio.get_running_loop().create_task(cluster.generate(request))
        await asyncio.sleep(0.2)
        held = [u.pool.num_held for u in cluster.units.values()]
        await cluster.links.close()
        cluster.hub.reset("session")
        await asyncio.sleep(7)
        after = (
            [u.pool.num_held for u in cluster.units.values()],
            [len(u.worker.attempts) for u in cluster.units.values()],
        )
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return held, after

    held, (blocks, attempts) = run(
        scenario, engine=EngineConfig(block_size_tokens=4, num_blocks=128, max_step_tokens=32)
    )
    assert sum(held) > 0
    assert sum(blocks) == 0 and sum(attempts) == 0


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
        await cluster.links.close()
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


def test_a_full_decode_pool_makes_requests_wait_in_line_and_loses_none():
    async def scenario(cluster):
        return await asyncio.gather(*(ask(cluster, f"r{i}", PROMPT[i:], max_tokens=20) for i in range(8)))

    tight = EngineConfig(block_size_tokens=4, num_blocks=40, max_step_tokens=64)
    replies = run(scenario, engine=tight, transfer=TransferConfig(reserve_wait_s=60))
    assert all(ended.error is None for _, ended in replies)


def test_a_reservation_that_waits_too_long_is_refused_with_numbers():
    async def scenario(cluster):
        hog = asyncio.get_running_loop().create_task(ask(cluster, "hog", PROMPT, max_tokens=40, ignore_eos=True))
        await asyncio.sleep(0.5)
        tokens, ended = await ask(cluster, "late", tuple(range(90, 10, -1)), max_tokens=5)
        await hog
        return ended

    ended = run(
        scenario,
        engine=EngineConfig(block_size_tokens=4, num_blocks=30, max_step_tokens=64),
        transfer=TransferConfig(reserve_wait_s=0.05),
        step_s=0.05,
    )
    assert isinstance(ended.error, PoolExhausted)
    assert "free blocks within 0.05 s" in ended.error.message


def test_what_can_never_fit_is_refused_by_the_worker_too():
    async def scenario(cluster):
        return await ask(cluster, prompt=PROMPT, max_tokens=120)

    tokens, ended = run(scenario, engine=EngineConfig(block_size_tokens=4, num_blocks=20, max_step_tokens=64))
    assert isinstance(ended.error, PromptTooLong) and "pool holds 20" in ended.error.message
    assert tokens == {}


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("delay_s", [0.01, 0.05, 0.12, 0.25])
def test_a_killed_worker_is_survived_token_for_token(role, delay_s):
    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(ask(cluster, max_tokens=30, ignore_eos=True))
        await asyncio.sleep(delay_s)
        victim = next(n for n, u in cluster.units.items() if u.descriptor.role is role and u.worker.attempts)
        await cluster.kill(victim)
        killed_at = cluster.clock.now_s()
        tokens, ended = await running
        return tokens, ended, killed_at

    tokens, ended, _ = run(scenario, prefill=2, decode=2, placement=PlacementConfig(path="auto"))
    assert ended.error is None
    assert tokens == run(lambda c: ask(c, max_tokens=30, ignore_eos=True), placement=PlacementConfig(path="auto"))[0]


def test_the_only_decode_worker_dies_and_prefill_finishes_the_request():
    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(ask(cluster, max_tokens=30, ignore_eos=True))
        await asyncio.sleep(0.2)
        await cluster.kill("decode2")
        started_at = cluster.clock.now_s()
        tokens, ended = await running
        return tokens, ended, cluster.clock.now_s() - started_at

    tokens, ended, took_s = run(scenario, placement=PlacementConfig(path="auto"))
    assert ended.error is None and ended.anatomy.path == "local" and len(ended.anatomy.attempts) == 2
    assert took_s < 5
    assert tokens == expected(max_tokens=30, ignore_eos=True)


def test_with_pd_forced_and_no_decode_left_there_is_one_typed_error_within_five_seconds():
    async def scenario(cluster):
        cluster.membership.starting = 1
        running = asyncio.get_running_loop().create_task(ask(cluster, max_tokens=30, ignore_eos=True))
        await asyncio.sleep(0.2)
        await cluster.kill("decode2")
        started_at = cluster.clock.now_s()
        tokens, ended = await running
        return tokens, ended, cluster.clock.now_s() - started_at

    tokens, ended, took_s = run(scenario)
    assert isinstance(ended.error, NoWorker) and took_s < 5
    assert tokens[0] == expected(max_tokens=30, ignore_eos=True)[0][: len(tokens[0])]


def test_a_hung_worker_is_found_within_four_seconds():
    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(ask(cluster, max_tokens=30, ignore_eos=True))
        await asyncio.sleep(0.2)
        decode = next(u for u in cluster.units.values() if u.descriptor.role is Role.DECODE and u.worker.attempts)

        async def stuck(plan, on_layer):
            await asyncio.sleep(3600)

        decode.worker._loop._runner.execute = stuck
        started_at = cluster.clock.now_s()
        tokens, ended = await running
        took_s = cluster.clock.now_s() - started_at
        await cluster.kill(decode.descriptor.worker_id)
        return tokens, ended, took_s

    tokens, ended, took_s = run(scenario, decode=2)
    assert ended.error is None and took_s < 4.5
    assert tokens == expected(max_tokens=30, ignore_eos=True)


def test_a_request_of_death_is_quarantined_and_kills_at_most_three():
    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(ask(cluster, "poison", max_tokens=20, ignore_eos=True))
        innocent = asyncio.get_running_loop().create_task(
            ask(cluster, "innocent", PROMPT[:30], max_tokens=60, ignore_eos=True)
        )
        deaths = 0
        while not running.done() and deaths < 10:
            await asyncio.sleep(0.05)
            for name, u in list(cluster.units.items()):
                if (
                    attempt_of(u, "poison") is not None
                    and u.descriptor.role is Role.DECODE
                    and attempt_of(u, "poison").ended is None
                ):
                    await cluster.kill(name)
                    deaths += 1
                    break
        return deaths, await running, await innocent

    deaths, (_, ended), (tokens, innocent) = run(
        scenario, decode=6, prefill=2, router=RouterConfig(max_fault_attempts=5)
    )
    assert isinstance(ended.error, Quarantined) and deaths == 3
    assert innocent.error is None
    assert tokens == run(lambda c: ask(c, "innocent", PROMPT[:30], max_tokens=60, ignore_eos=True))[0]


def test_a_slow_client_is_parked_by_credit_and_goes_on_when_it_reads():
    async def scenario(cluster):
        request = cluster.request("slow", PROMPT, SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0))
        events = []
        running = asyncio.get_running_loop().create_task(cluster.orchestrator.run(request, events.append))
        await asyncio.sleep(5)
        parked = sum(len(e.token_ids) for e in events if isinstance(e, TextDelta))
        other = await ask(cluster, "other", PROMPT[:20], max_tokens=5)
        while not running.done():
            taken = sum(len(e.token_ids) for e in events if isinstance(e, TextDelta))
            cluster.orchestrator.consumed(request.run_key, taken)
            await asyncio.sleep(0.05)
        await running
        return parked, other, events

    parked, (_, other), events = run(scenario, router=RouterConfig(credit_positions=10))
    assert parked == 10
    assert other.error is None
    assert isinstance(events[-1], RequestEnded) and events[-1].usage.completion_tokens == 60


def test_a_cancel_before_its_submit_leaves_a_tombstone():
    async def scenario(cluster):
        decode = unit(cluster, Role.DECODE)
        decode.worker.cancel("ghost", 3)
        request = cluster.request("ghost", PROMPT, SamplingParams(max_tokens=4))
        decode.worker.submit("router", Submit(request, 3, "local", emitted=((),)))
        return decode.worker.num_stale, dict(decode.worker.attempts)

    stale, attempts = run(scenario)
    assert stale == 1 and attempts == {}


def test_a_submit_with_an_old_epoch_is_dropped():
    async def scenario(cluster):
        decode = unit(cluster, Role.DECODE)
        request = cluster.request("r", PROMPT, SamplingParams(max_tokens=4))
        decode.worker.submit("router", Submit(request, 2, "local", emitted=((),)))
        decode.worker.submit("router", Submit(request, 1, "local", emitted=((),)))
        epoch = decode.worker.attempts["r"].epoch
        decode.worker.cancel("r", 2)
        return epoch, decode.worker.num_stale

    assert run(scenario) == (2, 1)


def test_two_tenants_never_share_blocks():
    async def scenario(cluster):
        cached = []
        for name, scope in (("a1", "a"), ("a2", "a"), ("b1", "b")):
            request = cluster.request(name, PROMPT, SamplingParams(max_tokens=4), scope=scope)
            events = await cluster.generate(request)
            cached.append(events[-1].usage.cached_tokens)
        return cached

    assert run(scenario) == [0, 56, 0]


def test_prefill_alone_serves_when_no_decode_worker_lives():
    tokens, ended = run(lambda c: ask(c), decode=0, placement=PlacementConfig(path="auto"))
    assert ended.error is None and ended.anatomy.path == "local" and tokens == expected()


def test_without_any_worker_the_refusal_is_immediate():
    tokens, ended = run(lambda c: ask(c), prefill=0, decode=0, placement=PlacementConfig(path="auto"))
    assert isinstance(ended.error, NoWorker) and ended.anatomy.e2e_s < 0.1


def test_worker_lost_is_retryable_and_counts():
    assert WorkerLost("x").is_retryable


def test_prefix_hits_leave_before_the_first_chunk_is_computed():
    async def scenario(cluster):
        await ask(cluster, "first", max_tokens=4)
        unit(cluster, Role.DECODE).pool.drop_cache()
        frame_at, steps = [], []
        prefill = unit(cluster, Role.PREFILL)

        def watch(stream, message):
            if isinstance(message, bytes) and message[:1] == b"\x05":
                frame_at.append((cluster.clock.now_s(), len(frames.decode(message)[1].entries)))
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
    assert frame_at[0][0] < steps[0] - 0.03 and sum(n for at, n in frame_at if at < steps[0] - 0.03) >= 14 * 3
    assert tokens == expected(max_tokens=4)


def test_a_lost_credit_is_missed_by_its_number_and_made_good_by_a_reconnect():
    async def scenario(cluster):
        request = cluster.request("slow", PROMPT, SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0), 60)
        events, lost = [], []
        running = asyncio.get_running_loop().create_task(cluster.orchestrator.run(request, events.append))
        await asyncio.sleep(2)

        def lose(stream, message):
            if isinstance(message, Credit):
                lost.append(message)
                return None
            return message

        cluster.hub.tamper = lose
        cluster.orchestrator.consumed(("", "slow"), 10)
        await asyncio.sleep(0.2)
        parked = sum(len(e.token_ids) for e in events if isinstance(e, TextDelta))
        cluster.hub.tamper = lambda stream, message: message
        await asyncio.sleep(2)
        after = sum(len(e.token_ids) for e in events if isinstance(e, TextDelta))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return lost, parked, after, sum(link.num_reconnects for link in cluster.links.all())

    lost, parked, after, reconnects = run(scenario, router=RouterConfig(credit_positions=10))
    assert len(lost) == 1 and parked == 10 and reconnects == 1
    assert after == 20


def test_more_prompts_at_once_than_may_be_announced_all_find_their_partners():
    """A roomy pool must not start a prompt whose partner was never told of it: it would be held for ever."""

    async def scenario(cluster):
        return await asyncio.gather(*(ask(cluster, name=f"r{i}", max_tokens=3) for i in range(3 * MAX_ANNOUNCED)))

    roomy = EngineConfig(block_size_tokens=4, num_blocks=2000, max_step_tokens=2000, max_sequences=64)
    replies = run(scenario, engine=roomy)
    assert len(replies) == 24 and all(ended.error is None and ended.anatomy.path == "pd" for _, ended in replies)


def test_a_request_id_may_be_used_again_after_its_end():
    """A worker keeps a tombstone of the first; the second must not be taken for a late Submit of it."""

    async def scenario(cluster):
        return [await ask(cluster, name="same") for _ in range(3)]

    replies = run(scenario)
    assert all(ended.error is None for _, ended in replies)
    assert [tokens for tokens, _ in replies] == [replies[0][0]] * 3


# --- how a request may end besides well ------------------------------------------------------------------


def test_an_abort_reaches_a_request_that_waits_for_a_permit_and_one_that_runs():
    async def scenario(cluster):
        one = asyncio.ensure_future(ask(cluster, name="one", max_tokens=60))
        two = asyncio.ensure_future(ask(cluster, name="two", max_tokens=60))
        await asyncio.sleep(0.05)
        assert (
            cluster.orchestrator.abort(("", "two"))
            and cluster.orchestrator.abort(("", "one"))
            and not cluster.orchestrator.abort(("", "none"))
        )
        return await asyncio.gather(one, two, return_exceptions=True)

    one, two = run(scenario, router=RouterConfig(max_running=1, max_queued=4))
    assert isinstance(one[1].error, Cancelled) and isinstance(two[1].error, Cancelled)


def test_draining_lets_requests_finish_for_a_while_and_then_ends_them():
    async def scenario(cluster):
        running = [
            asyncio.ensure_future(ask(cluster, name=f"r{i}", max_tokens=n, ignore_eos=True))
            for i, n in enumerate((4, 100))
        ]
        await asyncio.sleep(0.01)
        await cluster.orchestrator.drain(0.3)
        return [ended.error for _, ended in await asyncio.gather(*running)]

    short, long = run(scenario)
    assert short is None and isinstance(long, Draining)


def test_an_id_in_use_is_refused_and_the_first_goes_on():
    async def scenario(cluster):
        first = asyncio.ensure_future(ask(cluster, name="same"))
        await asyncio.sleep(0.001)
        events = await cluster.generate(cluster.request("same", PROMPT, SamplingParams(max_tokens=2)))
        return events, await first

    events, (tokens, ended) = run(scenario)
    assert isinstance(events[0].error, DuplicateRequest) and ended.error is None and len(tokens) > 0
