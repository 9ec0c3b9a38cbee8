"""The two ends of a gRPC stream as `MessageStream`s.

Owns how gRPC's many ways to end a call become `StreamClosed`, and the check of the listener's
proof. Does not know channels, servers, nor what messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import grpc.aio

from core.ports import StreamClosed
from transport.stream_proof import StreamProof

LISTENER_KEY = "baton-listener"
"""Metadata in which the listener sends its MAC."""


class ClientStream:
    """The dialling end; with a `proof`, the listener's MAC is checked at its first message."""

    transport = "grpc"

    def __init__(self, call: Any, proof: StreamProof | None) -> None:  # noqa: ANN401
        """Wrap a call of `grpc.aio`; no proof: its connection is authenticated by TLS."""
        self._call = call
        self._pending_proof = proof

    async def send(self, message: Any) -> None:  # noqa: ANN401
        """Send a message; waits while the peer reads more slowly than this end writes.

        Raises:
            StreamClosed: The stream is over.
        """
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise StreamClosed(str(error)) from error
        except asyncio.CancelledError:
            # Not the task was cancelled but its call, by `reset`: then only the stream is over.
            if not _is_cancelled():
                raise StreamClosed("the stream was reset") from None
            raise

    async def recv(self) -> Any:  # noqa: ANN401
        """Wait for the next message.

        Raises:
            StreamClosed: The stream is over, or the listener is not of this cluster.
        """
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise StreamClosed(error.details()) from error
        except asyncio.CancelledError:
            # As in `send`; a channel that is closed cancels its calls, too.
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
            self.reset()  # before anybody acts on the message that has come
            raise StreamClosed("the listener at this address does not know the cluster's key")
        self._pending_proof = None

    async def close(self) -> None:
        """Send nothing more; what the peer still sends can be received."""
        # It may be closed already.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.done_writing()

    def reset(self) -> None:
        """End the stream at once, in both directions."""
        self._call.cancel()


class ServerStream:
    """The accepting end; `metadata` goes to the dialler before the first message."""

    transport = "grpc"

    def __init__(self, context: Any, metadata: dict[str, str]) -> None:  # noqa: ANN401
        """Wrap a call's context, in the task that serves the call: `reset` cancels that task."""
        self._context = context
        self._unsent_metadata = metadata
        self._is_closed = False
        self.is_reset = False
        self._task = asyncio.current_task()

    async def send(self, message: Any) -> None:  # noqa: ANN401
        """Send a message; waits while the peer reads more slowly than this end writes.

        Raises:
            StreamClosed: The stream is over.
        """
        if self._is_closed:
            raise StreamClosed("the stream is closed")
        try:
            # Once, ahead of the first message, at which the dialler looks for it.
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
            if _is_of_grpc(error):
                raise StreamClosed(str(error)) from error
            raise

    async def recv(self) -> Any:  # noqa: ANN401
        """Wait for the next message.

        Raises:
            StreamClosed: The stream is over.
        """
        if self._is_closed:
            raise StreamClosed("the stream is closed")
        try:
            message = await self._context.read()
        except Exception as error:
            if _is_of_grpc(error):
                raise StreamClosed(str(error)) from error
            raise
        if message is grpc.aio.EOF:
            raise StreamClosed("the peer closed the stream")
        return message

    async def close(self) -> None:
        """Send and receive nothing more; the call ends when its handler returns."""
        self._is_closed = True

    def reset(self) -> None:
        """End the call at once, by ending the task that serves it."""
        self._is_closed = True
        self.is_reset = True
        # The handler that resets its own stream returns by itself.
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()


def _is_cancelled() -> bool:
    """Return True if somebody cancelled this task, and not merely gRPC the call it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _is_of_grpc(error: Exception) -> bool:
    """Return True for gRPC's private errors.

    When the peer is gone, grpc.aio raises its InternalError and ExecuteBatchError, which cannot be
    imported.
    """
    return type(error).__module__.startswith("grpc.")
