"""Transports that a process beside the worker carries, because their libraries can hang or crash.

Owns the sidecar's life over all its processes (start, watch, kill, start again) and the listening
socket. Does not know torch, transfers or what messages mean.

    worker ── message, slot ──▶ sidecar ══ two-member group ══ sidecar ── message, slot ──▶ worker
           one socket each, and one arena of slots a connection, in shared memory

The listening socket is the worker's, so its address stays when the sidecar is killed. Until the
next one is up, streams end, dialling fails, and transfers take another transport.
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
"""A sidecar without a heartbeat for so long is killed: it hangs in a driver, or is stopped."""
WATCH_S = 0.5
RESTART_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
"""Doubled at each start that fails, up to this: one that cannot start must not fill the log."""
BACKLOG = 128
log = logging.getLogger(__name__)


@functools.cache
def _here() -> str:
    """Name of this host's network: loopback addresses mean the same only within one."""
    # The same boot and the same network namespace; a container has its own loopback.
    boot_id, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    name = (
        f"{boot_id.read_text()}{network.readlink()}" if boot_id.exists() else socket.gethostname()
    )
    return hashlib.sha256(name.encode()).hexdigest()[:16]


class SidecarNetwork:
    """The `Network` port over sidecars, one after the other. Make and use it on one loop."""

    def __init__(self, kind: str, host: str, message_bytes: int) -> None:
        """Name the kind of pairs, the address to bind, and the most that goes in one piece."""
        self._kind = kind
        self._host = host
        # Whole pages, so that every slot begins on one.
        self._slot_bytes = -(-(message_bytes + PIECE_HEAD_BYTES) // 4096) * 4096
        self._listener: socket.socket | None = None
        self._watching: asyncio.Task[None] | None = None
        self.client: SidecarClient | None = None
        """The process of now; None before `listen`."""
        self.num_started = 0

    async def listen(self, on_stream: StreamHandler) -> str:
        """See `Network`.

        The sidecar is up on return, or will be tried again: other transports are there meanwhile.

        Raises:
            OSError: The address cannot be bound, or no process was to be had.
        """
        host = bare_host(self._host)
        listener = socket.create_server((host, 0), family=family_of(host), backlog=BACKLOG)
        self._listener = listener
        # The listener stays open here: its address outlives every sidecar that serves on it.
        client = self._start(listener, on_stream)
        self._watching = asyncio.get_running_loop().create_task(
            self._keep_up(client, listener, on_stream)
        )
        with contextlib.suppress(StreamClosed):
            await client.ready()
        host, port = listener.getsockname()[:2]
        return f"{join_address(host, port)}/{_here() if is_loopback(host) else ''}"

    def _start(self, listener: socket.socket, on_stream: StreamHandler) -> SidecarClient:
        client = SidecarClient(self._kind, self._slot_bytes, listener, self._host, on_stream)
        self.client = client
        self.num_started += 1
        return client

    async def _keep_up(
        self, client: SidecarClient, listener: socket.socket, on_stream: StreamHandler
    ) -> None:
        """Kill a sidecar that stands still, and start one for each that died."""
        pause_s = RESTART_PAUSE_S
        while True:
            try:
                await client.ready()
                pause_s = RESTART_PAUSE_S
                reason = await self._watch(client)
            except StreamClosed as error:
                reason = str(error)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
            except Exception:
                # Without this task nobody would ever start the next one.
                log.exception("the watch over the %s sidecar broke on a bug", self._kind)
                reason = "the watch over it broke"
            events.CARRIER_ENDED.log(kind=self._kind, reason=reason)
            await client.close()
            # The other transports serve meanwhile, so there is time: a missing library fails at
            # every start.
            started = None
            while started is None:
                await asyncio.sleep(pause_s)
                try:
                    started = self._start(listener, on_stream)
                except OSError as error:  # no process or descriptor was to be had
                    pause_s = min(2 * pause_s, MAX_PAUSE_S)
                    log.warning("no %s sidecar could be started: %s", self._kind, error)
            client = started

    async def _watch(self, client: SidecarClient) -> str:
        """Return why it is given up: it died, or showed no heartbeat for too long.

        Counted in turns of this watch, not in seconds: if the whole machine stood still, heartbeats
        could not be read here either.
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
        # At once, not after a wait: the next transport in line is ready now.
        if client is None or not client.is_ready:
            raise StreamClosed(f"the {self._kind} sidecar is not up")
        where, _, here = address.partition("/")
        if here and here != _here():
            raise StreamClosed(f"{where} is the loopback of another host")
        return await client.dial(where)

    async def close(self) -> None:
        """See `Network`."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self.client is not None:
            await self.client.close()
        if self._listener is not None:
            self._listener.close()
