"""Orders to child processes: who is next, what large ones may take, and what leaving costs."""

import asyncio
import sys
import time

import pytest

from core.errors import Overloaded
from router import child_pool
from router.child_pool import LARGE_BYTES, ChildPool

LARGE = b"x" * (LARGE_BYTES + 1)


class Child:
    """Answers when it is told to; remembers what it was asked."""

    asked = []

    def __init__(self, _command):
        self.let_go = asyncio.Event()
        self.num_killed = 0

    async def start(self):
        pass

    async def ask(self, order, timeout_s):
        Child.asked.append(order[:2].decode())
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.num_killed += 1
            raise
        self.let_go.clear()
        return b"done " + order[:2]

    async def stop(self):
        pass


@pytest.fixture()
async def make(monkeypatch):
    monkeypatch.setattr(child_pool, "_Child", Child)
    Child.asked, pools = [], []

    def pool(num_processes=1, wait_s=30.0):
        pools.append(ChildPool(["x"], num_processes, 5.0, wait_s))
        return pools[-1]

    yield pool
    for made in pools:
        await made.stop()
        assert not made.num_waiting and not made._working
        assert len(made._free) == len(made._children) and made._num_large == 0


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def finish(pool, number):
    for _ in range(number):
        for child in pool._children:
            child.let_go.set()
        await settle()


async def test_tenants_take_turns(make):
    pool = make()
    orders = [(b"a0", "a"), (b"a1", "a"), (b"a2", "a"), (b"b0", "b"), (b"c0", "c"), (b"b1", "b")]
    tasks = [asyncio.create_task(pool.ask(*order)) for order in orders]
    await settle()
    await finish(pool, 6)
    assert Child.asked == ["a0", "a1", "b0", "c0", "a2", "b1"]
    assert [task.result() for task in tasks] == [b"done " + order for order, _ in orders]


async def test_large_orders_leave_one_process_free(make):
    pool = make(num_processes=3)
    large = [asyncio.create_task(pool.ask(b"L%d" % i + LARGE, "a")) for i in range(4)]
    await settle()
    assert Child.asked == ["L0", "L1"]
    small = asyncio.create_task(pool.ask(b"s0", "b"))
    await settle()
    assert Child.asked == ["L0", "L1", "s0"]
    await finish(pool, 4)
    await asyncio.gather(small, *large)


async def test_with_one_process_small_and_large_take_turns(make):
    pool = make()
    tasks = [asyncio.create_task(pool.ask(b"L%d" % i + LARGE, "a")) for i in range(3)]
    tasks += [asyncio.create_task(pool.ask(b"s%d" % i, "a")) for i in range(3)]
    await settle()
    await finish(pool, 6)
    await asyncio.gather(*tasks)
    assert Child.asked == ["L0", "s0", "L1", "s1", "L2", "s2"]


async def test_an_order_whose_client_left_is_never_begun(make):
    pool = make()
    tasks = [asyncio.create_task(pool.ask(b"a%d" % i, "a")) for i in range(3)]
    await settle()
    tasks[1].cancel()
    await settle()
    assert pool.num_waiting == 1
    await finish(pool, 2)
    assert Child.asked == ["a0", "a2"]


async def test_an_order_in_work_is_given_up_soon_after_its_client_left(make, monkeypatch):
    monkeypatch.setattr(child_pool, "ABANDONED_S", 0.01)
    pool = make()
    task = asyncio.create_task(pool.ask(b"a0", "a"))
    await settle()
    task.cancel()
    await settle()
    assert not pool._free, "its process is still at work"
    async with asyncio.timeout(5):
        while not pool._free:
            await asyncio.sleep(0.005)
    assert pool._children[0].num_killed == 1


async def test_a_short_order_ends_by_itself_after_its_client_left(make):
    """A new process would cost more than the rest of the work."""
    pool = make()
    task = asyncio.create_task(pool.ask(b"a0", "a"))
    await settle()
    task.cancel()
    await finish(pool, 1)
    assert pool._free and pool._children[0].num_killed == 0
    following = asyncio.create_task(pool.ask(b"a1", "a"))
    await finish(pool, 1)
    assert await following == b"done a1"


async def test_the_line_is_bounded_in_number_and_time(make, monkeypatch):
    monkeypatch.setattr(child_pool, "MAX_WAITING", 2)
    pool = make(wait_s=0.02)
    first = asyncio.create_task(pool.ask(b"a0", "a"))
    await settle()
    waiting = [asyncio.create_task(pool.ask(b"a%d" % i, "a")) for i in (1, 2)]
    await settle()
    with pytest.raises(Overloaded, match="2 texts wait"):
        await pool.ask(b"a3", "a")
    other = asyncio.create_task(pool.ask(b"b0", "b"))
    await settle()
    with pytest.raises(Overloaded, match="texts wait"):
        await waiting[1]  # it made room
    for late in (waiting[0], other):
        with pytest.raises(Overloaded, match="within 0.02 s"):
            await late
    await finish(pool, 1)
    assert await first == b"done a0" and Child.asked == ["a0"]


async def test_a_process_granted_in_the_turn_in_which_the_time_ends_is_not_lost(make):
    pool = make(wait_s=0.05)
    first = asyncio.create_task(pool.ask(b"a", "one"))
    await settle()
    second = asyncio.create_task(pool.ask(b"b", "two"))
    await settle()
    child = pool._children[0]
    child.let_go.set()
    await asyncio.sleep(0)  # the first order has ended, and nobody has heard of it yet
    time.sleep(0.1)  # the time of the second ends meanwhile
    assert await first == b"done a"
    await settle()
    child.let_go.set()
    assert await second == b"done b"


async def test_half_an_answer_is_none():
    said = "print('ready', flush=True); input(); print('half', end='', flush=True)"
    pool = ChildPool(["x"], 1, 30.0, 30.0)
    child = pool._children[0]
    child._process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", said, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    await child._process.stdout.readline()
    assert await pool.ask(b"order\n") == b""
    assert child._process is None, "it is replaced"
    await pool.stop()


DIES_ONCE = """
import pathlib, sys
mark = pathlib.Path(sys.argv[1])
if not mark.exists():
    mark.touch()
    sys.exit(1)
print("ready", flush=True)
for line in sys.stdin:
    print(f"echo {line}", end="", flush=True)
"""


async def test_a_process_that_ends_while_it_starts_is_started_once_more(tmp_path, monkeypatch):
    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = ChildPool(["dies_once", str(tmp_path / "mark")], 1, 20.0, 20.0)
    try:
        assert await pool.ask(b"hello\n") == b"echo hello\n"
        assert (tmp_path / "mark").exists()
    finally:
        await pool.stop()
