"""The gRPC transport: bidirectional methods of raw bytes on their own server and port.

Owns channels and servers, and the refusal of peers outside the cluster: with TLS a peer's
certificate names its role; without TLS both ends prove that they know the cluster's key. Messages
are bytes to gRPC, never protobuf (a quarter of the cost at 1 MiB); for typed messages, pass a
codec. Does not know what they mean, nor how a stream ends.

The address of a listener without TLS is `nonce@host:port`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from core import events
from core.addresses import join_address
from core.ports import StreamClosed, StreamHandler
from transport.grpc_credentials import Tls
from transport.grpc_streams import LISTENER_KEY, ClientStream, ServerStream
from transport.stream_proof import StreamProof, new_nonce

MAX_MESSAGE_BYTES = (16 << 20) + (1 << 16)
"""The longest frame of KV that the config allows, and room for its header."""
OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Channels to one address would otherwise share one connection, which gRPC serves by one thread
    # at a time.
    ("grpc.use_local_subchannel_pool", 1),
    # Another process must not be able to listen on the same port.
    ("grpc.so_reuseport", 0),
    # An `http_proxy` of the environment is not for the cluster's own traffic.
    ("grpc.enable_http_proxy", 0),
]
SERVER_OPTIONS = [
    *OPTIONS,
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.max_allowed_incoming_connections", 512),
]
"""Peers outside the cluster are refused per stream; these bound what their connections cost."""
NONCE_KEY = "baton-nonce"
DIALLER_KEY = "baton-dialler"
REFUSAL_LOG_PERIOD_S = 1.0
"""All refusals are counted, and at most one is logged in this time."""
FIRST_MESSAGE_WAIT_S = 1.0
"""How long a refusal waits for the caller's first message."""


def _identity(message: Any) -> Any:  # noqa: ANN401
    return message


@dataclass(frozen=True, slots=True)
class MessageCodec:
    """Messages to bytes and back, up to the server and down to the client."""

    encode_up: Callable[[Any], bytes] = _identity
    decode_up: Callable[[bytes], Any] = _identity
    """May raise `StreamClosed` for bytes that are no message: the stream is over."""
    encode_down: Callable[[Any], bytes] = _identity
    decode_down: Callable[[bytes], Any] = _identity


RAW_BYTES = MessageCodec()


async def _await_first_message(context: Any) -> None:  # noqa: ANN401
    """Wait for the caller's first message before refusing it.

    If the two cross, the caller sees a broken stream and not the reason. Only for callers with a
    certificate of the cluster: nothing is read from others.
    """
    with contextlib.suppress(StreamClosed, TimeoutError):
        async with asyncio.timeout(FIRST_MESSAGE_WAIT_S):
            await ServerStream(context, {}).recv()


def _names_of(context: Any) -> set[str]:  # noqa: ANN401
    """Return the names in the dialler's certificate."""
    return {
        name.decode() for name in context.auth_context().get("x509_subject_alternative_name", ())
    }


