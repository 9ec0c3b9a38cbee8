"""The guard of the gRPC server: only health checks pass without a key; refusals are recorded.

Owns the refusal before a request is read, the bounds on what is read, and the record of every call.
A new method is closed until it is opened here. Does not know services.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health

from core.errors import Cancelled, InternalError, ServingError, Unauthenticated
from router.access.bad_keys import BadKeys
from router.access.credentials import Keyring
from router.access.identities import Identity, Right
from router.calls import Call, begin, outcome_of, peer_address
from router.grpc.incoming import IncomingMessages
from router.grpc.limits import bounded
from router.grpc.requests import abort
from router.observe.recorder import Recorder
from router.refusals import UNREAD, UNSUPPORTED_ENDPOINT

OWN_METHODS = "/baton.v1."
OPEN_METHODS = f"/{health.SERVICE_NAME}/"
RIGHTS = {"/baton.v1.Generation/ListModels": Right.ANY_KEY}
"""The right that a method needs, if it is not `Right.GENERATE`."""
REQUEST_METHODS = frozenset(
    f"/baton.v1.Generation/{name}" for name in ("Generate", "GenerateStream", "Chat")
)
"""Those that need a permit."""
_BEHAVIOURS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Guarded(Protocol):
    """What the guard needs of the service behind it."""

    keyring: Keyring
    bad_keys: BadKeys
    recorder: Recorder

    def arrive(self, identity: Identity) -> None:
        """Count a caller's request as arriving, or refuse it before it is read."""
        ...


class GrpcGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Runs before every method."""

    def __init__(self, service: Guarded, incoming: IncomingMessages) -> None:
        """Guard `service`; `incoming` reads the messages."""
        self._service = service
        self._incoming = incoming

    async def intercept_service(self, continuation: Any, details: Any) -> Any:  # noqa: ANN401
        """Pass a call on, or refuse it."""
        handler = await continuation(details)
        if details.method.startswith(OPEN_METHODS):
            return handler and self._incoming.handler(handler)
        call = Call("grpc", route=details.method if handler is not None else "")
        begin(call)
        # This task lives as long as the call, however it ends: the library ends a call with too
        # long a message without running any of our code.
        task = asyncio.current_task()
        if task is not None:
            task.add_done_callback(lambda _: self._end(call))
        values = [
            value for name, value in details.invocation_metadata or () if name == "authorization"
        ]
        try:
            call.identity = self._service.keyring.identify(
                # Of two keys a proxy may have checked the other one.
                str(values[0]) if len(values) == 1 else ""
            )
            call.identity.check(RIGHTS.get(details.method, Right.GENERATE))
            if details.method in REQUEST_METHODS:
                self._service.arrive(call.identity)
        except ServingError as error:
            return self._refusal(call, error)
        if handler is None:
            call.refuse(UNSUPPORTED_ENDPOINT.code)
            return None
        if not details.method.startswith(OWN_METHODS):
            return _watched(handler, call)
        return self._incoming.handler(_watched(bounded(handler), call))

    def _end(self, call: Call) -> None:
        call.arrived()
        if not call.is_read:
            call.refuse(UNREAD.code)
        self._service.recorder.call_ended(call)

    def _refusal(self, call: Call, error: ServingError) -> Any:  # noqa: ANN401
        """Make a handler that refuses at once: any other shape would read a message first."""
        call.refuse(error.code, outcome_of(error))

        async def refuse(_: Any, context: Any) -> None:  # noqa: ANN401
            call.address = peer_address(context.peer())
            if isinstance(error, Unauthenticated):
                await self._service.bad_keys.hold(call.address)
            await abort(context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)


def _watched(handler: Any, call: Call) -> Any:  # noqa: ANN401
    """Wrap a handler: the call notes how it ends."""
    name = next(n for n in _BEHAVIOURS if getattr(handler, n) is not None)
    behaviour: Callable[[Any, Any], Any] = getattr(handler, name)
    if not inspect.iscoroutinefunction(behaviour):  # reflection, the library's own
        call.is_read = True
        return handler

    async def serve(request: Any, context: Any) -> Any:  # noqa: ANN401
        call.address = peer_address(context.peer())
        call.is_read = True
        with _noted(call):
            return await behaviour(request, context)

    return handler._replace(**{name: serve})


@contextlib.contextmanager
def _noted(call: Call) -> Iterator[None]:
    try:
        yield
    except asyncio.CancelledError:
        call.refuse(Cancelled.code, "cancelled")
        raise
    except Exception:  # an abort too, but its reason is noted already
        call.refuse(InternalError.code, "failed")
        raise
