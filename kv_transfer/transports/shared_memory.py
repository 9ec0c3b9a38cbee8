"""The shared-memory transport: the receiver maps the sender's pool and copies straight out of it.

Owns a Unix socket, the passing of segments (as file descriptors, once per peer) and
length-prefixed messages for everything but payload. Does not know what messages mean.

    decode ── name of the pool it has mapped, or none ──▶ prefill
           ◀── name of the pool, sizes, descriptors if they are new ──
           ◀──────────── messages of one transfer ────────────▶

Linux only: the socket has an abstract name, so that a killed worker leaves no file behind. Both
ends must be the same user's. The receiver maps for reading alone; a block that is allocated again
while it reads shows in the checksum.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from core.ports import SharedPool, StreamClosed, StreamHandler
from kv_transfer.frames import MAX_MESSAGE_BYTES
from process.shared_memory import touch

NAME_BYTES = 16
MAX_SEGMENTS = 64
UNUSED_S = 30.0
"""A mapping keeps a dead peer's memory from the system, so what is not used is let go;
mapping again is cheap."""
ANSWER_TIMEOUT_S = 2.0
"""Longest wait for the other end of the handshake, which is in the same machine."""
BACKLOG = 256
ACCEPT_PAUSE_S = 0.1
"""After an accept that failed: without descriptors the loop would spin."""
_LENGTH = struct.Struct("<I")
_POOL = struct.Struct(f"<{NAME_BYTES}sI")
_PEER = struct.Struct("3i")  # pid, uid, gid
NO_POOL = bytes(NAME_BYTES)


class _SharedStream:
    """One end of a transfer's stream."""

    transport = "shm"

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        segments: list[memoryview] | None,
        pool_name: bytes,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.peer_segments = segments
        self.pool_name = pool_name

    async def send(self, message: bytes) -> None:
        try:
            self._writer.write(_LENGTH.pack(len(message)) + message)
            await self._writer.drain()
        except (ConnectionError, RuntimeError) as error:
            raise StreamClosed(str(error)) from error

    async def recv(self) -> bytes:
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            # A peer's number: it would be allocated before anything of it has come.
            if length > MAX_MESSAGE_BYTES:
                raise StreamClosed(
                    f"the peer announced a message of {length} bytes, the limit is "
                    f"{MAX_MESSAGE_BYTES}"
                )
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise StreamClosed("the peer closed the stream") from error

    async def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # it may be closed already
            self._writer.write_eof()

    def reset(self) -> None:
        self._writer.transport.abort()


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A peer's pool as this process sees it."""

    name: bytes
    segments: list[memoryview]
    used_at: float