class GrpcNetwork:
    """The `Network` port over grpc.aio. Make and use it on one loop."""

    def __init__(
        self,
        method: str,
        host: str = "127.0.0.1",
        codec: MessageCodec = RAW_BYTES,
        tls: Tls | None = None,
        key: bytes = b"",
        num_channels: int = 1,
    ) -> None:
        """Name the method ("/package.Service/Method") and the address to bind.

        Args:
            method: Full method name.
            host: Address to listen on.
            codec: Makes bytes of messages.
            tls: Mutual TLS with roles; None: plain text, for loopback only.
            key: Without TLS both ends prove that they know it; see `StreamProof`.
            num_channels: Connections to one address, which streams take in turn.
        """
        self._method = method
        self._host = host
        self._tls = tls
        self._codec = codec
        self._key = key
        self._num_channels = num_channels
        self._num_dialled = 0
        self._channels: dict[tuple[str, int], grpc.aio.Channel] = {}
        self._server: Any = None
        self.num_refused = 0
        """Streams of peers outside the cluster."""
        self._logged_at = -REFUSAL_LOG_PERIOD_S

    async def dial(self, address: str) -> ClientStream:
        """Open a stream. Channels are kept per address; a dead one is dropped."""
        listener, _, endpoint = address.rpartition("@")
        key = endpoint, self._num_dialled % self._num_channels
        self._num_dialled += 1
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = self._new_channel(endpoint)
        proof = None
        metadata = {}
        if self._tls is None:
            nonce = new_nonce()
            proof = StreamProof(self._key, self._method, listener, nonce)
            metadata = {NONCE_KEY: nonce, DIALLER_KEY: proof.dialler_mac}
        call = channel.stream_stream(
            self._method,
            request_serializer=self._codec.encode_up,
            response_deserializer=self._codec.decode_down,
        )(metadata=tuple(metadata.items()), wait_for_ready=False)
        try:
            await call.wait_for_connection()
        except grpc.aio.AioRpcError as error:
            # A fresh channel connects at once, a kept one would first sit out gRPC's pause, which
            # grows to two minutes; and with TLS a fresh one takes the newest certificate.
            self._channels.pop(key, None)
            await channel.close()
            raise StreamClosed(error.details()) from error
        return ClientStream(call, proof)

    def _new_channel(self, address: str) -> grpc.aio.Channel:
        tls = self._tls
        if tls is None:
            return grpc.aio.insecure_channel(address, options=OPTIONS)
        options = [*OPTIONS, ("grpc.ssl_target_name_override", tls.server_name)]
        return grpc.aio.secure_channel(address, tls.channel_credentials(), options=options)

    async def listen(self, on_stream: StreamHandler) -> str:
        """Accept streams on a free port."""
        _, service, method = self._method.split("/")
        nonce = new_nonce()

        async def serve(_: Any, context: Any) -> None:  # noqa: ANN401
            stream = ServerStream(context, await self._admit(context, nonce))
            try:
                await on_stream(stream)
            except asyncio.CancelledError:
                if not stream.is_reset:
                    raise
                # A cancelled handler sends its peer nothing before it is garbage collected.
                await context.abort(grpc.StatusCode.ABORTED, "the stream was reset")

        handler = grpc.stream_stream_rpc_method_handler(
            serve,
            request_deserializer=self._codec.decode_up,
            response_serializer=self._codec.encode_down,
        )
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        address = join_address(self._host, 0)
        if self._tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, self._tls.server_credentials())
        await server.start()
        self._server = server
        endpoint = join_address(self._host, port)
        return f"{nonce}@{endpoint}" if self._tls is None else endpoint

    async def _admit(self, context: Any, nonce: str) -> dict[str, str]:  # noqa: ANN401
        """Refuse a peer outside the cluster; return the metadata for one inside."""
        # A certificate proves who calls; without one the cluster's key has to.
        if self._tls is not None:
            if self._tls.peer_name not in _names_of(context):
                await _await_first_message(context)
                await self._refuse(context, "this role may not open this stream")
            return {}
        metadata = dict(context.invocation_metadata() or ())
        proof = StreamProof(self._key, self._method, nonce, str(metadata.get(NONCE_KEY, "")))
        if not proof.is_dialler(str(metadata.get(DIALLER_KEY, ""))):
            await self._refuse(context, "the caller does not know the cluster's key")
        return {LISTENER_KEY: proof.listener_mac}

    async def _refuse(self, context: Any, why: str) -> None:  # noqa: ANN401
        self.num_refused += 1
        now_s = asyncio.get_running_loop().time()
        if now_s - self._logged_at >= REFUSAL_LOG_PERIOD_S:
            self._logged_at = now_s
            events.STREAM_REFUSED.log(
                stream=self._method, peer=context.peer(), refused=self.num_refused, reason=why
            )
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)

    async def close(self) -> None:
        """Close the server and every channel."""
        # Taken away first: whoever dials or closes during the waits below finds nothing to reuse.
        server = self._server
        self._server = None
        if server is not None:
            await server.stop(grace=0)
        channels = self._channels
        self._channels = {}
        for channel in channels.values():
            await channel.close()
