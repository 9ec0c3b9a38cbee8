"""The guard of the HTTP server: only liveness passes without a key, and every refusal is recorded.

Owns the short list of open paths, and the record of every call. It runs before routing and compares
whole paths: a path that is not literally on the list needs a key, however it is spelled, and a new
route is closed until it is added here. The routes themselves name the right that they need. Does
not know keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from fastapi import Request
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import Cancelled, InternalError, ServingError, Unauthenticated
from router.access.bad_keys import BadKeys
from router.access.credentials import Keyring
from router.access.identities import Identity, Right
from router.calls import Call, begin
from router.http.errors import error_response
from router.refusals import UNSUPPORTED_ENDPOINT

OPEN_PATHS = frozenset({"/health", "/ping"})
OPEN_METHODS = frozenset({"GET", "HEAD"})


def needs(right: Right) -> Callable[[Request], Awaitable[None]]:
    """Make a route's dependency, which refuses a caller without this right."""

    async def check(request: Request) -> None:
        request.state.identity.check(right)

    return check


class HttpGuard:
    """ASGI middleware; the identity it finds is in `scope["state"]["identity"]`."""

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring,
        bad_keys: BadKeys,
        on_ended: Callable[[Call], None],
        read_quota: Callable[[Identity], Mapping[str, str]],
    ) -> None:
        """Guard an application.

        Args:
            app: Runs behind the guard.
            keyring: Identifies callers.
            bad_keys: Delays refusals of a caller with many wrong keys.
            on_ended: Called once for every call, when it is over.
            read_quota: Returns the headers that show a caller's quota, on whatever answer.
        """
        self._app = app
        self._keyring = keyring
        self._bad_keys = bad_keys
        self._on_ended = on_ended
        self._read_quota = read_quota

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        # Not for `lifespan`: the router starts and stops by itself what it owns.
        if scope["type"] not in ("http", "websocket"):
            return
        call = Call("http", (scope.get("client") or ("",))[0])
        begin(call)
        status: int | None = None

        def watched(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                quota = self._read_quota(call.identity)
                shown = [(name.encode(), value.encode()) for name, value in quota.items()]
                message["headers"] = [*message.get("headers", ()), *shown]
            return send(message)

        try:
            if scope["type"] == "websocket":
                call.refuse(UNSUPPORTED_ENDPOINT.code)
                await send({"type": "websocket.close"})  # before it is accepted: a 403
            else:
                await self._pass(call, scope, receive, watched)
        except asyncio.CancelledError:
            call.refuse(Cancelled.code, "cancelled")
            raise
        except Exception:
            call.refuse(InternalError.code, "failed")
            raise
        finally:
            # Read here, after the application: routing has put the pattern into the scope by now.
            call.route = _route_of(scope)
            # No response was begun: the client has left, or the reason stands above already.
            if status is None:
                call.refuse(Cancelled.code, "cancelled")
            elif status >= HTTPStatus.BAD_REQUEST:
                call.refuse(f"http_{status}")
            self._on_ended(call)

    async def _pass(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        # Only the exact paths: what is mounted below a prefix could look like one of them.
        is_open = (
            scope["path"] in OPEN_PATHS
            and scope["method"] in OPEN_METHODS
            and not scope.get("root_path")
        )
        if not is_open:
            values = [value for name, value in scope["headers"] if name == b"authorization"]
            try:
                call.identity = self._keyring.identify(
                    # Of two keys a proxy may have checked the other one.
                    values[0].decode("latin-1") if len(values) == 1 else ""
                )
            except ServingError as error:
                if isinstance(error, Unauthenticated):
                    # Whatever else is wrong with the call, it guesses no key.
                    await self._bad_keys.hold(call.address)
                refusal = error_response(error, "")
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
            scope.setdefault("state", {})["identity"] = call.identity
        await self._app(scope, receive, send)


def _route_of(scope: Scope) -> str:
    """Return the pattern of the route that matches a request; empty for none."""
    route = scope.get("route")
    if route is None and scope["type"] == "http" and "app" in scope:
        matching = (r for r in scope["app"].routes if r.matches(scope)[0] is Match.FULL)
        route = next(matching, None)
    return getattr(route, "path", "")
