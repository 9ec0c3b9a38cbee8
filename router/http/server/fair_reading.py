"""How much of one connection is read in one turn of the event loop.

Owns the bound. Does not know HTTP.

asyncio reads 256 KB at once, and again until the socket is empty. If these are chunks of one byte,
parsing takes tens of milliseconds, in which nobody else is served.
"""

from __future__ import annotations

import asyncio

from router.http.server.protocol import HttpProtocol

READ_BYTES = 16 << 10
"""A few milliseconds of parsing, whatever these bytes are."""


class FairReading(asyncio.BufferedProtocol):
    """Reads for a connection's protocol, and yields to others after each full buffer."""

    def __init__(self, protocol: HttpProtocol, buffer: memoryview) -> None:
        """Read into `buffer`, which connections share: its content is parsed at once."""
        self._protocol = protocol
        self._buffer = buffer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Forward."""
        self._protocol.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forward."""
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        """Forward."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Forward."""
        self._protocol.resume_writing()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what arrived; if the buffer was full, read the rest in the next turn."""
        # Copied: the parser may keep a piece of it, and the next connection reads into the buffer.
        self._protocol.data_received(bytes(self._buffer[:nbytes]))
        flow = self._protocol.flow
        # asyncio reads on at once while a socket has bytes; a fast uploader would keep the loop.
        if nbytes == len(self._buffer) and not flow.read_paused:
            flow.pause_reading()
            self._protocol.loop.call_soon(flow.resume_reading)
