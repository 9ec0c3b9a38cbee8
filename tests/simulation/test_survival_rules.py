"""Lost sessions, dead and hung workers, deadly requests, slow clients:
what survives them and how soon, on virtual time."""

import asyncio

import pytest
from support.virtual import PROMPT, Heard, ask, attempt_of, expected, run

from core.config import EngineConfig, PlacementConfig, RouterConfig
from core.errors import (
    NoWorker,
    Quarantined,
    WorkerDied,
    WorkerLost,
)
from core.session import Credit, Role
from core.types import RequestEnded, SamplingParams, TextDelta


def test_a_dropped_session_resumes_without_gap_or_repeat():
    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(ask(cluster, max_tokens=40))
        cuts = 0
        for _ in range(3):
            await asyncio.sleep(0.12)
            cuts += cluster.hub.reset("session")
        tokens, ended = await running
        return (
            cuts,
            tokens,
            ended,
            sum(session.num_reconnects for session in cluster.sessions.all()),
        )

    cuts, tokens, ended, reconnects = run(scenario)
    assert cuts > 0 and reconnects > 0
    assert ended.error is None and ended.timing.attempts == ("0:pd:ok",)
    assert tokens == expected(max_tokens=40)


def test_a_worker_cancels_the_requests_of_a_router_that_stays_away():
    async def scenario(cluster):
        request = cluster.request("orphan", PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
        task = asyncio.get_running_loop().create_task(cluster.generate(request))
        await asyncio.sleep(0.2)
        held = [u.pool.num_held for u in cluster.units.values()]
        await cluster.sessions.close()
        cluster.hub.reset("session")
        await asyncio.sleep(7)
        after = (
            [u.pool.num_held for u in cluster.units.values()],
            [len(u.attempts.by_run) for u in cluster.units.values()],
        )
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return held, after

    held, (blocks, attempts) = run(
        scenario, engine=EngineConfig(block_size_tokens=4, num_blocks=128, max_step_tokens=32)
    )
    assert sum(held) > 0
    assert sum(blocks) == 0 and sum(attempts) == 0


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("delay_s", [0.01, 0.05, 0.12, 0.25])
def test_a_killed_worker_is_survived_token_for_token(role, delay_s):
    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(
            ask(cluster, max_tokens=30, ignore_eos=True)
        )
        await asyncio.sleep(delay_s)
        victim = next(
            n for n, u in cluster.units.items() if u.descriptor.role is role and u.attempts.by_run
        )
        await cluster.kill(victim)
        killed_at = cluster.clock.now_s()
        tokens, ended = await running
        return tokens, ended, killed_at

    tokens, ended, _ = run(scenario, prefill=2, decode=2, placement=PlacementConfig(path="auto"))
    assert ended.error is None
    assert (
        tokens
        == run(
            lambda c: ask(c, max_tokens=30, ignore_eos=True), placement=PlacementConfig(path="auto")
        )[0]
    )


def test_a_fault_ends_the_request_where_the_cluster_has_no_retry_left():
    async def scenario(cluster):
        cluster.routers[0].attempts._budget.reserve = lambda now_s, patience_s: None
        running = asyncio.ensure_future(ask(cluster, max_tokens=30, ignore_eos=True))
        await asyncio.sleep(0.2)
        await cluster.kill("decode2")
        return await running

    tokens, ended = run(scenario)
    assert isinstance(ended.error, WorkerLost) and ended.timing.attempts == ("0:pd:worker_lost",)
    assert tokens[0] == expected(max_tokens=30, ignore_eos=True)[0][: len(tokens[0])]


def test_the_only_decode_worker_dies_and_prefill_finishes_the_request():
    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(
            ask(cluster, max_tokens=30, ignore_eos=True)
        )
        await asyncio.sleep(0.2)
        await cluster.kill("decode2")
        started_at = cluster.clock.now_s()
        tokens, ended = await running
        return tokens, ended, cluster.clock.now_s() - started_at

    tokens, ended, took_s = run(scenario, placement=PlacementConfig(path="auto"))
    assert ended.error is None and ended.timing.path == "local" and len(ended.timing.attempts) == 2
    assert took_s < 5
    assert tokens == expected(max_tokens=30, ignore_eos=True)


def test_with_pd_forced_and_no_decode_left_there_is_one_typed_error_within_five_seconds():
    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(
            ask(cluster, max_tokens=30, ignore_eos=True)
        )
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
        heard = Heard(cluster)
        running = asyncio.get_running_loop().create_task(
            ask(cluster, max_tokens=30, ignore_eos=True)
        )
        await asyncio.sleep(0.2)
        decode = next(
            u
            for u in cluster.units.values()
            if u.descriptor.role is Role.DECODE and u.attempts.by_run
        )

        async def stuck(plan, on_layer):
            await asyncio.sleep(3600)

        decode.step_loop._runner.execute = stuck
        started_at = cluster.clock.now_s()
        tokens, ended = await running
        took_s = cluster.clock.now_s() - started_at
        await cluster.kill(decode.descriptor.worker_id)
        return tokens, ended, took_s, heard.retries

    tokens, ended, took_s, reasons = run(scenario, decode=2)
    assert ended.error is None and took_s < 4.5
    assert [type(error) for error in reasons] == [WorkerDied], "the request is under suspicion"
    assert tokens == expected(max_tokens=30, ignore_eos=True)


def test_a_request_of_death_is_quarantined_and_kills_at_most_three():
    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(
            ask(cluster, "poison", max_tokens=20, ignore_eos=True)
        )
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
    assert (
        tokens == run(lambda c: ask(c, "innocent", PROMPT[:30], max_tokens=60, ignore_eos=True))[0]
    )


def test_after_two_deaths_a_request_is_computed_alone_on_both_workers():
    """Whoever it kills next, nobody else is lost with it."""

    async def scenario(cluster):
        running = asyncio.get_running_loop().create_task(
            ask(cluster, "suspect", max_tokens=20, ignore_eos=True)
        )
        num_deaths, lonely = 0, {}
        while not running.done():
            await asyncio.sleep(0.005)
            for name, u in list(cluster.units.items()):
                attempt = attempt_of(u, "suspect")
                if attempt is None or attempt.ended is not None:
                    continue
                is_decoding = u.descriptor.role is Role.DECODE and len(attempt.sequences) > 1
                if num_deaths < 2 and is_decoding:
                    await cluster.kill(name)
                    num_deaths += 1
                    break
                for sequence in attempt.sequences if attempt.epoch == 2 else ():
                    lonely.setdefault(u.descriptor.role, set()).add(sequence.run_alone)
        return num_deaths, lonely, await running

    num_deaths, lonely, (tokens, ended) = run(
        scenario, decode=4, router=RouterConfig(max_fault_attempts=5)
    )
    assert num_deaths == 2 and lonely == {Role.PREFILL: {True}, Role.DECODE: {True}}
    assert ended.error is None and tokens == expected(max_tokens=20, ignore_eos=True)


def test_a_slow_client_is_parked_by_credit_and_goes_on_when_it_reads():
    async def scenario(cluster):
        request = cluster.request(
            "slow", PROMPT, SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0)
        )
        events = []
        running = asyncio.get_running_loop().create_task(
            cluster.orchestrator.run(request, events.append)
        )
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


