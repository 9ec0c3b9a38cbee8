"""The certificate of the HTTP and the gRPC server, reloaded when its files change.

Owns the pair of files and its two forms, one for each server. Both look at the files at every
handshake; open connections keep the certificate that they began with. Does not know requests.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import grpc

from core import events
from core.certificate_files import CertificateFiles
from core.config import SecurityConfig
from core.errors import ConfigError

NAME = "the server certificate"


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
            self._pair = CertificateFiles(NAME, (self._chain, self._key), self._read, now_s)
        except OSError as error:  # errors of TLS are of this kind, too
            raise ConfigError(
                "security.door_certificate and security.door_key cannot be used: "
                f"{error.strerror or error}"
            ) from error

    def _read(self) -> tuple[bytes, bytes]:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._chain, self._key)
        return self._key.read_bytes(), self._chain.read_bytes()

    def chain(self) -> bytes:
        """Return the chain in use (PEM)."""
        self._pair.refresh()
        return self._pair.content[1]

    def credentials(self) -> grpc.ServerCredentials:
        """Make credentials for the gRPC server."""
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
        """Make a context for the HTTP server.

        Args:
            make: Makes a context from the files as they are now.
        """
        first = make()
        newest = first
        given = self._pair.version

        def handshake(connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
            nonlocal newest, given
            version = self._pair.refresh()
            if version != given:
                given = version
                try:
                    newest = make()
                except OSError as error:  # the files have changed once more
                    events.CERTIFICATE_UNUSABLE.log(what=NAME, reason=str(error))
            connection.context = newest

        first.sni_callback = handshake  # called for clients that name no server, too
        return first
