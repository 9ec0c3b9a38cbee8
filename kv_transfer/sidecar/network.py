"""Transports that a process beside the worker carries, because their libraries can hang or crash.

Owns the carrier's life over all its processes (start, watch, kill, start again) and the listening
socket. Does not know torch, transfers or what messages mean.

    worker ── record, slot ──▶ carrier ══ two-member group ══ carrier ── record, slot ──▶ worker
           one socket each, and one arena of slots a link, in shared memory

The listening socket is the worker's, so its address stays when the carrier is killed; until the
next one is up, streams end, dialling fails, and transfers go another way.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import socket
from pathlib import Path

from core import events
from core.addresses import bare_host, family_of, join_address
from core.ports import MessageStream, StreamClosed, StreamHandler
from kv_transfer.sidecar.client import SidecarClient, is_loopback
from kv_transfer.sidecar.protocol import PIECE_HEAD_BYTES

STILL_S = 2.0
"""A carrier that shows no pulse for so long is killed."""
WATCH_S = 0.5
RESTART_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
BACKLOG = 128
log = logging.getLogger(__name__)


@functools.cache
def _here() -> str:
    """Name of this host's network: loopback addresses mean the same only within one."""
    boot_id, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    name = (
        f"{boot_id.read_text()}{network.readlink()}" if boot_id.exists() else socket.gethostname()
    )
    return hashlib.sha256(name.encode()).hexdigest()[:16]


class SidecarNetwork:
    """The `Network` port over carriers, one after the other. Make and use it on one loop."""

    def __init__(self, kind: str, host: str, message_bytes: int) -> None:
        """Name the kind of pairs, the address to bind, and the most that goes in one piece."""
        self._kind, self._host = kind, host
        self._slot_bytes = -(-(message_bytes + PIECE_HEAD_BYTES) // 4096) * 4096
        self._listener: socket.socket | None = None
        self._on_stream: StreamHandler | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.client: SidecarClient | None = None
        self.num_started = 0

    async def listen(self, on_stream: StreamHandler) -> str:
        """See `Network`.

        The carrier is up on return, or will be tried again: other ways are there meanwhile.
        """
        self._on_stream = on_stream
        host = bare_host(self._host)
        self._listener = socket.create_server((host, 0), family=family_of(host), backlog=BACKLOG)
        self._spawn()
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        if self.client is not None:
            with contextlib.suppress(StreamClosed):
                await self.client.ready()
        host, port = self._listener.getsockname()[:2]
        return f"{join_address(host, port)}/{_here() if is_loopback(host) else ''}"

    def _spawn(self) -> None:
        if self._listener is not None:
            self.client = SidecarClient(self._kind, self._slot_bytes)
            self.client.on_stream = self._on_stream
            self.client.start(self._listener, self._host)
            self.num_started += 1

    async def _keep(self) -> None:
        """Kill a carrier that stands still, start one for one that died."""
        pause_s = RESTART_PAUSE_S
        while (client := self.client) is not None:
            try:
                await client.ready()
                pause_s = RESTART_PAUSE_S
                reason = await self._watch(client)
            except StreamClosed as error:
                reason = str(error)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
            except Exception:
                # Without a keeper nobody would ever start the next one.
                log.exception("the watch over the %s carrier broke on a bug", self._kind)
                reason = "the watch over it broke"
            events.CARRIER_ENDED.log(kind=self._kind, reason=reason)
            await client.close()
            await asyncio.sleep(pause_s)
            with contextlib.suppress(OSError):  # no process to be had: the next turn tries again
                self._spawn()

    async def _watch(self, client: SidecarClient) -> str:
        """Return why, when it is dead or has shown no pulse for too long.

        Only watches of its own are counted: a worker that was stopped itself blames nobody.
        """
        num_still = 0
        before = -1.0
        while not client.is_dead and num_still * WATCH_S < STILL_S:
            num_still = num_still + 1 if client.heartbeat_at == before else 0
            before = client.heartbeat_at
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await client.died.wait()
        return "it died" if client.is_dead else f"it gave no sign for {STILL_S:g} s"

    async def dial(self, address: str) -> MessageStream:
        """See `Network`; `listen` comes first."""
        client = self.client
        if client is None or not client.is_ready:
            raise StreamClosed(f"the {self._kind} carrier is not up")
        where, _, here = address.partition("/")
        if here and here != _here():
            raise StreamClosed(f"{where} is the loopback of another host")
        return await client.dial(where)

    async def close(self) -> None:
        """See `Network`."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self.client is not None:
            await self.client.close()
        if self._listener is not None:
            self._listener.close()
