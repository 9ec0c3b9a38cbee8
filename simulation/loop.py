"""An asyncio loop whose clock jumps from one timer to the next.

Owns virtual time and determinism: tasks hash by creation number (asyncio keeps `TaskGroup`
children in a set), and anything that would touch a thread, a socket or a subprocess raises.
Does not know what runs on it. Called by `simulation.cluster`.
"""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
MAX_IDLE_S = 1e7


class Deadlock(Exception):
    """Nothing is left to run and no timer is set, but the main task has not ended."""


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for sockets, moves the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout > MAX_IDLE_S:
            raise Deadlock("no timer is set and nothing is ready")
        self.now_s += max(timeout, 0.0)
        return []


class _NumberedTask(asyncio.Task[Any]):
    """A task whose hash is its creation number."""

    _numbers = itertools.count()

    def __init__(self, coroutine: Coroutine[Any, Any, Any], **options: Any) -> None:  # noqa: ANN401
        self._number = next(self._numbers)
        super().__init__(coroutine, **options)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class VirtualLoop(asyncio.SelectorEventLoop):
    """Virtual time, starting at 0."""

    def __init__(self) -> None:
        """Make the loop; install it with `run_virtual`."""
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self.set_task_factory(lambda loop, coroutine, **options: _NumberedTask(coroutine, loop=loop, **options))

    def time(self) -> float:
        """Return virtual seconds."""
        return self._jumping.now_s

    def _write_to_self(self) -> None:
        """Nobody sleeps in `select`, so nobody has to be woken."""

    def run_in_executor(self, *_: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Refuse: threads are not deterministic."""
        raise RuntimeError("executors do not exist in simulation; use the Offload port")

    async def subprocess_exec(self, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """Refuse: processes are not simulated."""
        raise RuntimeError("subprocesses do not exist in simulation")

    async def create_connection(self, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """Refuse: sockets are not simulated."""
        raise RuntimeError("sockets do not exist in simulation; use the Network port")


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a fresh virtual loop to its end; left-over tasks are cancelled."""
    _NumberedTask._numbers = itertools.count()
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        rest = sorted(asyncio.all_tasks(loop), key=hash)
        for task in rest:
            task.cancel()
        if rest:
            loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        loop.close()
