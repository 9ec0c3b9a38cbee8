"""A transport of your own: KV over TCP, each message after its length.

    python examples/own_transport.py      # moves 256 MiB over loopback and prints the rate

A transport is the `Network` port of core/ports.py: `dial`, `listen`, `close`, and streams that keep
order and end in two ways, in good order or cut. CONTRIBUTING.md names the four other places that a
cluster needs to serve with it. `tests/contract/test_network.py` runs against this file, too.

It trusts whoever connects: beyond loopback, add a proof of who is there.
"""

import asyncio
import contextlib
import struct
import time

from core.ports import MessageStream, StreamClosed, StreamHandler

LENGTH = struct.Struct("!I")
MESSAGE_BYTES = 1 << 20
NUM_MESSAGES = 256
CONNECT_TIMEOUT_S = 5.0


class TcpStream:
    """The `MessageStream` port over one connection."""

    transport = "tcp"

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, message: bytes | memoryview) -> None:
        """Send one message; waits while the peer is behind."""
        if self._writer.is_closing():
            raise StreamClosed("the stream is closed")
        try:
            self._writer.writelines([LENGTH.pack(len(message)), message])
            await self._writer.drain()
        except OSError as error:
            raise StreamClosed(f"the connection was lost: {error}") from error

    async def recv(self) -> bytes:
        """Wait for the next message."""
        try:
            (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return await self._reader.readexactly(size)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise StreamClosed("the peer ended the stream") from error

    async def close(self) -> None:
        """End in good order: what was sent still arrives."""
        with contextlib.suppress(OSError, RuntimeError):  # the peer may have cut it
            self._writer.write_eof()  # `close` would make the later `abort` fail in CPython 3.11

    def reset(self) -> None:
        """Cut: both ends see it, and what is under way is lost."""
        self._reader.feed_eof()
        self._writer.transport.abort()


class TcpNetwork:
    """The `Network` port: make it, and use it, on one loop."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._server: asyncio.Server | None = None
        self._streams: set[TcpStream] = set()

    async def dial(self, address: str) -> TcpStream:
        """Open a stream; `StreamClosed` if nobody listens there."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                stream = TcpStream(*await asyncio.open_connection(host, int(port)))
        except OSError as error:  # a timeout is one, too
            raise StreamClosed(f"nobody listens at {address}: {error}") from error
        self._streams.add(stream)
        return stream

    async def listen(self, on_stream: StreamHandler) -> str:
        """Serve on a free port; returns the address that peers dial."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = TcpStream(reader, writer)
            self._streams.add(stream)
            try:
                await on_stream(stream)
            finally:
                self._streams.discard(stream)
                stream.reset()

        self._server = await asyncio.start_server(serve, self._host, 0)
        return f"{self._host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Stop listening and end every stream."""
        if self._server is not None:
            self._server.close()
        for stream in self._streams:
            stream.reset()
        self._streams.clear()


async def main() -> None:
    """Send messages of the size of KV frames from one end to the other."""
    receiver = TcpNetwork()
    sender = TcpNetwork()
    arrived = asyncio.Event()

    async def receive(stream: MessageStream) -> None:
        num_bytes = 0
        started_at = time.perf_counter()
        with contextlib.suppress(StreamClosed):
            while True:
                num_bytes += len(await stream.recv())
        seconds = time.perf_counter() - started_at
        print(f"{num_bytes >> 20} MiB in {seconds:.2f} s, {num_bytes / seconds / 1e9:.2f} GB/s")
        arrived.set()

    stream = await sender.dial(await receiver.listen(receive))
    frame = bytes(MESSAGE_BYTES)
    for _ in range(NUM_MESSAGES):
        await stream.send(frame)
    await stream.close()
    await arrived.wait()
    await sender.close()
    await receiver.close()


if __name__ == "__main__":
    asyncio.run(main())
