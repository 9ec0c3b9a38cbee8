"""The `Clock` port: it never goes back, and moves on as fast as the loop that reads it."""

import asyncio
from typing import Any

import pytest

from core.clocks import LoopClock, SystemClock
from simulation.loop import run_virtual
from simulation.ports import NodeClock

CLOCKS: dict[str, Any] = {
    "the loop's": (LoopClock, asyncio.run),
    "the system's": (SystemClock, asyncio.run),
    "the loop's, virtual": (LoopClock, run_virtual),
    "a node's": (NodeClock, run_virtual),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_never_goes_back_and_moves_while_its_reader_sleeps(name):
    make, run = CLOCKS[name]

    async def main():
        clock = make()
        began_s = clock.now_s()
        readings = [clock.now_s() for _ in range(100)]
        assert readings == sorted(readings) and readings[0] >= began_s
        await asyncio.sleep(0.02)
        assert clock.now_s() - began_s >= 0.019

    run(main())
