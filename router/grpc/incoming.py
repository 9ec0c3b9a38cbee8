"""Messages that the gRPC server receives: bounded in time and, if they are slow, in number.

Owns the reading of a call's one message. The library would read it before any of our code runs, and
keep an incomplete one for as long as its client likes; so a method with one request is served as a
stream, whose message is read with a deadline. Does not know keys.
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
"""A message that takes longer counts as slow."""
MAX_SLOW = 32
"""Times `router.max_body_bytes`: the memory that callers without a key can occupy."""


class IncomingMessages:
    """The messages that are being received."""

    def __init__(self, limit_s: float) -> None:
        """Start with none; each may take `limit_s` seconds."""
        self._limit_s = limit_s
        self._slow: OrderedDict[asyncio.Timeout, None] = OrderedDict()

    async def read(self, context: Any) -> bytes:  # noqa: ANN401
        """Receive a call's message.

        Raises:
            RequestTimeout: It did not arrive in time.
            Overloaded: It was slow, and too many others became slow after it.
            grpc.aio.AbortError: The call ended without a message.
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
                f"the message did not arrive within {self._limit_s:g} s; send it faster"
            ) from error
        if message is grpc.aio.EOF:
            # Its client has left, or the library found it too long: either way nobody gets this,
            # and the call is recorded as unread.
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
        return bytes(message)

    def _is_slow(self, deadline: asyncio.Timeout) -> None:
        self._slow[deadline] = None
        if len(self._slow) > MAX_SLOW:
            evicted, _ = self._slow.popitem(last=False)
            if not evicted.expired():
                evicted.reschedule(asyncio.get_running_loop().time())

    def handler(self, handler: Any) -> Any:  # noqa: ANN401
        """Serve a method with one request, whose behaviour is a coroutine, as a stream."""
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
