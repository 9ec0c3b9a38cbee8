"""Streams over gRPC that survive their router.

Owns the position in each stream, the choice of the next address and the difference between an answer
and a broken wire: what the server said with `google.rpc` details is an answer and is raised, anything
else is a wire, and the stream goes on elsewhere from where it was. Does not know what is generated.
Called by users of the package.

    async with Client(["10.0.0.1:9000", "10.0.0.2:9000"]) as client:
        async for message in client.generate(pb.GenerateRequest(text="Once upon a time")):
            print(message.delta.text, end="")
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import grpc
import grpc.aio

from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

DETAILS_KEY = "grpc-status-details-bin"
PING_MS, PING_TIMEOUT_MS = 1000, 1500
"""A router that answers no ping for 2.5 s is taken for dead."""
OPTIONS = [
    ("grpc.keepalive_time_ms", PING_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", -1),
]
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 1.0
_BREAKS = {
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED,
}  # fmt: skip


class Client:
    """Requests to one cluster, through any of its routers."""

    def __init__(
        self,
        addresses: Sequence[str],
        api_key: str = "",
        root_certificates: bytes | None = None,
        max_reconnects: int = 10,
    ) -> None:
        """Nothing is dialled yet.

        Args:
            addresses: gRPC doors, `host:port`; the first is tried first.
            api_key: Sent as a bearer token, if there is one.
            root_certificates: PEM; with them the doors are reached over TLS.
            max_reconnects: How often one stream may break before its last error is raised.
        """
        self._addresses = list(addresses)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._roots, self._max_reconnects = root_certificates, max_reconnects
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._first = 0
        self.num_reconnects = 0

    async def __aenter__(self) -> Self:
        """Enter."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the channels."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    def generate(self, request: pb.GenerateRequest, timeout_s: float = 300.0) -> AsyncIterator[Any]:
        """Run one request; the last message has the summary.

        Raises:
            grpc.aio.AioRpcError: The server's error, or the last break of a stream that broke too often.
        """
        return self._stream("GenerateStream", request, timeout_s)

    def chat(self, request: pb.ChatRequest, timeout_s: float = 300.0) -> AsyncIterator[Any]:
        """Run one turn of a conversation; the last message has the summary.

        Raises:
            grpc.aio.AioRpcError: As `generate`.
        """
        return self._stream("Chat", request, timeout_s)

    async def _stream(self, method: str, original: Any, timeout_s: float) -> AsyncIterator[Any]:  # noqa: ANN401
        request = type(original)()
        request.CopyFrom(original)
        # The id is what makes the seed, so a request must keep it wherever it goes on.
        request.request_id = request.request_id or f"req-{secrets.token_hex(12)}"
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        have = [0] * max(1, request.sampling.n)
        for attempt in range(self._max_reconnects + 1):
            address = self._addresses[self._first % len(self._addresses)]
            call = getattr(self._stub(address), method)(
                request, timeout=max(0.0, ends_at - loop.time()), metadata=self._metadata
            )
            try:
                async for message in call:
                    _note(have, message)
                    yield message
                    if message.WhichOneof("event") == "summary":
                        return
                error: grpc.aio.AioRpcError | None = None
            except grpc.aio.AioRpcError as failure:
                error = failure
                if attempt == self._max_reconnects or not is_break(failure):
                    raise
            finally:
                call.cancel()
            self.num_reconnects += 1
            await self._leave(address, error)
            await asyncio.sleep(min(FIRST_PAUSE_S * 2**attempt, MAX_PAUSE_S))
            del request.resume_from.positions[:]
            request.resume_from.positions.extend(have)
        raise ConnectionError(f"the stream ended {self._max_reconnects + 1} times without its last message")

    def _stub(self, address: str) -> Any:  # noqa: ANN401
        if address not in self._channels:
            if self._roots is None:
                channel = grpc.aio.insecure_channel(address, options=OPTIONS)
            else:
                channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(self._roots), options=OPTIONS)
            self._channels[address] = channel
        return generation_pb2_grpc.GenerationStub(self._channels[address])

    async def _leave(self, address: str, error: grpc.aio.AioRpcError | None) -> None:
        """Go to the next address; a channel whose wire is gone is not used again."""
        if address == self._addresses[self._first % len(self._addresses)]:
            self._first += 1
        if error is not None and len(self._addresses) == 1:
            channel = self._channels.pop(address, None)
            if channel is not None:
                await channel.close()


def is_break(error: grpc.aio.AioRpcError) -> bool:
    """Did the wire break, or the router leave, rather than the server answer with an error?"""
    details = [value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY]
    if details:
        return any(b"draining" in value for value in details)
    return error.code() in _BREAKS


def _note(have: list[int], message: Any) -> None:  # noqa: ANN401
    """Count what was received, as `ResumeFrom` wants it."""
    kind = message.WhichOneof("event")
    if kind == "delta":
        delta = message.delta
        end = delta.position + len(delta.tokens)
        have[delta.choice] = end if delta.tokens else end + 1
    elif kind == "finished":
        have[message.finished.choice] = message.finished.position + 2
