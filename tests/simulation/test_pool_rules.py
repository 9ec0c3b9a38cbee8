"""Blocks and the pool while transfers run: pins, sub-attempts, memory that is replaced."""

import asyncio
from dataclasses import replace

import pytest
from support.virtual import PROMPT, Heard, ask, attempt_of, expected, run, unit

from core.config import TransferConfig
from core.errors import Draining, KVTransferError
from core.ids import RequestId, TransferId
from core.session import Role, Submit, Task
from decode_worker.role import DecodeRole
from engine.scheduling.sequence import Status
from kv_transfer import codec
from kv_transfer.transitions import Transition
from prefill_worker.role import PrefillRole
from worker.router_session import RouterSessions

FRAME = b"\x05"
OTHER_PROMPT = tuple(range(60, 10, -1))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.0005)


# --- the ranks start again -----------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.045, 0.06, 0.3, 0.6])
def test_answers_are_exact_whenever_they_begin_around_a_restart_of_ranks(role, delay_s):
    """The new memory comes in the middle of it, and what the old held is nobody's KV."""

    async def scenario(cluster):
        await ask(cluster, "before", OTHER_PROMPT)
        victim = unit(cluster, role)
        generation = victim.components.kv.generation
        victim._runner.die_between_steps()
        await asyncio.sleep(delay_s)
        during = await asyncio.gather(*(ask(cluster, f"r{n}", PROMPT) for n in range(3)))
        await asyncio.sleep(1)
        after = await ask(cluster, "after", PROMPT)
        return victim.components.kv.generation - generation, [*during, after]

    replaced, replies = run(scenario, prefill=2, decode=2)
    assert replaced == 1
    right = expected()
    assert [(ended.error, tokens == right) for tokens, ended in replies] == [(None, True)] * 4


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("is_local", [True, False])
def test_nothing_is_taken_in_while_the_ranks_are_down(role, is_local):
    """It is refused as by a worker that drains: it moves, and no fault is counted."""

    async def scenario(cluster):
        submits = []

        def spy(stream, message):
            if isinstance(message, Submit):
                submits.append((stream.peer.node, message))
            return message

        cluster.hub.tamper = spy
        await ask(cluster)
        target = unit(cluster, role)
        node = target.descriptor.worker_id
        [(_, submit)] = [s for s in submits if s[0] == node]
        [router_id] = [s.router_id for s in target.attempts.sessions]
        late = replace(
            submit,
            request=replace(submit.request, request_id=RequestId("late~1")),
            transfer_id=TransferId(b"l" * 16),
            task=Task.LOCAL if is_local else submit.task,
        )
        target._runner.die_between_steps()
        await until(lambda: not target.is_ready)
        target.attempts.submit(router_id, late)
        attempt = attempt_of(target, "late")
        seen = (
            attempt.ended.error,
            attempt.sequences,
            len(target.scheduler.waiting),
            target.role.num_live,
        )
        await until(lambda: target.is_ready)
        target.attempts.cancel(late.request.request_id, late.epoch)
        return seen

    error, *left = run(scenario)
    assert isinstance(error, Draining) and "ranks are not running" in error.message
    assert left == [[], 0, 0]


def test_kv_that_arrived_before_the_pool_was_replaced_is_not_attached(monkeypatch, caplog):
    """Between the agent's word and the worker's loop there is time for a restart."""
    arrived, replaced = DecodeRole.transfer_arrived, []

    def late(self, *told):
        if not replaced:
            replaced.append(self._scheduler)
            self._kv.replace()
            assert self._scheduler.arriving
        arrived(self, *told)
        if len(replaced) == 1:
            replaced.append(self._scheduler.pool.num_cached)

    monkeypatch.setattr(DecodeRole, "transfer_arrived", late)
    tokens, ended = run(ask)
    assert replaced[1] == 0, "blocks of the old pool became cache"
    assert not [r for r in caplog.records if r.levelname == "ERROR"], "it was taken for a bug"
    assert ended.timing.attempts == ("0:pd:kv_transfer_failed", "1:pd:ok")
    assert ended.error is None and tokens == expected()


# --- pins ----------------------------------------------------------------------------------------


