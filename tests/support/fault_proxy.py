"""A TCP proxy that misbehaves on demand: delay, blackhole, one-way loss, truncation, bit flips.

Owns the two pumps of each connection. The kernel here cannot delay or lose packets by itself, so
this stands between real processes. Every fault is counted when it bites.
"""

import asyncio
import random
from collections import Counter

CHUNK = 1 << 16


class FaultProxy:
    """Listens on a port of its own and forwards to one address."""

    def __init__(self, target, seed=0):
        self._nonce, self._at, where = target.rpartition("@")
        self.host, port = where.rsplit(":", 1)
        self.port = int(port)
        self.bitten = Counter()
        self.delay_s = 0.0
        self.blocked = set()
        """Ways that let nothing through: "up" is towards the target, "down" back."""
        self.flips = 0
        self.truncate = 0
        self._rng = random.Random(seed)
        self._open = asyncio.Event()
        self._tasks = set()
        self._writers = set()

    async def start(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return f"{self._nonce}{self._at}127.0.0.1:{port}"

    async def _accept(self, reader, writer):
        try:
            there_reader, there_writer = await asyncio.open_connection(self.host, self.port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, there_writer}
        for route, source, target in (("up", reader, there_writer), ("down", there_reader, writer)):
            task = asyncio.create_task(self._pump(route, source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, route, source, target):
        try:
            while data := await source.read(CHUNK):
                if self.delay_s:
                    self.bitten["delay"] += 1
                    await asyncio.sleep(self.delay_s)
                while route in self.blocked:
                    self.bitten[f"blocked {route}"] += 1
                    self._open.clear()
                    await self._open.wait()
                if route == "down" and len(data) > 512:
                    data = self._damaged(data)
                    if self.truncate:
                        self.truncate -= 1
                        self.bitten["truncate"] += 1
                        target.write(data[: len(data) // 2])
                        await target.drain()
                        break
                target.write(data)
                await target.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            target.transport.abort()

    def _damaged(self, data):
        if not self.flips:
            return data
        self.flips -= 1
        self.bitten["flip"] += 1
        out = bytearray(data)
        # Deep inside a large read: payload of a KV frame, with all odds.
        for _ in range(self._rng.randint(1, 8)):
            out[self._rng.randrange(len(out) // 4, len(out))] ^= 1 << self._rng.randrange(8)
        return bytes(out)

    def block(self, *routes):
        self.blocked |= set(routes)

    def unblock(self):
        self.blocked.clear()
        self._open.set()

    def cut(self):
        """Reset every connection."""
        for writer in list(self._writers):
            if not writer.is_closing():
                self.bitten["cut"] += 1
                writer.transport.abort()
        self._writers.clear()

    async def stop(self):
        self._server.close()
        self.unblock()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
