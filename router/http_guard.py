"""The gate of the HTTP door: nothing passes without a credential but liveness.

Owns the short list of open paths and the limits on headers. It stands before routing and compares
whole paths, so a new route is closed until someone opens it here, and no spelling of a path can slip
by: what is not literally on the list needs a key. Does not know keys. Called by `router.openai_door`.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from core.errors import ServingError
from router.credentials import Keyring
from router.http_errors import error_response

OPEN_PATHS = frozenset({"/health", "/ping"})
OPEN_METHODS = frozenset({"GET", "HEAD"})


class Guard:
    """ASGI middleware; the identity it finds is in `scope["state"]["identity"]`."""

    def __init__(self, app: ASGIApp, keyring: Keyring) -> None:
        """Stand before an application."""
        self._app, self._keyring = app, keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        if scope["type"] != "http":
            return  # no websockets here, and nobody is told why
        is_open = (
            scope["path"] in OPEN_PATHS
            and scope["method"] in OPEN_METHODS
            and not scope.get("root_path")
        )
        if not is_open:
            values = [value for name, value in scope["headers"] if name == b"authorization"]
            try:
                identity = self._keyring.identify(
                    values[0].decode("latin-1") if len(values) == 1 else ""
                )
            except ServingError as error:
                refusal = error_response(error, "")
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
            scope.setdefault("state", {})["identity"] = identity
        await self._app(scope, receive, send)
