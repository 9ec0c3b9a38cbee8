"""The limits on one HTTP connection, in bytes, time and number, before its requests are routed.

Owns the limits on heads, the deadline from accept to the end of the headers and between requests,
the bound on pipelined requests, and the cut of a peer that does not read. Does not know routes,
keys or bodies.

uvicorn on httptools has none of these: its parser collects an unfinished header without end, no
timer runs before the first request is whole, and pipelined requests of a client that has left are
started.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from core.errors import RequestTimeout, ServingError, SlowReader
from router.http.auth import OPEN_PATHS
from router.http.errors import CUT_STATE, plain_body
from router.http.server.close_delimited import CloseDelimited
from router.http.server.connections import Connection
from router.refusals import (
    BAD_REQUEST,
    HEADERS_TOO_LARGE,
    SILENT,
    TOO_MANY_CONNECTIONS,
    TOO_MANY_PIPELINED,
    Refusal,
)
from router.request_stream import slow_reader

MAX_HEAD_BYTES = 16 << 10
"""Of request line and headers together, and of trailers."""
MAX_HEADERS = 100
HEADER_OVERHEAD_BYTES = 4
"""Colon, space and line end."""
HEAD_TIMEOUT_S = 5.0
MAX_PIPELINED = 16
LINGER_S = 1.0
"""How long a refused client may still send: closed at once, it would not read the answer."""
WRITE_BUFFER_BYTES = 16 << 10
"""What is buffered for a client that reads slowly, beside the kernel's buffers."""

OnRefused = Callable[[str, str], None]


