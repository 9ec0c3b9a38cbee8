"""The certificate of both doors, taken up again when its files change.

Owns the pair of files and the two ways of handing it to a server, each of which looks whenever a
client knocks; connections that stand keep what they have. Does not know requests.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import grpc

from core import events
from core.config import SecurityConfig
from core.errors import ConfigError
from core.renewed import Renewed

DOORS = "the doors' certificate"


class ServerCertificate:
    """A PEM chain and its key."""

    def __init__(self, security: SecurityConfig, now_s: Callable[[], float]) -> None:
        """Read the pair.

        Raises:
            ConfigError: A file cannot be read, or key and chain do not belong together.
        """
        self._chain = Path(security.door_certificate)
        self._key = Path(security.door_key)
        try:
            self._pair = Renewed(DOORS, (self._chain, self._key), self._read, now_s)
        except OSError as error:  # errors of TLS are of this kind, too
            raise ConfigError(
                "security.door_certificate and security.door_key cannot be used: "
                f"{error.strerror or error}"
            ) from error

    def _read(self) -> tuple[bytes, bytes]:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._chain, self._key)
        return self._key.read_bytes(), self._chain.read_bytes()

    def chain(self) -> bytes:
        """The chain in use (PEM)."""
        self._pair.refresh()
        return self._pair.content[1]

    def credentials(self) -> grpc.ServerCredentials:
        """For the gRPC door."""
        given = self._pair.version

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            version = self._pair.refresh()
            if version == given:
                return None
            given = version
            return grpc.ssl_server_certificate_configuration([self._pair.content])

        first = grpc.ssl_server_certificate_configuration([self._pair.content])
        return grpc.dynamic_ssl_server_credentials(first, renewed)

    def context(self, make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        """For the HTTP door.

        Args:
            make: Makes a context that has read the files.
        """
        door = make()
        newest = door
        given = self._pair.version

        def knocked(connection: ssl.SSLObject, _name: str | None, _door: ssl.SSLContext) -> None:
            nonlocal newest, given
            version = self._pair.refresh()
            if version != given:
                given = version
                try:
                    newest = make()
                except OSError as error:  # the files have changed once more
                    events.CERTIFICATE_UNUSABLE.tell(what=DOORS, reason=str(error))
            connection.context = newest

        door.sni_callback = knocked  # called for clients that name no server, too
        return door
