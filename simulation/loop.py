"""An asyncio loop whose clock jumps from one timer to the next, and whose nodes can be stopped.

Owns virtual time, determinism (tasks hash by creation number: asyncio keeps `TaskGroup` children in
a set; anything that would touch a thread, a socket or a subprocess raises) and the life of nodes:
each callback belongs to the node in whose context it was made, so a node can be paused as by
SIGSTOP or killed as by SIGKILL, without a word from it. It also keeps every exception that nobody
caught. Does not know what runs on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import heapq
import itertools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
NODE: contextvars.ContextVar[str] = contextvars.ContextVar("node", default="")
"""The simulated node that the running code belongs to; empty: the world around them."""


MAX_CANCELLED = 500
"""Cancelled timers among those that are kept."""


YOUNG_OBJECTS = 50_000
"""After so many new objects garbage is looked for; Python's own 700 cost a tenth of a run."""


class Deadlock(Exception):
    """Nothing is left to run and no timer is set, but the main task has not ended."""


# asyncio keeps tasks in sets, hashed by address: without numbers the order of a cancellation would
# differ from run to run.
class _NumberedTask(asyncio.Task[Any]):
    """A task whose hash is its creation number."""

    _numbers = itertools.count()

    def __init__(self, coroutine: Coroutine[Any, Any, Any], **options: Any) -> None:  # noqa: ANN401
        self._number = next(self._numbers)
        self.failed_at_s = 0.0
        context: contextvars.Context | None = options.get("context")
        self.node = context.get(NODE, "") if context is not None else NODE.get()
        super().__init__(coroutine, **options)
        # In an empty context: a callback of a paused node would be held back with it.
        self.add_done_callback(_note_failure, context=contextvars.Context())

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


def _note_failure(task: asyncio.Task[Any]) -> None:
    loop = task.get_loop()
    if isinstance(loop, VirtualLoop) and isinstance(task, _NumberedTask) and _is_unretrieved(task):
        loop.note_failure(task)


def _is_unretrieved(task: asyncio.Task[Any]) -> bool:
    """True while nobody has asked a failed task for its exception."""
    return bool(task._log_traceback)


class _Callback(asyncio.Handle):
    """asyncio's handle, which asks its loop each time whether it is debugged."""

    __slots__ = ()

    def __init__(
        self,
        callback: Callable[..., object],
        args: Sequence[Any],
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context | None,
    ) -> None:
        self._context = contextvars.copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class _TimedCallback(_Callback, asyncio.TimerHandle):
    """A timer, likewise."""

    __slots__ = ()

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: Sequence[Any],
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context | None,
    ) -> None:
        _Callback.__init__(self, callback, args, loop, context)
        self._when = when
        self._scheduled = True


