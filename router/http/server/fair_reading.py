"""How much of one connection is read in one turn of the event loop.

Owns the bound. Does not know HTTP.

A loop reads 256 KB at once, and again until the socket is empty. Sent as chunks of one byte, that
is tens of milliseconds of parsing, in which nobody else is served.
"""

from __future__ import annotations

import asyncio

from router.http.server.protocol import HttpProtocol

READ_BYTES = 16 << 10
"""A few milliseconds of parsing, whatever they are."""


class FairReading(asyncio.BufferedProtocol):
    """Stands before a connection's protocol, and lets others have a turn after each full buffer."""

    def __init__(self, protocol: HttpProtocol, buffer: memoryview) -> None:
        """Nothing has come yet; `buffer` is free again when what came has been parsed."""
        self._protocol = protocol
        self._buffer = buffer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Hand on."""
        self._protocol.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Hand on."""
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        """Hand on."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Hand on."""
        self._protocol.resume_writing()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what came; if that may not be all, the rest waits for the next turn."""
        self._protocol.data_received(bytes(self._buffer[:nbytes]))
        flow = self._protocol.flow
        if nbytes == len(self._buffer) and not flow.read_paused:
            flow.pause_reading()
            self._protocol.loop.call_soon(flow.resume_reading)
