"""The HTTP server's socket: which connections are accepted, and the server behind it.

Owns accepting within the connection table's limits, before TLS, and uvicorn's start and stop. Does
not know requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from typing import Any

import uvicorn

from router.descriptors import INSIDE_DESCRIPTORS, grpc_share
from router.http.server.connections import Connection, ConnectionTable
from router.http.server.fair_reading import READ_BYTES, FairReading
from router.http.server.protocol import HEAD_TIMEOUT_S, LINGER_S, HttpProtocol, OnRefused
from router.refusals import NO_DESCRIPTORS, TOO_MANY_CONNECTIONS

BACKLOG = 1024
ACCEPTS_AT_ONCE = 64
"""Then the loop does other work."""
PAUSE_S = 0.05
"""Without descriptors, accepting again at once would only burn CPU."""
NUM_RESERVED = 32
"""Connections kept for liveness."""
UNSENT_BYTES = 16 << 10
"""What the kernel keeps of a reply beyond the client's receive buffer."""
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def make_connection_table(
    max_connections: int, max_per_address: int, num_descriptors: int
) -> ConnectionTable:
    """Make a table with the configured limits, or lower ones if descriptors are scarce."""
    room = num_descriptors - INSIDE_DESCRIPTORS - NUM_RESERVED - grpc_share(num_descriptors)
    limit = max(NUM_RESERVED, min(max_connections, room))
    # One address may not take all, and needs most: behind a proxy everybody has the same.
    share = max_per_address or max(1, limit * 3 // 4)
    return ConnectionTable(limit, min(share, limit), NUM_RESERVED)


class HttpListener:
    """Accepts connections for one server, in the place of uvicorn's asyncio server."""

    def __init__(
        self,
        listener: socket.socket,
        table: ConnectionTable,
        server: uvicorn.Server,
        stall_s: float,
        on_refused: OnRefused,
    ) -> None:
        """Listen; `start` accepts the first connection."""
        self._socket = listener
        self._table = table
        self._server = server
        self._stall_s = stall_s
        self._on_refused = on_refused
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._opening: set[asyncio.Task[None]] = set()
        self._resume: asyncio.TimerHandle | None = None
        self._is_closed = False
        listener.setblocking(False)
        listener.listen(BACKLOG)

    def start(self) -> None:
        """Accept connections."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                accepted, peer = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    self._pause()
                    return
                continue  # this client left while it waited
            self._admit(accepted, str(peer[0]))

    def _admit(self, accepted: socket.socket, address: str) -> None:
        connection = self._table.admit(address, accepted.close)
        if connection is None:
            self._on_refused(TOO_MANY_CONNECTIONS.code, address)
            accepted.close()
            return
        accepted.setblocking(False)
        # With Nagle's algorithm a client's delayed acknowledgement holds each reply back by 40 ms.
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(AttributeError, OSError):  # Linux
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        task = self._loop.create_task(self._open(accepted, connection))
        connection.close = task.cancel  # until the handshake is over: then the protocol closes it
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, accepted: socket.socket, connection: Connection) -> None:
        """Connect a socket to its protocol, after the TLS handshake if there is one."""
        config = self._server.config

        def protocol() -> FairReading:
            http = HttpProtocol(
                connection,
                self._stall_s,
                self._on_refused,
                config=config,
                server_state=self._server.server_state,
                app_state={},
                _loop=self._loop,
            )
            return FairReading(http, self._buffer)

        handshake: dict[str, Any] = {}
        if config.ssl is not None:
            handshake = {
                "ssl": config.ssl,
                "ssl_handshake_timeout": HEAD_TIMEOUT_S,
                "ssl_shutdown_timeout": LINGER_S,
            }
        try:
            await self._loop.connect_accepted_socket(protocol, accepted, **handshake)
        # No protocol is connected yet that would do this at its end.
        except (OSError, ssl.SSLError, TimeoutError):
            connection.forget()
            accepted.close()
        except asyncio.CancelledError:
            connection.forget()
            accepted.close()
            raise

    def _pause(self) -> None:
        """No descriptor is left: close an idle connection, and accept none for a moment."""
        self._on_refused(NO_DESCRIPTORS.code, "")
        self._table.displace()
        # The socket stays readable while nobody accepts, and would wake the loop without end.
        self._loop.remove_reader(self._socket)
        self._resume = self._loop.call_later(PAUSE_S, self._accept_again)

    def _accept_again(self) -> None:
        self._resume = None
        if not self._is_closed:
            self._loop.add_reader(self._socket, self._accept)

    def close(self) -> None:
        """Accept no further connections; open ones stay."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for task in self._opening:
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait for the handshakes that `close` has cancelled."""
        await asyncio.gather(*self._opening, return_exceptions=True)


class HttpServer(uvicorn.Server):
    """uvicorn behind our own listener, without its signal handlers: the process has others."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        table: ConnectionTable,
        stall_s: float,
        on_refused: OnRefused,
    ) -> None:
        """Serve on a bound socket; `serve` opens it."""
        super().__init__(config)
        self._listener = HttpListener(listener, table, self, stall_s, on_refused)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        self.servers = [self._listener]
        self._listener.start()
        self.started = True

    def install_signal_handlers(self) -> None:
        """Install none."""

    def capture_signals(self) -> contextlib.nullcontext[None]:
        """Capture none."""
        return contextlib.nullcontext()
