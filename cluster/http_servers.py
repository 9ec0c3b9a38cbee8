"""A router's HTTP servers: the shared one for clients, and one of its own for its metrics.

Owns their sockets, settings and tasks. Does not know which paths they answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn
from starlette.types import ASGIApp

from core.addresses import bare_host, family_of
from core.config import RouterConfig, SecurityConfig
from core.errors import ConfigError
from router.access.certificate import ServerCertificate
from router.http.server.connections import ConnectionTable
from router.http.server.listener import HttpServer
from router.http.server.protocol import OnRefused

STOP_GRACE_S = 5.0


class RunningHttp:
    """A server on a bound socket, as a task of this process."""

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        connections: ConnectionTable,
        router: RouterConfig,
        security: SecurityConfig,
        certificate: ServerCertificate | None,
        on_refused: OnRefused,
    ) -> None:
        """Serve `app` from here on.

        Args:
            app: Answers.
            listener: Bound.
            connections: Limits them.
            router: Its limits on clients.
            security: Names the files of the certificate.
            certificate: What is in them; None: plain text.
            on_refused: Counts clients turned away outside of any request.
        """
        self.port: int = listener.getsockname()[1]
        settings = uvicorn.Config(
            app,
            # Named: `auto` would silently take another parser if this one were missing.
            http="httptools",
            ws="none",
            # Its own settings would replace ours; requests are logged by the router itself.
            log_config=None,
            access_log=False,
            # The application holds nothing that starts or stops: the router does.
            lifespan="off",
            timeout_keep_alive=60,
            timeout_graceful_shutdown=int(STOP_GRACE_S),
            ssl_certfile=security.door_certificate or None,
            ssl_keyfile=security.door_key or None,
            ssl_context_factory=(
                (lambda _, make: certificate.context(make)) if certificate else None
            ),
        )
        self._server = HttpServer(settings, listener, connections, router.slow_reader_s, on_refused)
        self._task = asyncio.get_running_loop().create_task(self._server.serve())

    async def stop(self) -> None:
        """Accept nobody, and let those who are served finish for a while."""
        self._server.should_exit = True
        await asyncio.gather(self._task, return_exceptions=True)


def shared_socket(router: RouterConfig) -> socket.socket:
    """Bind the HTTP port, which the routers of a cluster share.

    Raises:
        OSError: Somebody else has it.
    """
    listener = _socket(router.host)
    # The kernel spreads connections over the routers.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((bare_host(router.host), router.http_port))
    return listener


def metrics_socket(router: RouterConfig) -> socket.socket:
    """Bind a port that no other router has, the first free one of those that may be taken.

    Raises:
        ConfigError: None of them is free.
    """
    first = router.metrics_port
    last = first + router.replicas - 1 if first else 0
    for port in range(first, last + 1):
        listener = _socket(router.host)
        with contextlib.suppress(OSError):
            listener.bind((bare_host(router.host), port))
            # Two may bind a port before either listens on it.
            listener.listen()
            return listener
        listener.close()
    raise ConfigError(
        f"no port from {first} to {last} on {router.host} is free for a router's metrics; set "
        "router.metrics_port to the first of router.replicas free ones, or to 0 for any"
    )


def _socket(host: str) -> socket.socket:
    # The protocol is named because asyncio turns Nagle's algorithm off only then.
    listener = socket.socket(family_of(host), socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return listener
