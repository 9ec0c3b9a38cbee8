"""A process's certificates as gRPC takes them, reloaded when their files change.

Owns the credentials of channels and servers, and the names that peers must have. Does not know
where the files are: `transport.tls` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from core.certificate_files import CertificateFiles


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A process's certificate and key, and the authority it trusts (PEM)."""

    certificate: bytes
    key: bytes
    authority: bytes


@dataclass(frozen=True, slots=True)
class Tls:
    """A process's certificate, reloaded with its files, and the names its peers must have."""

    files: CertificateFiles[TlsFiles]
    peer_name: str
    """Of peers that may dial in."""
    server_name: str
    """Of a dialled server."""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Make credentials for a new channel; one that is open keeps the certificate it has."""
        self.files.refresh()
        files = self.files.content
        return grpc.ssl_channel_credentials(files.authority, files.key, files.certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Make credentials for a server, which asks for a newer certificate at every handshake."""
        given = self.files.version

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            version = self.files.refresh()
            if version == given:
                return None  # for gRPC: the certificate is the same
            given = version
            return self._configuration()

        # Without client authentication a peer needs no certificate, and has no name to check.
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), renewed, require_client_authentication=True
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        files = self.files.content
        return grpc.ssl_server_certificate_configuration(
            [(files.key, files.certificate)], files.authority
        )