def test_blocks_of_a_preempted_hand_over_are_kept_until_the_agent_has_let_go():
    async def scenario(cluster):
        prefill = unit(cluster, Role.PREFILL)
        running = asyncio.get_running_loop().create_task(ask(cluster))
        part = prefill.role
        await until(lambda: any(any(o.num_published) for o in part._outgoing.values()))
        [outgoing] = part._outgoing.values()
        blocks = list(outgoing.sequence.block_table)
        prefill.scheduler.preempt(outgoing.sequence)
        prefill.attempts.deliver(prefill.scheduler.take_events())
        kept = [prefill.pool.references(b) for b in blocks]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        freed = [prefill.pool.references(b) for b in blocks]
        return kept, freed, await running

    kept, freed, (tokens, ended) = run(scenario, step_s=0.05)
    assert kept and set(kept) == {1} and set(freed) == {0}
    assert ended.error is None and tokens == expected()


def test_blocks_that_are_written_into_are_kept_until_the_agent_has_let_go():
    async def scenario(cluster):
        decode = unit(cluster, Role.DECODE)
        running = asyncio.get_running_loop().create_task(ask(cluster))
        await until(lambda: decode.agent._receivers and decode.scheduler.arriving)
        [sequence] = decode.scheduler.arriving.values()
        blocks = list(sequence.block_table)
        decode.attempts.end(attempt_of(decode, "r"), KVTransferError("the test ends it"))
        kept = [decode.pool.references(b) for b in blocks]
        await until(lambda: not decode.agent._receivers)
        await asyncio.sleep(0)
        return sequence.status, kept, [decode.pool.references(b) for b in blocks], await running

    status, kept, freed, (tokens, ended) = run(scenario, step_s=0.05)
    assert status is Status.FINISHED and kept and set(kept) == {1} and set(freed) == {0}
    assert ended.error is None and tokens == expected()


def test_an_older_sub_attempt_that_is_drained_frees_no_blocks_of_a_later_one():
    """The attempt may have ended here before the agent hears of its restart."""

    async def scenario(cluster):
        prefill = unit(cluster, Role.PREFILL)
        running = asyncio.get_running_loop().create_task(ask(cluster))
        part = prefill.role
        await until(lambda: any(any(o.num_published) for o in part._outgoing.values()))
        [(transfer_id, outgoing)] = part._outgoing.items()
        prefill.scheduler.preempt(outgoing.sequence)
        prefill.attempts.deliver(prefill.scheduler.take_events())
        await until(lambda: any(outgoing.num_published))
        blocks = list(outgoing.sequence.block_table)
        prefill.attempts.end(outgoing.attempt, KVTransferError("the test ends it"))
        pinned = [prefill.pool.references(b) for b in blocks]
        part.transfer_drained(transfer_id, 0)
        kept = [prefill.pool.references(b) for b in blocks]
        await until(lambda: not part._draining)
        return pinned, kept, [prefill.pool.references(b) for b in blocks], await running

    pinned, kept, freed, (tokens, ended) = run(scenario, step_s=0.05)
    assert kept and kept == pinned and freed == [n - 1 for n in pinned]
    assert ended.error is None and tokens == expected()


def test_blocks_that_decode_has_are_not_sent_again():
    async def scenario(cluster):
        await ask(cluster, "first", max_tokens=4)
        unit(cluster, Role.PREFILL).pool.drop_cache()
        sent = []

        def watch(stream, message):
            if isinstance(message, bytes) and message[:1] == FRAME:
                sent.extend(codec.decode(message)[1].entries["block"].tolist())
            return message

        agent, published = unit(cluster, Role.PREFILL).agent, []
        publish = agent.publish

        def publishing(transfer_id, sub_attempt, blocks):
            published.append(blocks.first_block)
            publish(transfer_id, sub_attempt, blocks)

        heard = Heard(cluster)
        agent.publish = publishing
        cluster.hub.tamper = watch
        answer = await ask(cluster, "second", max_tokens=4)
        return published, sent, len(heard.arrived), answer

    published, sent, num_arrived, (tokens, ended) = run(scenario)
    assert set(published) == {14}
    assert num_arrived == 1 and ended.usage.cached_tokens == 0, "prefill had to compute all"
    assert sorted(set(sent)) == [14], "59 tokens: 14 blocks of 4 are cached there, one is not"
    assert ended.error is None and tokens == expected(max_tokens=4)


@pytest.mark.parametrize(
    ("num_more", "why"),
    [
        (0, "the prefill worker started this transfer twice"),
        (1, f"the prefill worker starts {len(PROMPT) + 1} tokens, the request has {len(PROMPT)}"),
    ],
)
def test_decode_reserves_once_whatever_it_is_told(num_more, why):
    async def scenario(cluster):
        decode = unit(cluster, Role.DECODE)
        running = asyncio.get_running_loop().create_task(ask(cluster))
        await until(lambda: decode.scheduler.arriving)
        [(transfer_id, incoming)] = decode.role._incoming.items()
        held = decode.pool.num_held
        decode.role.transfer_starting(transfer_id, len(PROMPT) + num_more)
        return held, decode.pool.num_held, incoming.attempt.ended, await running

    held, after, ended_there, (tokens, ended) = run(scenario, step_s=0.05)
    assert held == after > 0 and ended_there.error.message == why
    assert ended.error is None and tokens == expected()


