"""Requests on their way to the gRPC door: bounded in time and, where they are slow, in number.

Owns the reading of a call's one message. The library would read it before any of our code runs, and
hold what has come of it for as long as its client likes; so a method with one request is served as
a stream, whose message is asked for with a deadline. Does not know keys.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from core.errors import InvalidRequest, Overloaded, RequestTimeout, ServingError
from router.grpc.requests import abort

SLOW_S = 0.25
"""A message that takes longer is slow."""
MAX_SLOW = 32
"""With `router.max_body_bytes` each, what strangers can make the library hold."""


class IncomingMessages:
    """Every message that is being received."""

    def __init__(self, limit_s: float) -> None:
        """Start with none; each has `limit_s` seconds."""
        self._limit_s = limit_s
        self._slow: OrderedDict[asyncio.Timeout, None] = OrderedDict()

    async def read(self, context: Any) -> bytes:  # noqa: ANN401
        """Receive a call's message.

        Raises:
            RequestTimeout: It did not come in time.
            Overloaded: It was slow, and too many others were slow after it.
            grpc.aio.AbortError: The call ended without one.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._limit_s
        try:
            async with asyncio.timeout_at(ends_at) as deadline:
                timer = loop.call_later(SLOW_S, self._is_slow, deadline)
                try:
                    message = await context.read()
                finally:
                    timer.cancel()
                    self._slow.pop(deadline, None)
        except TimeoutError as error:
            if loop.time() < ends_at:
                raise Overloaded("too many messages are being received; try again later") from error
            raise RequestTimeout(
                f"the message did not come within {self._limit_s:g} s; send it faster"
            ) from error
        if message is grpc.aio.EOF:
            # Its client has left, or the library found it too long: then this reaches nobody, and
            # the call is recorded as unread.
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
        return bytes(message)

    def _is_slow(self, deadline: asyncio.Timeout) -> None:
        self._slow[deadline] = None
        if len(self._slow) > MAX_SLOW:
            evicted, _ = self._slow.popitem(last=False)
            if not evicted.expired():
                evicted.reschedule(asyncio.get_running_loop().time())

    def handler(self, handler: Any) -> Any:  # noqa: ANN401
        """Serve a method of one request, whose behaviour is a coroutine, as a stream."""
        behaviour = handler.unary_stream or handler.unary_unary

        async def serve(_: Any, context: Any) -> None:  # noqa: ANN401
            try:
                request = handler.request_deserializer(await self.read(context))
            except ServingError as error:
                await abort(context, error)
            except DecodeError:
                await abort(context, InvalidRequest("message", "is not of this method's type"))
            reply = await behaviour(request, context)
            if not handler.response_streaming:
                await context.write(reply)

        return grpc.stream_stream_rpc_method_handler(
            serve, response_serializer=handler.response_serializer
        )