class SharedNetwork:
    """The `Network` port within one host. Make and use it on one loop."""

    def __init__(self, pool: Callable[[], SharedPool | None]) -> None:
        """Keep what returns this worker's pool as it is at the moment: ranks may bring another."""
        self._pool = pool
        self._tasks: set[asyncio.Task[None]] = set()
        self._mapped: dict[str, _Mapped] = {}
        self._purge: asyncio.TimerHandle | None = None

    async def listen(self, on_stream: StreamHandler) -> str:
        """See `Network`."""
        # Random: an address that was published before a restart must not reach the next worker.
        name = f"baton-kv-{secrets.token_hex(16)}"
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        server.bind(f"\0{name}")
        server.listen(BACKLOG)
        self._own(asyncio.get_running_loop().create_task(self._serve(server, on_stream)))
        return f"@{name}"

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, server: socket.socket, on_stream: StreamHandler) -> None:
        loop = asyncio.get_running_loop()
        with server:
            while True:
                try:
                    connection, _ = await loop.sock_accept(server)
                except OSError:
                    # Out of descriptors, or a peer that left at once: others may still come.
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                    continue
                self._own(loop.create_task(self._accept(connection, on_stream)))

    async def _accept(self, connection: socket.socket, on_stream: StreamHandler) -> None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                pool_name = await self._send_pool(connection)
        except (OSError, TimeoutError, StreamClosed):
            connection.close()
            return
        except BaseException:
            connection.close()
            raise
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        stream = _SharedStream(reader, writer, None, pool_name)
        try:
            await on_stream(stream)
        finally:
            writer.close()  # the handler's end is the stream's

    async def _send_pool(self, connection: socket.socket) -> bytes:
        """Check who dials, and send it what it has not mapped yet; returns the pool's name."""
        loop = asyncio.get_running_loop()
        _check_user(connection)
        known = await loop.sock_recv(connection, NAME_BYTES)
        pool = self._pool()
        if pool is None or len(known) < NAME_BYTES:
            raise StreamClosed("there is no pool to share")
        head = _POOL.pack(pool.name, len(pool.sizes)) + struct.pack(
            f"<{len(pool.sizes)}Q", *pool.sizes
        )
        # Does not block: a fresh socket's buffer takes these few bytes at once.
        socket.send_fds(connection, [head], [] if known == pool.name else list(pool.fds))
        return pool.name

    async def dial(self, address: str) -> _SharedStream:
        """See `Network`; afterwards the stream's `peer_segments` are the peer's pool."""
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # Compared afterwards: what is mapped anew has to be touched once.
        known = self._mapped.get(address)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await loop.sock_connect(connection, address.replace("@", "\0", 1))
                _check_user(connection)
                mapped = await self._map(connection, address)
        except (OSError, TimeoutError, struct.error, StreamClosed) as error:
            connection.close()
            raise StreamClosed(f"no shared memory with {address}: {error}") from error
        except BaseException:  # cancelled, or a bug: nobody else has the socket
            connection.close()
            raise
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        if known is None or known.segments is not mapped.segments:
            # Now, so that no copy waits for page faults. Workers are introduced before a request
            # needs them, so no request waits here either.
            for segment in mapped.segments:
                await asyncio.to_thread(touch, segment)
        return _SharedStream(reader, writer, mapped.segments, mapped.name)

    async def _map(self, connection: socket.socket, address: str) -> _Mapped:
        loop = asyncio.get_running_loop()
        known = self._mapped.get(address)
        name, segments = (known.name, known.segments) if known else (NO_POOL, [])
        await loop.sock_sendall(connection, name)
        # The loop has no receive that takes descriptors along.
        readable = asyncio.Event()
        loop.add_reader(connection, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(connection)
        head, fds, _, _ = socket.recv_fds(connection, _POOL.size + 8 * MAX_SEGMENTS, MAX_SEGMENTS)
        try:
            new_name, count = _POOL.unpack_from(head)
            sizes = struct.unpack_from(f"<{count}Q", head, _POOL.size)
            # The same name means the same memory: nothing was sent, and the mapping serves on.
            if new_name != name:
                segments = [_map(fd, size) for fd, size in zip(fds, sizes, strict=True)]
        except ValueError as error:
            raise StreamClosed(
                f"the peer announced {len(head)} bytes and {len(fds)} segments"
            ) from error
        finally:
            for fd in fds:
                os.close(fd)  # a mapping keeps the memory without them
        mapped = self._mapped[address] = _Mapped(new_name, segments, loop.time())
        self._purge = self._purge or loop.call_later(UNUSED_S, self._unmap_unused)
        return mapped

    def _unmap_unused(self) -> None:
        """Forget what nobody dialled for a while; streams keep what they use."""
        loop = asyncio.get_running_loop()
        self._mapped = {a: m for a, m in self._mapped.items() if loop.time() - m.used_at < UNUSED_S}
        self._purge = loop.call_later(UNUSED_S, self._unmap_unused) if self._mapped else None

    async def close(self) -> None:
        """See `Network`."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._mapped.clear()
        if self._purge is not None:
            self._purge.cancel()


def _check_user(connection: socket.socket) -> None:
    """Refuse other users: names of sockets can be guessed, or taken over after a death.

    Raises:
        StreamClosed: It is another user's process.
    """
    _, uid, _ = _PEER.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    )
    if uid != os.getuid():
        raise StreamClosed(f"user {os.getuid()} exchanges no KV with user {uid}")


def _map(fd: int, size: int) -> memoryview:
    """Map a segment for reading; a file shorter than it claims would kill the reader."""
    if os.fstat(fd).st_size < size:
        raise ValueError(f"a segment of {os.fstat(fd).st_size} bytes claims to have {size}")
    return memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
