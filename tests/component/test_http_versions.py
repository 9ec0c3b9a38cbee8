"""What goes over the wire to clients of HTTP/1.0 and 1.1, from uvicorn as the router runs it."""

import asyncio
import contextlib
import socket

import pytest
import uvicorn

from router.http.server.close_delimited import CloseDelimited

EVENTS = [b"data: 1\n\n", b"", b"data: 2\n\n"]


async def app(scope, receive, send):
    """Streams on /stream, answers whole elsewhere."""
    is_stream = scope["path"] == "/stream"
    headers = [] if is_stream else [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for event in EVENTS if is_stream else []:
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b"" if is_stream else b"ok"})


@contextlib.asynccontextmanager
async def served():
    listener = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(app, http=CloseDelimited, log_level="warning", lifespan="off")
    server = uvicorn.Server(settings)
    server.capture_signals = contextlib.nullcontext
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def ask(port, head):
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + b"\r\n\r\n")
        reply = await reader.read()
        writer.close()
    start, _, body = reply.partition(b"\r\n\r\n")
    return start.lower(), body


@pytest.mark.parametrize("extra", ["", "\r\nConnection: keep-alive"])
async def test_a_client_of_http_1_0_gets_no_chunks_and_the_end_is_the_connections(extra):
    async with served() as port:
        head, body = await ask(port, f"GET /stream HTTP/1.0{extra}")
        assert b"transfer-encoding" not in head and b"connection: close" in head
        assert body == b"data: 1\n\ndata: 2\n\n"
        head, body = await ask(port, f"GET / HTTP/1.0{extra}")
        assert b"content-length: 2" in head and body == b"ok"
        head, body = await ask(port, f"HEAD / HTTP/1.0{extra}")
        assert b"content-length: 2" in head and body == b""


async def test_a_client_of_http_1_1_gets_chunks():
    async with served() as port:
        head, body = await ask(port, "GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close")
        assert b"transfer-encoding: chunked" in head and body.endswith(b"0\r\n\r\n")
