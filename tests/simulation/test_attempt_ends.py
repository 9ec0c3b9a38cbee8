"""How a worker's part in an attempt ends, and what it ignores of one that is over."""

import asyncio

import pytest
from support.virtual import PD, PROMPT, ask, expected, run, unit

from core.config import PlacementConfig
from core.errors import InvariantViolation, KVTransferError, WorkerLost
from core.ids import Epoch, TransferId
from core.session import AttemptEnded, Credit, Role, StepFrame, Submit, Task
from core.types import Logprob, SamplingParams
from kv_transfer.receiver import Arrival
from kv_transfer.transitions import Transition

GONE = TransferId(b"g" * 16)
LOST = KVTransferError("the stream broke")


def watched_ends(cluster):
    """Ends of attempts as they go to routers, by task; filled while the cluster runs."""
    ends = {}

    def watch(stream, message):
        for ended in message.ended if isinstance(message, StepFrame) else ():
            ends.setdefault(ended.task, []).append(ended)
        return message

    cluster.hub.tamper = watch
    return ends


# --- what is over ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "words"), [
    (Role.PREFILL, {
        "transfer_reserved": (2,), "transfer_sent": (), "transfer_lost": (LOST,),
        "transfer_drained": (7,),
    }),
    (Role.DECODE, {
        "transfer_starting": (len(PROMPT),), "transfer_finished": (),
        "transfer_arrived": ({0: Logprob(5, -0.5)}, Arrival(64, 1, "sim", 0)),
        "transfer_failed": (LOST,), "transfer_closed": (),
    }),
])  # fmt: skip
def test_what_an_agent_says_of_a_transfer_that_is_gone_harms_nobody(role, words, caplog):
    """Agent and worker have a loop each: an attempt may end while
    the agent's word is on its way."""

    async def scenario(cluster):
        asking = asyncio.ensure_future(ask(cluster, max_tokens=30, ignore_eos=True))
        await asyncio.sleep(0.03)
        one = unit(cluster, role)
        assert one.agent.num_live and one.worker.attempts, "no transfer was under way"
        for name, told in words.items():
            getattr(one.agent._callbacks, name)(GONE, *told)
        await asyncio.sleep(0.001)
        return await asking

    tokens, ended = run(scenario)
    assert ended.error is None and ended.timing.attempts == ("0:pd:ok",)
    assert tokens == expected(max_tokens=30, ignore_eos=True)
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == []


# --- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [(0, 1), (0,), ()])
def test_an_attempt_ends_with_the_credit_that_tells_that_the_client_waits_for_nothing(finished):
    async def scenario(cluster):
        decode = unit(cluster, Role.DECODE)
        sampling = SamplingParams(n=2, max_tokens=90, temperature=1.0, ignore_eos=True)
        request = cluster.request("r", PROMPT, sampling)
        decode.worker.submit("router", Submit(request, Epoch(3), Task.LOCAL, ((), ()), credit=20))
        attempt = decode.worker.attempts["r"]
        await asyncio.sleep(0.2)
        decode.worker.credit(Credit("r", Epoch(3), 20, finished))
        ended, num_left = attempt.ended, len(decode.scheduler.running)
        decode.worker.cancel("r", Epoch(3))
        return ended, num_left

    ended, num_left = run(scenario)
    if finished == (0, 1):
        assert isinstance(ended, AttemptEnded) and ended.error is None
    else:
        assert ended is None and num_left == 2 - len(finished)


def test_a_decode_worker_ends_well_when_the_first_tokens_were_final():
    """Its router's Cancel is held back, which would end the attempt as well."""

    stop = expected()[0][0]

    async def scenario(cluster):
        ends = []
        cluster.on_attempt_ended.append(lambda node, unit, attempt: ends.append(attempt.ended))
        decode = unit(cluster, Role.DECODE)
        node = decode.descriptor.worker_id
        asking = asyncio.ensure_future(ask(cluster, stop_token_ids=(stop,)))
        while not decode.worker.attempts:
            await asyncio.sleep(0.001)
        cluster.hub.extra_delay_s = lambda s: 0.5 * (s.kind == "session" and s.peer.node == node)
        await asking
        await asyncio.sleep(2)
        return ends, cluster.transitions, unit(cluster, Role.PREFILL).agent.num_unknown

    ends, transitions, num_unknown = run(scenario)
    assert [(e.task, e.error) for e in ends] == [(Task.PREFILL, None), (Task.DECODE, None)]
    assert transitions[Transition.SENDER_FINISHED] == 1
    assert transitions[Transition.RECEIVER_FINISHED] == 1
    assert num_unknown == 0, "what had ended was committed once more"


@pytest.mark.parametrize("path", ["pd", "local"])
def test_only_who_decodes_says_how_long_that_took(path):
    async def scenario(cluster):
        ends = watched_ends(cluster)
        await ask(cluster, max_tokens=20, ignore_eos=True)
        await asyncio.sleep(1)
        return ends

    ends = run(scenario, placement=PD if path == "pd" else PlacementConfig(path=path))
    decode_s = {task: [e.timings.decode_s for e in ended] for task, ended in ends.items()}
    if path == "pd":
        assert decode_s[Task.PREFILL] == [0.0]
    [took_s] = decode_s[Task.DECODE if path == "pd" else Task.LOCAL]
    assert took_s == pytest.approx(19 * 0.0085)


# --- how a worker ends ----------------------------------------------------------------------------


def test_a_worker_breaks_down_of_the_first_thing_that_broke():
    async def scenario(cluster):
        worker = unit(cluster, Role.DECODE).worker
        first, second = WorkerLost("its ranks do not start"), InvariantViolation("a task has ended")
        worker.break_down(first)
        worker.break_down(second)
        was_ready, error = worker.is_ready, worker.fatal.exception()
        worker.is_ready = True
        return was_ready, error is first

    assert run(scenario) == (False, True)


def test_a_worker_that_has_stopped_leaves_no_task_and_is_not_broken():
    def running():
        names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
        return sorted(n for n in names if n in ("StepLoop.run", "SessionServer.watch"))

    async def scenario(cluster):
        before, decode = running(), unit(cluster, Role.DECODE)
        await decode.worker.stop()
        return before, running(), decode.worker.fatal.done()

    both = ["SessionServer.watch", "StepLoop.run"]
    assert run(scenario) == (sorted(both * 2), both, False)