@pytest.mark.parametrize(
    ("role", "word"), [(Role.PREFILL, "transfer_lost"), (Role.DECODE, "transfer_failed")]
)
def test_a_worker_whose_transfer_failed_ends_its_part_itself(role, word):
    async def scenario(cluster):
        decode = unit(cluster, Role.DECODE)
        running = asyncio.get_running_loop().create_task(ask(cluster))
        await until(lambda: decode.scheduler.arriving)
        one = unit(cluster, role)
        attempt = attempt_of(one, "r")
        error = KVTransferError("the stream broke")
        getattr(one.role, word)(attempt.submit.transfer_id, error)
        is_told = attempt.ended is not None and attempt.ended.error is error
        return is_told, await running

    is_told, (tokens, ended) = run(scenario, step_s=0.05)
    assert is_told and ended.error is None and tokens == expected()


def test_the_lease_of_a_prompt_goes_on_while_its_router_lives_and_decode_has_not_come():
    """The Submit of the decode worker takes longer than a lease."""

    async def scenario(cluster):
        await asyncio.sleep(1.0)
        decode = unit(cluster, Role.DECODE).descriptor.worker_id
        cluster.hub.extra_delay_s = lambda s: 1.9 * (s.kind == "session" and s.peer.node == decode)
        asking = asyncio.ensure_future(ask(cluster))
        await asyncio.sleep(1.8)
        num_waiting = unit(cluster, Role.PREFILL).agent.num_live
        return num_waiting, await asking, cluster.transitions

    num_waiting, (tokens, ended), transitions = run(
        scenario, transfer=TransferConfig(lease_s=1.0, frame_bytes=4096)
    )
    assert num_waiting == 1 and transitions[Transition.SENDER_EXPIRED] == 0
    assert ended.timing.attempts == ("0:pd:ok",) and tokens == expected()


# --- calls between the loops that break ----------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "step"),
    [
        (PrefillRole, "transfer_reserved"),
        (PrefillRole, "transfer_sent"),
        (DecodeRole, "transfer_starting"),
        (DecodeRole, "transfer_arrived"),
    ],
)
def test_a_bug_in_a_step_of_a_transfer_ends_its_attempt(role, step, monkeypatch, caplog):
    whole, broken = getattr(role, step), []

    def breaks(self, *told):
        if not broken:
            broken.append(1)
            raise ValueError("a bug")
        whole(self, *told)

    monkeypatch.setattr(role, step, breaks)

    async def scenario(cluster):
        replies = await asyncio.gather(ask(cluster, timeout_s=20), ask(cluster, "b", OTHER_PROMPT))
        return replies, [u.fatal.done() for u in cluster.units.values()]

    [(tokens, ended), (_, other)], fatal = run(scenario)
    assert broken and "ValueError: a bug" in caplog.text and not any(fatal)
    assert ended.error is None and tokens == expected() and other.error is None


def test_a_bug_where_blocks_are_given_back_ends_the_worker(monkeypatch, caplog):
    """Its books are wrong from then on; a loop would only log it."""
    broken = []

    def breaks(self, *told):
        broken.append(told)
        raise ValueError("a bug")

    async def scenario(cluster):
        with monkeypatch.context() as patch:
            patch.setattr(PrefillRole, "transfer_drained", breaks)
            await ask(cluster)
        prefill = unit(cluster, Role.PREFILL)
        error = prefill.fatal.exception()
        is_ready = prefill.is_ready
        for told in broken:
            prefill.role.transfer_drained(*told)
        return error, is_ready

    error, is_ready = run(scenario)
    assert broken and isinstance(error, ValueError) and not is_ready
    assert "the worker cannot go on" in caplog.text


def test_a_report_of_a_way_that_cannot_be_taken_ends_nothing(monkeypatch, caplog):
    def breaks(self, route):
        raise ValueError("a bug")

    monkeypatch.setattr(RouterSessions, "send_route", breaks)
    tokens, ended = run(ask)
    assert "could not be used" in caplog.text
    assert ended.error is None and tokens == expected()
