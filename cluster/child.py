"""A worker or router as a child process of `baton up --local`.

Owns the child's life: tie it to the parent, read the config, report its addresses, run until it is
stopped. Does not know siblings. `cluster.local` starts it as `python -m cluster.child KIND
LIFE_FD`; config and member lists arrive on standard input, one JSON line each; the answer goes to
standard output.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

import uvloop

from core import logs
from core.config import BatonConfig
from core.errors import ServingError
from core.session import PoolId
from process.parent_death import exit_with_parent

MAX_LINE_BYTES = 16 << 20
EXIT_BUG = 70
log = logging.getLogger(__name__)


def report(message: dict[str, Any]) -> None:
    """Send the parent a line."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def open_stdin() -> asyncio.StreamReader:
    """Open standard input, from which the parent's lines are read."""
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _run_worker(pool: PoolId, config: BatonConfig, stop: asyncio.Event) -> None:
    from cluster.members import to_json  # noqa: PLC0415 - a router loads none of this
    from cluster.worker_process import RunningWorker  # noqa: PLC0415

    worker = await RunningWorker.start(config, pool, node="local")
    report({"worker": to_json(worker.descriptor)})
    # Broken or asked to end, it leaves in order; `check` then raises what broke it.
    worker.unit.fatal.add_done_callback(lambda _: stop.set())
    await stop.wait()
    await worker.stop()
    worker.check()


async def _run_router(
    config: BatonConfig, lines: asyncio.StreamReader, stop: asyncio.Event
) -> None:
    from cluster.members import PushedMembership, from_json  # noqa: PLC0415
    from cluster.router_process import RunningRouter  # noqa: PLC0415
    from router.observe.routers import RouterEntry  # noqa: PLC0415

    membership = PushedMembership()
    router = RunningRouter(config, membership)
    await router.start()
    report({"router": asdict(router.entry)})

    async def listen() -> None:
        while line := await lines.readline():
            update = json.loads(line)
            membership.update(
                [from_json(m) for m in update["members"]], is_starting=update["is_starting"]
            )
            router.service.status.routers.update(RouterEntry(**e) for e in update["routers"])
        stop.set()  # the parent has closed the pipe: it is gone

    listener = asyncio.get_running_loop().create_task(listen())
    await stop.wait()
    listener.cancel()
    await router.stop()


async def _main(kind: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    lines = await open_stdin()
    config = BatonConfig.model_validate_json(await lines.readline())
    try:
        if kind == "router":
            await _run_router(config, lines, stop)
        else:
            await _run_worker(PoolId.parse(kind), config, stop)
    except ServingError as error:
        report({"error": type(error).__name__, "message": error.message})
        raise SystemExit(3) from error
    except Exception:  # half-started components may block an orderly exit, and the parent waits
        log.exception("the process ends by a bug")
        logs.close()
        os._exit(EXIT_BUG)


if __name__ == "__main__":
    logs.configure(sys.argv[1])
    exit_with_parent(int(sys.argv[2]))
    uvloop.run(_main(sys.argv[1]))
