"""The gRPC transport: bidirectional methods of raw bytes on their own server and port.

Owns channels and servers, and the refusal of peers outside the cluster: with TLS a peer's
certificate names its role; without TLS both ends prove that they know the cluster's key. Messages
are bytes to gRPC, never protobuf (a quarter of the cost at 1 MiB); for typed messages, pass a
codec. Does not know what they mean.

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
from core.renewed import Renewed
from transport.stream_proof import StreamProof, new_nonce

MAX_MESSAGE_BYTES = (16 << 20) + (1 << 16)
OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
SERVER_OPTIONS = [
    *OPTIONS,
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.max_allowed_incoming_connections", 512),
]
"""Peers outside the cluster are refused per stream; these bound what their connections cost."""
FETCH_CHANNELS = 4
NONCE_KEY = "baton-nonce"
DIALLER_KEY = "baton-dialler"
LISTENER_KEY = "baton-listener"
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


class _ClientStream:
    """The dialling end; with a `proof`, the listener's MAC is checked at its first message."""

    transport = "grpc"

    def __init__(self, call: Any, proof: StreamProof | None) -> None:  # noqa: ANN401
        self._call = call
        self._pending_proof = proof

    async def send(self, message: Any) -> None:  # noqa: ANN401
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise StreamClosed(str(error)) from error
        except asyncio.CancelledError:
            if not _is_cancelled():
                raise StreamClosed("the stream was reset") from None
            raise

    async def recv(self) -> Any:  # noqa: ANN401
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise StreamClosed(error.details()) from error
        except asyncio.CancelledError:
            # A call that the server cancelled ends like this too: then only the stream is over.
            if not _is_cancelled():
                raise StreamClosed("the stream was reset") from None
            raise
        if message is grpc.aio.EOF:
            raise StreamClosed("the peer closed the stream")
        if self._pending_proof is not None:
            await self._check_listener(self._pending_proof)
        return message

    async def _check_listener(self, proof: StreamProof) -> None:
        mac = dict(await self._call.initial_metadata()).get(LISTENER_KEY, "")
        if not proof.is_listener(str(mac)):
            self.reset()
            raise StreamClosed("the listener at this address does not know the cluster's key")
        self._pending_proof = None

    async def close(self) -> None:
        # It may be closed already.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.done_writing()

    def reset(self) -> None:
        self._call.cancel()


class _ServerStream:
    """The accepting end; `metadata` goes to the dialler before the first message."""

    transport = "grpc"

    def __init__(self, context: Any, metadata: dict[str, str]) -> None:  # noqa: ANN401
        self._context = context
        self._unsent_metadata = metadata
        self._is_closed = False
        self.is_reset = False
        self._task = asyncio.current_task()

    async def send(self, message: Any) -> None:  # noqa: ANN401
        if self._is_closed:
            raise StreamClosed("the stream is closed")
        try:
            if self._unsent_metadata:
                metadata = tuple(self._unsent_metadata.items())
                self._unsent_metadata = {}
                await self._context.send_initial_metadata(metadata)
            await self._context.write(message)
        except (
            grpc.aio.AioRpcError,
            grpc.RpcError,
            asyncio.InvalidStateError,
            grpc.aio.UsageError,
        ) as error:
            raise StreamClosed(str(error)) from error
        except Exception as error:
            # grpc.aio raises its private InternalError and ExecuteBatchError here when the peer is
            # gone.
            if type(error).__module__.startswith("grpc."):
                raise StreamClosed(str(error)) from error
            raise

    async def recv(self) -> Any:  # noqa: ANN401
        if self._is_closed:
            raise StreamClosed("the stream is closed")
        try:
            message = await self._context.read()
        except Exception as error:
            if type(error).__module__.startswith("grpc."):
                raise StreamClosed(str(error)) from error
            raise
        if message is grpc.aio.EOF:
            raise StreamClosed("the peer closed the stream")
        return message

    async def close(self) -> None:
        self._is_closed = True

    def reset(self) -> None:
        self._is_closed = True
        self.is_reset = True
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()


async def _await_first_message(context: Any) -> None:  # noqa: ANN401
    """Wait for the caller's first message before refusing it.

    If the two cross, the caller sees a broken stream and not the reason. Only for callers with a
    certificate of the cluster: nothing is read from others.
    """
    with contextlib.suppress(StreamClosed, TimeoutError):
        async with asyncio.timeout(FIRST_MESSAGE_WAIT_S):
            await _ServerStream(context, {}).recv()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A process's certificate and key, and the authority it trusts (PEM)."""

    certificate: bytes
    key: bytes
    authority: bytes


@dataclass(frozen=True, slots=True)
class Tls:
    """A process's certificate, reloaded with its files, and the names its peers must have."""

    files: Renewed[TlsFiles]
    peer_name: str
    """Of peers that may dial in."""
    server_name: str
    """Of a dialled server."""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Make credentials for a new channel."""
        self.files.refresh()
        files = self.files.content
        return grpc.ssl_channel_credentials(files.authority, files.key, files.certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Make credentials for a server, which asks for a newer certificate at every handshake."""
        given = self.files.version

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            version = self.files.refresh()
            if version == given:
                return None
            given = version
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), renewed, require_client_authentication=True
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        files = self.files.content
        return grpc.ssl_server_certificate_configuration(
            [(files.key, files.certificate)], files.authority
        )


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

    async def dial(self, address: str) -> _ClientStream:
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
            self._channels.pop(key, None)
            await channel.close()
            raise StreamClosed(error.details()) from error
        return _ClientStream(call, proof)

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
            stream = _ServerStream(context, await self._admit(context, nonce))
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
        server = self._server
        self._server = None
        if server is not None:
            await server.stop(grace=0)
        channels = self._channels
        self._channels = {}
        for channel in channels.values():
            await channel.close()


def fetch_network(host: str = "127.0.0.1", tls: Tls | None = None, key: bytes = b"") -> GrpcNetwork:
    """Make the network of Fetch streams; one thread on either side serves one connection."""
    return GrpcNetwork(
        "/baton.internal.v1.KVTransfer/Fetch", host, tls=tls, key=key, num_channels=FETCH_CHANNELS
    )