class VirtualLoop(asyncio.BaseEventLoop):
    """Virtual time, starting at 0."""

    _ready: Any
    """asyncio's own queue of handles: nothing public runs one callback at a time."""

    def __init__(self) -> None:
        """Make the loop; install it with `run_virtual`."""
        super().__init__()
        self._now_s = 0.0
        # In the place of asyncio's heap, whose handles compare themselves in Python: a tenth of a
        # simulation's time. By number, timers of one instant come due in the order of their making.
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._num_timers = 0
        self._num_cancelled = 0
        self._paused: dict[str, list[asyncio.Handle]] = {}
        self._paused_at_s: dict[str, float] = {}
        self._dead: set[str] = set()
        self.turn_s = 0.0
        """What one turn of the loop takes; more than nothing while the machine is busy."""
        self.complaints: list[str] = []
        """What reached the exception handler."""
        self.failed: list[_NumberedTask] = []
        self._interrupt: BaseException | None = None
        self.set_task_factory(
            lambda loop, coroutine, **options: _NumberedTask(coroutine, loop=loop, **options)
        )
        self.set_exception_handler(self._report)

    def time(self) -> float:
        """Return virtual seconds."""
        return self._now_s

    # --- what is to run, made and kept without the checks of a loop that has threads --------------

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,  # noqa: ANN401
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Run a callback in the next turn."""
        handle = _Callback(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,  # noqa: ANN401
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run a callback at an instant."""
        timer = _TimedCallback(when, callback, args, self, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._num_timers, timer))
        return timer

    def _timer_handle_cancelled(self, _: asyncio.TimerHandle) -> None:
        """Drop cancelled timers when they are many: most are deadlines that nobody missed."""
        self._num_cancelled += 1
        if self._num_cancelled > MAX_CANCELLED:
            # Some have come due since: then it is done somewhat early.
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._num_cancelled = 0

    # --- nodes ------------------------------------------------------------------------------------

    def pause(self, node: str) -> None:
        """Let nothing of a node run until `resume`; its timers come due meanwhile."""
        self._paused.setdefault(node, [])
        self._paused_at_s.setdefault(node, self._now_s)

    def resume(self, node: str) -> None:
        """Let a paused node go on with everything that came due."""
        self._ready.extend(self._paused.pop(node, []))
        self._paused_at_s.pop(node, None)

    def note_failure(self, task: _NumberedTask) -> None:
        """Keep a task that failed, until it is known whether anybody retrieves it."""
        task.failed_at_s = self._now_s
        error = task._exception  # not `exception()`, which would count as retrieving it
        if not isinstance(error, Exception):
            task.exception()
            self._end_on(error)
        elif task.node in self._dead:
            task.exception()  # those who would have retrieved it are dead, too
        else:
            self.failed.append(task)

    def _end_on(self, error: BaseException | None) -> None:
        """End the run on what is no `Exception`, as a test's time limit: no node has failed."""
        if error is not None and not isinstance(error, Exception):
            self._interrupt = error

    def uncaught(self) -> list[str]:
        """List what reached the exception handler, and tasks whose failure nobody retrieved."""
        unretrieved = [
            f"nobody retrieved the failure of {getattr(task.get_coro(), '__qualname__', task)}: "
            f"{_cause(task.exception())}"
            for task in filter(_is_unretrieved, self.failed)
        ]
        self.failed.clear()
        return [*self.complaints, *unretrieved]

    def kill(self, node: str) -> None:
        """Let nothing of a node run ever again, not even its clean-up.

        What failed there in its last turn may not have been retrieved yet, and that is no bug.
        """
        last_turn_s = self._paused_at_s.pop(node, self._now_s)
        for task in self.failed:
            if task.node == node and task.failed_at_s >= last_turn_s:
                task.exception()
        self._dead.add(node)
        self._paused.pop(node, None)

    # --- the loop itself --------------------------------------------------------------------------

    def _run_once(self) -> None:
        if self._interrupt is not None:
            interrupt = self._interrupt
            self._interrupt = None  # what is left is still to be cleaned up
            raise interrupt
        timers = self._timers
        ready = self._ready
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise Deadlock("no timer is set and nothing is ready")
            # Nothing can happen before the next timer. Never backwards: a busy turn may have passed
            # its time already.
            self._now_s = max(self._now_s, timers[0][0])
        else:  # timers that come due while a turn is under way fall into the same one
            self._now_s += self.turn_s
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        # As asyncio does: what becomes ready in this turn runs in the next one.
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            if self._dead or self._paused:
                node = handle._context.get(NODE, "")
                # Dropped for ever, clean-up included: a killed process runs no `finally`.
                if node in self._dead:
                    continue
                if node in self._paused:
                    self._paused[node].append(handle)
                    continue
            handle._run()

    def _write_to_self(self) -> None:
        """Nobody sleeps in `select`, so nobody has to be woken."""

    def _process_events(self, event_list: Any) -> None:  # noqa: ANN401
        """There are no sockets."""

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Keep what asyncio complains of, except tasks that a killed node leaves behind."""
        message = context.get("message", "")
        self._end_on(context.get("exception"))
        if "was destroyed but it is pending" not in message:
            what = message.partition("(")[0]  # arguments hold addresses
            self.complaints.append(f"{what}: {_cause(context.get('exception'))}")
            loop.default_exception_handler(context)

    def run_in_executor(self, *_: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Refuse: threads are not deterministic."""
        raise RuntimeError("executors do not exist in simulation; use the Offload port")

    async def subprocess_exec(self, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """Refuse: processes are not simulated."""
        raise RuntimeError("subprocesses do not exist in simulation")

    async def create_connection(self, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """Refuse: sockets are not simulated."""
        raise RuntimeError("sockets do not exist in simulation; use the Network port")


def _cause(error: BaseException | None) -> str:
    """The first exception of a group is what happened."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return repr(error)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a fresh virtual loop to its end; left-over tasks are cancelled."""
    # From 0 for each run, or the second run of a process would differ from the first.
    _NumberedTask._numbers = itertools.count()
    loop = VirtualLoop()
    try:
        with _few_collections():
            return loop.run_until_complete(main)
    finally:
        # A paused task could not be cancelled.
        for node in sorted(loop._paused):
            loop.resume(node)
        # A set, too: sorted, so that clean-up runs in the same order each time.
        everyone = sorted(asyncio.all_tasks(loop), key=hash)
        dead = [t for t in everyone if getattr(t, "node", "") in loop._dead]
        rest = [t for t in everyone if t not in dead]
        for task in rest:
            task.cancel()
        if rest:
            loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        loop.run_until_complete(_bury(dead))
        loop.close()


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Look for garbage seldom: a run makes much that lives long, and little in cycles."""
    thresholds = gc.get_threshold()
    gc.set_threshold(YOUNG_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


async def _bury(dead: list[asyncio.Task[Any]]) -> None:
    """Close what killed nodes left behind, whose clean-up may fail."""
    for task in dead:
        coroutine = task.get_coro()
        with contextlib.suppress(BaseException):
            if coroutine is not None:
                coroutine.close()
