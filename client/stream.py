"""Streams over gRPC that survive their router.

Owns the position in each stream, the choice of the next address and the difference between an
error and a broken connection: a status with `google.rpc` details is the server's error and is
raised; after anything else the stream is resumed at another router. Does not know what is
generated.

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
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.failures import details_of, error_of
from core.errors import Unavailable
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

CONNECT_MS = 1500
"""Longest wait for a connection, handshake included."""
HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 1.5
"""A router that does not answer a health check counts as dead: at most 2.5 s after its last sign
of life."""
OPTIONS = [
    # A proxy of the environment is one for the web.
    ("grpc.enable_http_proxy", 0),
    # Or channels of one process share a connection, a dead one too.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.min_reconnect_backoff_ms", CONNECT_MS),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Log probabilities of a long prompt pass gRPC's 4 MiB.
    ("grpc.max_receive_message_length", -1),
]
FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 1.0
_BREAKS = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
}


class Client:
    """Requests to one cluster, through any of its routers."""

    def __init__(
        self,
        addresses: Sequence[str],
        api_key: str = "",
        root_certificates: bytes | None = None,
        private_key: bytes | None = None,
        certificate_chain: bytes | None = None,
        max_reconnects: int = 10,
    ) -> None:
        """Prepare; the first request connects.

        Args:
            addresses: gRPC servers, `host:port`; the first is tried first.
            api_key: Sent as a bearer token, if there is one.
            root_certificates: PEM; turns TLS on. Empty: the roots that gRPC brings.
            private_key: PEM; with `certificate_chain`, for servers that require a certificate.
            certificate_chain: PEM; shown to such servers.
            max_reconnects: How often one stream may break before its last error is raised.
        """
        self._addresses = list(addresses)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._is_private = root_certificates is not None
        self._certificates = (root_certificates or None, private_key, certificate_chain)
        self._max_reconnects = max_reconnects
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._heartbeats: dict[str, _Heartbeat] = {}
        self._first = 0
        self.num_reconnects = 0

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the channels."""
        for address in list(self._channels):
            await self._close(address)

    def generate(
        self, request: pb.GenerateRequest, timeout_s: float = 300.0
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Run one request; the last message has the summary.

        Raises:
            ServingError: The server's, or `Unavailable` when the stream broke too often.
        """
        return self._stream("GenerateStream", request, timeout_s)

    def chat(
        self, request: pb.ChatRequest, timeout_s: float = 300.0
    ) -> AsyncIterator[pb.ChatResponse]:
        """Run one turn of a conversation; the last message has the summary.

        Raises:
            ServingError: As `generate`.
        """
        return self._stream("Chat", request, timeout_s)

    async def _stream(
        self,
        method: str,
        original: Any,  # noqa: ANN401
        timeout_s: float,
    ) -> AsyncIterator[Any]:
        request = type(original)()
        request.CopyFrom(original)
        # The seed follows from the id: the resumed request must keep it.
        request.request_id = request.request_id or f"req-{secrets.token_hex(12)}"
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        received = _Received(max(1, request.sampling.n))
        for attempt in range(self._max_reconnects + 1):
            address = self._addresses[self._first % len(self._addresses)]
            call = getattr(self._stub(address), method)(
                request, timeout=max(0.0, ends_at - loop.time()), metadata=self._metadata
            )
            heartbeat = self._heartbeat(address)
            heartbeat.calls[call] = None
            try:
                async for message in call:
                    received.note(message)
                    yield message
                    # The last message: what breaks between it and the status changes nothing.
                    if message.WhichOneof("event") == "summary":
                        return
            except grpc.aio.AioRpcError as failure:
                if attempt == self._max_reconnects or not is_break(failure):
                    raise error_of(failure) from failure
            # By the heartbeat, or else by the caller, who is to see it.
            except asyncio.CancelledError:
                if call not in heartbeat.given_up:
                    raise
            finally:
                heartbeat.forget(call)
                call.cancel()
            self.num_reconnects += 1
            self._leave(address)
            # Longer each time: all clients of a dead router come to the next one at once.
            await asyncio.sleep(min(FIRST_PAUSE_S * 2**attempt, MAX_PAUSE_S))
            request.resume_from.CopyFrom(received.resume_from())
        raise Unavailable(
            f"the stream ended {self._max_reconnects + 1} times without its last message"
        )

    def _stub(self, address: str) -> Any:  # noqa: ANN401
        if address not in self._channels:
            if self._is_private:
                credentials = grpc.ssl_channel_credentials(*self._certificates)
                channel = grpc.aio.secure_channel(address, credentials, options=OPTIONS)
            else:
                channel = grpc.aio.insecure_channel(address, options=OPTIONS)
            self._channels[address] = channel
        return generation_pb2_grpc.GenerationStub(self._channels[address])

    def _leave(self, address: str) -> None:
        """Move to the next address, once for all streams that broke at this one."""
        if address == self._addresses[self._first % len(self._addresses)]:
            self._first += 1

    def _heartbeat(self, address: str) -> _Heartbeat:
        if address not in self._heartbeats:
            self._heartbeats[address] = _Heartbeat(self._channels[address])
        return self._heartbeats[address]

    async def _close(self, address: str) -> None:
        heartbeat = self._heartbeats.pop(address, None)
        channel = self._channels.pop(address, None)
        if heartbeat is not None:
            await heartbeat.stop()
        if channel is not None:
            await channel.close()


def is_break(error: grpc.aio.AioRpcError) -> bool:
    """Did the wire break, or the router leave, rather than the server answer with an error?"""
    details = details_of(error)
    if details:
        return b"draining" in details
    return error.code() in _BREAKS


class _Received:
    """What one stream has received, in the form of `ResumeFrom`."""

    def __init__(self, num_choices: int) -> None:
        self._positions = [0] * num_choices
        self._tokens: list[list[int]] = [[] for _ in range(num_choices)]

    def note(self, message: Any) -> None:  # noqa: ANN401
        kind = message.WhichOneof("event")
        if kind == "delta":
            delta = message.delta
            end = delta.position + len(delta.tokens)
            self._positions[delta.choice] = end if delta.tokens else end + 1
            self._tokens[delta.choice].extend(t.token_id for t in delta.tokens)
        elif kind == "finished":
            # Past the tail and the end: nothing of this choice is to be sent again.
            self._positions[message.finished.choice] = message.finished.position + 2

    def resume_from(self) -> pb.ResumeFrom:
        tokens = [pb.TokenIds(ids=ids) for ids in self._tokens]
        return pb.ResumeFrom(positions=self._positions, tokens=tokens)


class _Heartbeat:
    """Checks a router every second while it has calls, and cancels them if it does not answer.

    HTTP/2 pings would not do: threads of the gRPC library answer them while the process behind is
    stuck.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.calls: dict[Any, None] = {}
        self.given_up: dict[Any, None] = {}
        self._health = health_pb2_grpc.HealthStub(channel)
        self._task = asyncio.get_running_loop().create_task(self._run())

    def forget(self, call: Any) -> None:  # noqa: ANN401
        self.calls.pop(call, None)
        self.given_up.pop(call, None)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            asked = list(self.calls)
            if not asked:
                continue
            try:
                await self._health.Check(
                    health_pb2.HealthCheckRequest(), timeout=HEARTBEAT_TIMEOUT_S
                )
            except grpc.aio.AioRpcError:
                for call in asked:
                    self.given_up[call] = None
                    call.cancel()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
