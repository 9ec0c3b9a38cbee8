"""A session's streams made by hand, and an attempt that listens to one.

Owns the scripted far end, the network that hands it out, and the listener.
"""

import asyncio
from types import SimpleNamespace

from core.session import Role, Wanted, WorkerDescriptor

WORKER = WorkerDescriptor("w", Role.DECODE, 1, "session", "transfer", "m", "digest", 16, 100, 2048)


class Listener:
    """An attempt of epoch 3 that keeps what it hears, and fails if it is told to."""

    epoch = 3

    def __init__(self, error=None):
        self.heard, self.failed, self.error = [], [], error

    def wanted(self):
        return Wanted("r", 3, (0,))

    def on_delta(self, worker_id, delta):
        self._hear(delta)

    def on_ended(self, worker_id, ended):
        self._hear(ended)

    def on_lost(self, worker_id, error):
        self._hear(error)

    def _hear(self, news):
        self.heard.append(news)
        if self.error is not None:
            raise self.error

    def fail(self, error):
        self.failed.append(error)


class Wire:
    """A network whose streams are scripted: each dial takes the next script."""

    def __init__(self, *scripts):
        self.scripts, self.streams = list(scripts), []

    async def dial(self, address):
        stream = self.scripts.pop(0)
        if isinstance(stream, Exception):
            raise stream
        self.streams.append(stream)
        return stream


class Script:
    """The far end of a stream: numbered messages to receive, then silence."""

    transport = "script"

    def __init__(self, *messages, fails=None):
        self.inbox = asyncio.Queue()
        for number, message in enumerate(messages):
            self.inbox.put_nowait(SimpleNamespace(number=number, message=message))
        self.sent, self.is_reset, self.fails = [], False, fails

    async def send(self, numbered):
        self.sent.append(numbered.message)

    async def recv(self):
        if self.fails is not None and self.inbox.empty():
            raise self.fails
        return await self.inbox.get()

    def reset(self):
        self.is_reset = True
