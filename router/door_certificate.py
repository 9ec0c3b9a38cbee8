"""The certificate of both doors, taken up again when its files change.

Owns the pair of files and the two ways of handing it to a server. It looks when a client knocks, at
most once a second, so that nothing runs while nobody comes; connections that stand keep what they
have. A pair that does not fit is told, once, and the one before it stays. Does not know requests.
Called by `router.grpc_door` and by the composition root for HTTP.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import grpc

from core.config import SecurityConfig
from core.errors import ConfigError

log = logging.getLogger(__name__)
LOOK_S = 1.0
Stamp = tuple[tuple[int, int, int], ...]


class DoorCertificate:
    """A PEM chain and its key. gRPC asks from threads of its own, hence the lock."""

    def __init__(self, security: SecurityConfig, now_s: Callable[[], float]) -> None:
        """Read the pair.

        Raises:
            ConfigError: A file cannot be read, or key and chain do not belong together.
        """
        self._files = (Path(security.door_certificate), Path(security.door_key))
        self._now_s = now_s
        self._lock = threading.Lock()
        self._looked_at = now_s()
        self.version = 0
        """Raised with every new pair."""
        try:
            self._stamp = self._look()
            self._pair = self._read()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                "security.door_certificate and security.door_key cannot be used: "
                f"{error.strerror or error}"
            ) from error

    def refresh(self) -> int:
        """Look at the files, and take up a new pair; returns the version."""
        with self._lock:
            now_s = self._now_s()
            if now_s - self._looked_at >= LOOK_S:
                self._looked_at = now_s
                self._take_up()
            return self.version

    def _take_up(self) -> None:
        stamp: Stamp = ()  # of files that are gone
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return
            self._pair = self._read()
        except (OSError, ssl.SSLError) as error:
            if stamp != self._stamp:
                fact = error.strerror or str(error)
                log.error("the new door certificate cannot be used (%s); the old one stays", fact)
        else:
            self.version += 1
            log.warning("the doors have a new certificate")
        self._stamp = stamp

    def _look(self) -> Stamp:
        facts = [path.stat() for path in self._files]
        return tuple((f.st_ino, f.st_size, f.st_mtime_ns) for f in facts)

    def _read(self) -> tuple[bytes, bytes]:
        chain, key = self._files
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key)
        return key.read_bytes(), chain.read_bytes()

    def credentials(self) -> grpc.ServerCredentials:
        """For the gRPC door."""
        given = self.version

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            version = self.refresh()
            if version == given:
                return None
            given = version
            return grpc.ssl_server_certificate_configuration([self._pair])

        first = grpc.ssl_server_certificate_configuration([self._pair])
        return grpc.dynamic_ssl_server_credentials(first, renewed)

    def context(self, make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        """For the HTTP door.

        Args:
            make: Makes a context that has read the files.
        """
        door, given = make(), self.version
        newest = door

        def knocked(connection: ssl.SSLObject, _name: str | None, _door: ssl.SSLContext) -> None:
            nonlocal newest, given
            version = self.refresh()
            if version != given:
                given = version
                try:
                    newest = make()
                except (OSError, ssl.SSLError) as error:  # changed once more since it was read
                    log.error("the new door certificate cannot be used: %s", error)
            connection.context = newest

        door.sni_callback = knocked  # called for clients that name no server, too
        return door
