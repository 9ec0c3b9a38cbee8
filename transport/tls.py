"""Which certificate a process shows, and which peers it accepts.

Owns the reading of `security.tls_dir` and the rule of roles: routers open sessions to workers,
decode workers fetch KV from prefill workers, and nobody else may do either. Does not know gRPC.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from core.certificate_files import CertificateFiles
from core.clocks import SystemClock
from core.config import SecurityConfig
from core.errors import ConfigError
from transport.grpc_credentials import Tls, TlsFiles

ROLES = ("router", "prefill", "decode")
DOMAIN = "baton.internal"


def tls_of(security: SecurityConfig, role: str, *, peers: str, servers: str) -> Tls | None:
    """Read the files of a role; None without `security.tls_dir`.

    Args:
        security: That part of the config.
        role: Whose certificate to show: router, prefill or decode.
        peers: Role that may dial in.
        servers: Role that a dialled server must have.

    Raises:
        ConfigError: A file is missing, or cannot be used.
    """
    if not security.tls_dir:
        return None
    folder = Path(security.tls_dir).expanduser()
    certificate = folder / f"{role}.pem"
    key = folder / f"{role}.key"
    authority = folder / "ca.pem"

    def read() -> TlsFiles:
        # Loaded for the check alone: gRPC notices broken files only at the handshakes.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
        return TlsFiles(certificate.read_bytes(), key.read_bytes(), authority.read_bytes())

    try:
        files = CertificateFiles(
            f"the certificate of role {role}",
            (certificate, key, authority),
            read,
            SystemClock().now_s,
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"security.tls_dir lacks a file of role {role}; make them with `baton certs`"
        ) from error
    except OSError as error:  # errors of TLS are of this kind, too
        raise ConfigError(
            f"security.tls_dir has files of role {role} that cannot be used: "
            f"{error.strerror or error}"
        ) from error
    return Tls(files, peer_name=f"{peers}.{DOMAIN}", server_name=f"{servers}.{DOMAIN}")


def session_tls(security: SecurityConfig, role: str) -> Tls | None:
    """Return TLS for sessions: routers dial workers."""
    return tls_of(security, role, peers="router", servers="worker")


def fetch_tls(security: SecurityConfig, role: str) -> Tls | None:
    """Return TLS for Fetch: decode workers dial prefill workers."""
    return tls_of(security, role, peers="decode", servers="prefill")
