"""Replies to HTTP/1.0: they end with the connection, for such clients know no chunks.

Owns the difference to uvicorn's protocol, which sends chunks to everyone. Does not know replies.
"""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class CloseDelimited(HttpToolsProtocol):
    """uvicorn's protocol, with HTTP/1.0 as its clients understand it."""

    def _start_asgi_task(self, cycle: Any, app: ASGIApp) -> None:  # noqa: ANN401 - uvicorn's own
        is_old = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, _unchunked(cycle, app) if is_old else app)


def _unchunked(cycle: Any, app: ASGIApp) -> ASGIApp:  # noqa: ANN401 - uvicorn's own
    """Send bodies as they are; uvicorn closes the connection after them."""
    cycle.chunked_encoding = False

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_plain(message: Message) -> None:
            # uvicorn checks what is not chunked against a length; make any length the right one.
            cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return run
