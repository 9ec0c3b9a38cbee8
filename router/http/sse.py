"""Server-sent events directly on ASGI: few calls a token, comments while idle, one ending.

Owns the sending of a stream and the watch for a client that leaves. Does not know chunks' content.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from core.errors import Cancelled, ServingError
from core.types import RequestEvent
from router.http.errors import CUT_STATE, error_body, error_response
from router.http.replies import Reply
from router.reply_thread import in_reply_thread
from router.request_stream import StreamGroup, slow_reader

Result = TypeVar("Result")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
KEEP_ALIVE = b": keep-alive\n\n"


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """When a stream is kept alive, and when it is cut."""

    keep_alive_s: float
    slow_reader_s: float
    has_ids: bool
    """Number the events, so that the client can resume with `Last-Event-ID`."""


class EventStream(Response):
    """One reply in chunks. All events that are ready go out in one write."""

    media_type = "text/event-stream"

    def __init__(
        self, reply: Reply, group: StreamGroup, headers: dict[str, str], limits: StreamLimits
    ) -> None:
        """Send `reply` from the events of `group`, which is already started."""
        super().__init__(headers={**headers, **HEADERS})
        # The base class has counted an empty body.
        del self.headers["content-length"]
        self._reply = reply
        self._group = group
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the last event, or until the client leaves; then end the requests."""
        try:
            await unless_disconnected(receive, self._send(send))
        except Cancelled as error:  # the client is gone: only the log gets the error
            await self._group.close(scope.get("state", {}).get(CUT_STATE, error))
        except ServingError as error:
            refusal = error_response(error, self.headers["x-request-id"])
            await refusal(scope, receive, send)
        finally:
            await self._group.close()

    async def _send(self, send: Send) -> None:
        """Send until the last event; cut a client that has not read for too long."""
        limit_s = self._limits.slow_reader_s
        watch = ReadWatch(limit_s)
        try:
            async with watch.deadline:
                await self._send_all(send, watch)
        except TimeoutError as error:
            raise slow_reader(limit_s) from error
        finally:
            watch.stop()

    async def _send_all(self, send: Send, watch: ReadWatch) -> None:
        """Send chunks as events arrive; an error before the first one still gets its status."""
        is_started = False
        while not self._group.is_over and self._reply.error is None:
            events = await self._group.batch(self._limits.keep_alive_s)
            # A comment would commit the status, and a refusal could no longer be a 503.
            if not events and not self._group.is_admitted:
                continue
            text = await self._text(events)
            if not is_started:
                # Before the first byte an error still has a status of its own; after it, only an
                # event.
                if not text and isinstance(self._reply.error, ServingError):
                    raise self._reply.error
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
                is_started = True
            if text or not events:
                body = text.encode() if events else KEEP_ALIVE
                await watch.write(send, body)
        error = self._reply.error
        last = (
            f"data: {json.dumps(error_body(error))}\n\n"
            if error is not None
            else self._reply.last_chunk()
        )
        await send(
            {
                "type": "http.response.body",
                "body": f"{last}data: [DONE]\n\n".encode(),
                "more_body": False,
            }
        )

    async def _text(self, events: list[tuple[int, RequestEvent]]) -> str:
        if self._reply.is_heavy_batch(events):
            return await in_reply_thread(self._chunks, events)
        return self._chunks(events)

    def _chunks(self, events: list[tuple[int, RequestEvent]]) -> str:
        if not self._limits.has_ids:
            return "".join([self._reply.chunks(index, event) for index, event in events])
        out = []
        for index, event in events:
            chunk = self._reply.chunks(index, event)
            self._reply.progress.note(index, event)
            # The id belongs to the event before its blank line; one that sends no chunk moves it
            # all the same.
            out.append(f"{chunk[:-1]}id: {self._reply.progress.event_id}\n\n" if chunk else "")
        return "".join(out)


class ReadWatch:
    """Notices a client that does not read: one of a stream's writes takes too long.

    Nearly all writes end at once, so that one timer watches them all.
    """

    def __init__(self, limit_s: float) -> None:
        """Watch from now on; `stop` ends that."""
        self.deadline = asyncio.timeout(None)
        """Expires when a write has taken `limit_s`."""
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._writing_since: float | None = None
        self._timer = self._loop.call_later(limit_s, self._look)

    async def write(self, send: Send, body: bytes) -> None:
        """Send a part of a body."""
        self._writing_since = self._loop.time()
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._writing_since = None

    def _look(self) -> None:
        now_s = self._loop.time()
        since = now_s if self._writing_since is None else self._writing_since
        if since + self._limit_s <= now_s:
            self.deadline.reschedule(now_s)
        else:
            self._timer = self._loop.call_at(since + self._limit_s, self._look)

    def stop(self) -> None:
        """Watch no more."""
        self._timer.cancel()


async def whole_reply(receive: Receive, reply: Reply, group: StreamGroup) -> dict[str, Any]:
    """Wait for every request's end, and return the body.

    Raises:
        ServingError: The first request that failed; the others are cancelled.
        Cancelled: The client left.
    """

    async def collect() -> dict[str, Any]:
        while not group.is_over:
            for index, event in await group.batch():
                reply.take(index, event)
            if isinstance(reply.error, ServingError):
                raise reply.error
        return await in_reply_thread(reply.whole) if reply.is_heavy else reply.whole()

    try:
        return await unless_disconnected(receive, collect())
    finally:
        await group.close()


async def unless_disconnected(
    receive: Receive,
    work: Coroutine[Any, Any, Result],
) -> Result:
    """Run `work`, and cancel it when the client leaves.

    Raises:
        Cancelled: The client left.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    watcher = loop.create_task(watch())
    # The watcher ends only when the client has left, or is cancelled below.
    watcher.add_done_callback(lambda done: None if done.cancelled() else task.cancel())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            raise Cancelled("the client left") from None
        raise
    finally:
        task.cancel()
        watcher.cancel()
        # Nothing of a request may go on behind its reply.
        await asyncio.gather(task, watcher, return_exceptions=True)
