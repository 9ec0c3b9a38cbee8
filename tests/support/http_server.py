"""An HTTP server alone, on a real socket: our listener and protocol before a small application."""

import asyncio
import contextlib
import socket
from collections import Counter

import uvicorn

from router.http.server.connections import ConnectionTable
from router.http.server.listener import HttpServer


class SmallApp:
    """`/health` answers, `/echo` returns the body's length, `/hold` waits, `/big` says much."""

    def __init__(self):
        self.seen = []
        self.let_go = asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.seen.append(scope["path"])
        body = b"ok"
        if scope["path"] == "/echo":
            size, more = 0, True
            while more:
                message = await receive()
                more = message.get("more_body", False)
                size += len(message.get("body", b""))
            body = str(size).encode()
        elif scope["path"] == "/hold":
            await receive()  # as every server of ours does: otherwise nobody hears the client go
            await self.let_go.wait()
        elif scope["path"] == "/big":
            body = b"x" * (16 << 20)
        length = str(len(body)).encode()
        headers = [(b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class HttpFixture:
    """`async with HttpFixture(limit=8) as server:`"""

    def __init__(
        self,
        limit=64,
        per_address=None,
        reserved=2,
        stall_s=30.0,
        app=None,
        tls=None,
        on_refused=lambda code, address: None,
    ):
        self.app = app or SmallApp()
        self.on_refused = on_refused
        self.table = ConnectionTable(limit, per_address or limit, reserved)
        self.stall_s, self.tls = stall_s, tls
        self.refused = Counter()

    async def __aenter__(self):
        self._patience = asyncio.timeout(30)  # a test that waits for ever fails
        await self._patience.__aenter__()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self.app,
            http="httptools",
            ws="none",
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=60,
            timeout_graceful_shutdown=1,
            log_config=None,
            **({"ssl_certfile": self.tls[0], "ssl_keyfile": self.tls[1]} if self.tls else {}),
        )

        def count(code, address):
            self.refused[code] += 1
            self.on_refused(code, address)

        self._server = HttpServer(config, listener, self.table, self.stall_s, count)
        self._task = asyncio.create_task(self._server.serve())
        return self

    async def __aexit__(self, *error):
        try:
            await self._stop()
        finally:
            await self._patience.__aexit__(*error)

    async def _stop(self):
        self.app.let_go.set() if hasattr(self.app, "let_go") else None
        for connection in list(self.table._all):
            connection.close()
        self._server.should_exit = True
        await self._task

    @property
    def protocols(self):
        """Of the open connections."""
        return list(self._server.server_state.connections)

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def say(self, data, timeout_s=20.0):
        """Send bytes on a connection of their own and read to its end."""
        reader, writer = await self.connect()
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        try:
            async with asyncio.timeout(timeout_s):
                return await read_all(reader)
        finally:
            writer.close()

    async def status_of(self, path):
        """Status of a GET on a fresh connection."""
        head = f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
        return status(await self.say(head))


async def read_all(reader):
    out = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            out += piece
    return out


def status(reply):
    """The first status of what came; 0 for nothing."""
    return int(reply.split(b" ", 2)[1]) if reply else 0
