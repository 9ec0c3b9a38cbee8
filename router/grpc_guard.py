"""The gate of the gRPC door: nothing passes without a key but health checks.

Owns the refusal, before a request is read, the bounds on what is read, and the door's certificate. A new method is closed until
someone opens it here. Does not know services. Called by `router.grpc_door`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health

from core.config import SecurityConfig
from core.errors import ServingError
from router.credentials import Keyring
from router.grpc_limits import bounded
from router.grpc_requests import abort

OWN_METHODS = "/baton.v1."
OPEN_METHODS = f"/{health.SERVICE_NAME}/"


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Stands before every method."""

    def __init__(self, keyring: Keyring) -> None:
        """Keep the keys."""
        self._keyring = keyring

    async def intercept_service(self, continuation: Any, details: Any) -> Any:  # noqa: ANN401
        """Let a call pass, or refuse it."""
        handler = await continuation(details)
        if details.method.startswith(OPEN_METHODS) or handler is None:
            return handler
        values = [
            value for name, value in details.invocation_metadata or () if name == "authorization"
        ]
        try:
            self._keyring.identify(str(values[0]) if len(values) == 1 else "")
        except ServingError as error:
            return _refusal(handler, error)
        return bounded(handler) if details.method.startswith(OWN_METHODS) else handler


def _refusal(handler: Any, error: ServingError) -> Any:  # noqa: ANN401
    """A handler of the same shape that only says no."""

    async def refuse(_: Any, context: Any) -> None:  # noqa: ANN401
        await abort(context, error)

    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)


def door_credentials(security: SecurityConfig) -> grpc.ServerCredentials | None:
    """The door's certificate, or None for plain text."""
    if not security.door_certificate:
        return None
    key, chain = Path(security.door_key).read_bytes(), Path(security.door_certificate).read_bytes()
    return grpc.ssl_server_credentials([(key, chain)])