class HttpProtocol(CloseDelimited):
    """uvicorn's protocol with limits. `on_refused` gets the reason and the peer's address."""

    def __init__(
        self,
        connection: Connection,
        stall_s: float,
        on_refused: OnRefused,
        **uvicorn: Any,  # noqa: ANN401
    ) -> None:
        """Wait for the first byte.

        Args:
            connection: Its entry in the connection table.
            stall_s: A client that reads nothing of its output for this long is cut.
            on_refused: Counts refusals.
            uvicorn: Arguments of uvicorn's protocol.
        """
        super().__init__(**uvicorn)
        self._connection = connection
        self._stall_s = stall_s
        self._on_refused = on_refused
        self._is_over = False
        self._is_in_head = False
        self._is_in_message = False
        self._has_progressed = False
        self._head_bytes = 0
        self._pending_bytes = 0
        self._fault: tuple[Refusal, str] | None = None
        self._running: Any = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None

    # --- the connection -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Expect the whole first head within `HEAD_TIMEOUT_S`."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self._connection.close = transport.abort
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the peer: its pipelined requests are not started."""
        timers = (self._head_timer, self._stall_timer, self._linger_timer, self._body_timer)
        for timer in timers:
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stall_timer = self._linger_timer = self._body_timer = None
        self._unset_keepalive_if_required()
        self._connection.forget()
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None:
                # uvicorn tells only the newest request.
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    # --- input ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse, then refuse what breaks a limit."""
        if self._is_over or self.parser is None:
            return  # drop what a refused client still sends
        self._unset_keepalive_if_required()
        self._has_progressed = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # there is no other protocol: the request is answered as plain HTTP
        except httptools.HttpParserError:
            self._note_fault(BAD_REQUEST, "this is not an HTTP request")
        # The parser does not report an unfinished header: only bytes without progress show it.
        self._pending_bytes = 0 if self._has_progressed else self._pending_bytes + len(data)
        if self._pending_bytes > MAX_HEAD_BYTES:
            self._head_is_too_large()
        if self._fault is not None:
            self._refuse(*self._fault)
        elif self._is_in_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._is_in_head = True
        self._is_in_message = True
        self._head_bytes = 0
        super().on_message_begin()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._note_fault(
                TOO_MANY_PIPELINED,
                f"more than {MAX_PIPELINED} requests wait on this connection; read the answers",
            )

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request line."""
        self._head_bytes += len(url)
        if self._fault is None:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer after the body."""
        self._head_bytes += len(name) + len(value) + HEADER_OVERHEAD_BYTES
        if len(self.headers) >= MAX_HEADERS or self._head_bytes > MAX_HEAD_BYTES:
            self._head_is_too_large()
        # A trailer must not become a header of the request, whatever its name: a proxy before this
        # server has not checked it.
        if self._fault is None and self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, unless something is wrong with its head."""
        self._note_progress()
        self._is_in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if self._head_bytes > MAX_HEAD_BYTES:
            self._head_is_too_large()
        path = self.url.partition(b"?")[0].decode("latin-1")
        if self._connection.is_reserved and path not in OPEN_PATHS:
            self._note_fault(
                TOO_MANY_CONNECTIONS,
                "the server has as many connections as it may; try again later",
            )
        if self._fault is not None:
            return
        self._connection.mark_busy()
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # the parser reads nothing after such a request

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._note_progress()
        if self._fault is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        self._note_progress()
        self._is_in_message = False
        if self._fault is None:
            super().on_message_complete()
        if self._body_timer is not None:  # it is answered already
            self._body_timer.cancel()
            self._body_timer = None
            self._connection.mark_idle()

    def _note_progress(self) -> None:
        self._has_progressed = True

    # --- output ---------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:  # noqa: ANN401 - uvicorn's own kinds
        """Note which request is answered now: it need not be the one that was read last."""
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Wait for the rest of an unread body, then for the next request."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reading()
        elif not self.pipeline and self._is_in_message and not self._is_in_head:
            self._body_timer = self.loop.call_later(LINGER_S, self._close_in_order)
        elif not self.pipeline:
            self._connection.mark_idle()

    def pause_writing(self) -> None:
        """Watch a client that reads more slowly than we write."""
        super().pause_writing()
        self._watch_reading()

    def _watch_reading(self) -> None:
        if self._stall_timer is None:
            waiting = self.transport.get_write_buffer_size()
            self._stall_timer = self.loop.call_later(self._stall_s, self._cut_if_stalled, waiting)

    def _cut_if_stalled(self, waiting: int) -> None:
        """Cut a client that has read nothing of the waiting output."""
        self._stall_timer = None
        now_waiting = self.transport.get_write_buffer_size()
        if not now_waiting:
            return
        if now_waiting >= waiting:
            if self._running is not None and not self._running.response_complete:
                self._running.scope["state"][CUT_STATE] = slow_reader(self._stall_s)
            else:  # its request has ended, and is counted
                self._on_refused(SlowReader.code, self._connection.address)
            self.transport.abort()
        else:
            self._watch_reading()

    # --- refusals -------------------------------------------------------------------------------

    def _head_is_too_large(self) -> None:
        self._note_fault(
            HEADERS_TOO_LARGE,
            f"request line and headers may have {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers",
        )

    def _note_fault(self, refusal: Refusal, message: str) -> None:
        """Remember why to refuse the client once its data is parsed; the first reason counts."""
        self._fault = self._fault or (refusal, message)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_in_head:
            self._refuse(
                RequestTimeout, f"the headers were not complete within {HEAD_TIMEOUT_S:g} s"
            )
        else:  # not even a byte has arrived
            self._on_refused(SILENT.code, self._connection.address)
            self.transport.abort()

    def _refuse(self, why: Refusal | type[ServingError], message: str) -> None:
        """Answer with the reason, and close."""
        self._on_refused(why.code, self._connection.address)
        if self._running is not None and not self._running.response_complete:
            self._is_over = True
            self.transport.abort()  # better no answer than one inside another
            return
        body = json.dumps(plain_body(why.http_status, message, why.code)).encode()
        length = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n".encode()
        head = STATUS_LINE[why.http_status] + length + b"connection: close\r\n\r\n"
        self.transport.write(head + body)
        self._close_in_order()

    def _close_in_order(self) -> None:
        """Close our side and wait a moment for the peer's: a reset would discard the answer."""
        self._is_over = True
        # TLS cannot close one side alone.
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.abort)
        else:
            self.transport.close()
            self._watch_reading()
