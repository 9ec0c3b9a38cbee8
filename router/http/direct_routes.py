"""The paths that start requests, without the framework's way to them.

Owns how such a call finds its endpoint, and the reply to the error that this raises. It runs behind
the early refusal, which has checked the caller's right. The framework describes these paths and
serves all others: its dependencies cost each request, and its wrappers around `send` each token.
Does not know bodies or permits.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from core.errors import ServingError
from router.http.errors import error_response
from router.http.headers import correlation_of


class DirectRoutes:
    """ASGI middleware: answers what is posted to some paths."""

    def __init__(self, app: ASGIApp, routes: Iterable[APIRoute]) -> None:
        """Serve what is posted to the paths of `routes`; pass on to `app` everything else."""
        self._app = app
        self._routes = {route.path: route for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call, or pass it on."""
        route = self._routes.get(scope["path"])
        if route is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # as the framework does: the guard's record names it
        request = Request(scope, receive, send)
        try:
            reply = await route.endpoint(request)
        except ServingError as error:
            reply = error_response(error, correlation_of(request))
        await reply(scope, receive, send)
