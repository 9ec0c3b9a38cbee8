"""When a worker counts as stuck."""

import asyncio
from types import SimpleNamespace

from support.scripted_streams import WORKER, Script

from core.clocks import LoopClock
from core.errors import WorkerDied
from core.session import Progress
from router.workers.liveness import HUNG_S
from router.workers.session import WorkerSession
from simulation.loop import run_virtual
from transport.sequenced import NumberedStream

# --- a router's -----------------------------------------------------------------------------------


def stuck_for(seconds):
    """What a router says of a worker whose counters stood still with work in hand for so long."""

    async def main():
        stream = Script()
        worker = WorkerSession(WORKER, None, "router", LoopClock(), iter(range(9)), lambda _: None)
        serving = asyncio.ensure_future(worker._serve(NumberedStream(stream)))
        for number in range(int(seconds / 0.5) + 1):
            progress = Progress(7, 7, work_in_hand=True)
            stream.inbox.put_nowait(SimpleNamespace(number=number, message=progress))
            await asyncio.sleep(0.5)
        is_over = serving.done()
        serving.cancel()
        [found] = await asyncio.gather(serving, return_exceptions=True)
        return found if is_over else None

    return run_virtual(main())


def test_a_worker_is_stuck_once_it_stood_still_for_longer_than_a_hang():
    assert stuck_for(HUNG_S) is None
    assert type(stuck_for(HUNG_S + 0.5)) is WorkerDied
