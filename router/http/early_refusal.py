"""Refuses a request that would find no room, before anything of its body is read.

Owns which paths start requests. It runs behind the guard and before routing: at many times a
router's capacity nearly every call ends here. Does not know permits, bodies or keys.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from core.errors import ServingError
from router.access.identities import Identity, Right
from router.calls import arrived
from router.http.errors import REQUEST_ID_HEADER, error_response
from router.request_params import correlation_id_of

COMPLETIONS_PATH = "/v1/completions"
CHAT_PATH = "/v1/chat/completions"
REQUEST_PATHS = frozenset({COMPLETIONS_PATH, CHAT_PATH})
"""What is posted here needs a permit; everything else is answered by a full router too."""


class EarlyRefusal:
    """ASGI middleware; it expects the guard's identity in `scope["state"]`."""

    def __init__(self, app: ASGIApp, arrive: Callable[[Identity], None]) -> None:
        """Pass on to `app` whom `arrive` does not refuse."""
        self._app = app
        self._arrive = arrive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it and leave its body unread."""
        if scope["path"] in REQUEST_PATHS and scope["method"] == "POST":
            identity: Identity = scope["state"]["identity"]
            try:
                # First of all: who may not ask gets the same answer from a full router.
                identity.check(Right.GENERATE)
                self._arrive(identity)
            except ServingError as error:
                request_id = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
                await error_response(error, correlation_id_of(request_id))(scope, receive, send)
                return
        try:
            await self._app(scope, receive, send)
        finally:
            arrived()