def test_what_a_client_takes_while_nobody_serves_it_counts_for_the_next_attempt():
    async def scenario(cluster):
        request = cluster.request(
            "slow", PROMPT, SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0), 60
        )
        events = []
        running = asyncio.get_running_loop().create_task(
            cluster.orchestrator.run(request, events.append)
        )

        def num_told():
            return sum(len(e.token_ids) for e in events if isinstance(e, TextDelta))

        await asyncio.sleep(2)
        parked = num_told()
        (node,) = [n for n, u in cluster.units.items() if u.descriptor.role is Role.DECODE]
        cluster.membership.starting += 1
        await cluster.kill(node)
        await asyncio.sleep(1)
        assert not cluster.orchestrator._attempts.in_progress
        cluster.orchestrator.consumed(request.run_key, parked)
        await cluster.add(Role.DECODE)
        cluster.membership.starting -= 1
        cluster.membership.notify()
        await asyncio.sleep(2)
        after = num_told()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return parked, after

    assert run(scenario, router=RouterConfig(credit_positions=10)) == (10, 20)


def test_a_lost_credit_is_missed_by_its_number_and_made_good_by_a_reconnect():
    async def scenario(cluster):
        request = cluster.request(
            "slow", PROMPT, SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0), 60
        )
        events, lost = [], []
        running = asyncio.get_running_loop().create_task(
            cluster.orchestrator.run(request, events.append)
        )
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
        return (
            lost,
            parked,
            after,
            sum(session.num_reconnects for session in cluster.sessions.all()),
        )

    lost, parked, after, reconnects = run(scenario, router=RouterConfig(credit_positions=10))
    assert len(lost) == 1 and parked == 10 and reconnects == 1
    assert after == 20


def test_worker_lost_is_retryable_and_counts():
    assert WorkerLost("x").is_retryable
