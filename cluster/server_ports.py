"""The ports of a cluster's servers: only one cluster can have each, though its routers share it.

Owns the claim on an address and port, from before anything starts until `baton up` ends, and the
error if it is taken. Does not know routers, which bind the same ports themselves.

Routers share a port by SO_REUSEPORT, and the kernel would let those of another cluster of the same
user join them. So `baton up` first binds it without that option, which fails while anyone has the
port, and only then admits sockets with the option. Its own socket takes no connections. The kernel
decides who is first and drops the claim with the process, for all users of the machine.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from core.addresses import bare_host, family_of
from core.config import BatonConfig
from core.errors import ConfigError


@contextlib.contextmanager
def claimed(config: BatonConfig) -> Iterator[None]:
    """Hold both ports for the length of the block; port 0 means any free one, and is not held.

    Raises:
        ConfigError: One of them is taken; names the flag that changes it.
    """
    router = config.router
    with contextlib.ExitStack() as claims:
        for port, flag in ((router.http_port, "--http-port"), (router.grpc_port, "--grpc-port")):
            if port == 0:
                continue
            try:
                claims.enter_context(_claim(bare_host(router.host), port))
            except OSError as error:
                raise ConfigError(
                    f"port {port} on {router.host} cannot be used ({error.strerror}); choose "
                    f"another with {flag}"
                ) from error
        yield


def _claim(host: str, port: int) -> socket.socket:
    """Bind a free port, then let sockets of this user share it.

    Raises:
        OSError: It is taken.
    """
    claim = socket.socket(family_of(host))
    try:
        # Without this, connections of a cluster that has just ended would block the next one.
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        claim.bind((host, port))
        # With that option two may bind, but only one may listen.
        claim.listen(0)
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        claim.shutdown(socket.SHUT_RDWR)  # stops listening, stays bound
    except BaseException:
        claim.close()
        raise
    return claim
