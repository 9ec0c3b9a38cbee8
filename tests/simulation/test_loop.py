"""The loop of a simulation: what waits for ever, what ends a run, what a killed node still does."""

import asyncio
import contextvars
import gc

import pytest

from simulation.loop import NODE, Deadlock, VirtualLoop, run_virtual


def test_a_wait_without_a_wake_up_is_a_deadlock_not_a_hang():
    async def forever():
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        run_virtual(forever())


@pytest.mark.parametrize("as_task", [True, False])
def test_a_tests_time_limit_ends_a_run_and_is_nobodys_crash(as_task):
    """pytest-timeout's exception went into a worker's task, as if that had crashed; all went on."""

    class TimeLimit(BaseException):
        pass

    def expire():
        raise TimeLimit

    async def step():
        expire()

    async def main():
        loop = asyncio.get_running_loop()
        unawaited = asyncio.create_task(step()) if as_task else loop.call_soon(expire)
        await asyncio.sleep(60)
        return unawaited

    with pytest.raises(TimeLimit):
        run_virtual(main())


def test_a_killed_node_cleans_nothing_up_when_garbage_is_collected():
    """Its clean-up ran at any time, or failed because no loop ran any more."""
    cleaned = []

    async def waits_for_ever():
        try:
            await asyncio.Event().wait()  # which nobody else holds
        finally:
            cleaned.append(True)

    async def main():
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        node = contextvars.copy_context()
        node.run(NODE.set, "a")
        loop.create_task(waits_for_ever(), context=node)
        await asyncio.sleep(1)
        loop.kill("a")
        gc.collect()
        return list(cleaned)

    assert run_virtual(main()) == []
    assert cleaned == [True], "at the end of the run"
