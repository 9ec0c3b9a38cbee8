"""Which certificate a process shows, and whom it believes.

Owns the reading of `security.tls_dir` and the rule of roles: sessions are opened by routers to workers,
KV is fetched by decode workers from prefill workers, and nobody else may. Does not know gRPC. Called by
the composition roots of workers and routers.
"""

from __future__ import annotations

from pathlib import Path

from core.config import SecurityConfig
from core.errors import ConfigError
from kv_transfer.grpc_network import Tls

DOMAIN = "baton.internal"


def tls_of(security: SecurityConfig, role: str, *, peers: str, servers: str) -> Tls | None:
    """Read the files of a role; None without `security.tls_dir`.

    Args:
        security: The config's node.
        role: Whose certificate to show: router, prefill or decode.
        peers: Role that may dial in.
        servers: Role that a dialled server must have.

    Raises:
        ConfigError: A file is missing.
    """
    if not security.tls_dir:
        return None
    folder = Path(security.tls_dir).expanduser()
    try:
        certificate, key, authority = (
            (folder / name).read_bytes() for name in (f"{role}.pem", f"{role}.key", "ca.pem")
        )
    except OSError as error:
        raise ConfigError(
            f"security.tls_dir lacks a file of role {role}; make them with `baton certs`"
        ) from error
    return Tls(
        certificate,
        key,
        authority,
        peer_name=f"{peers}.{DOMAIN}",
        server_name=f"{servers}.{DOMAIN}",
    )


def session_tls(security: SecurityConfig, role: str) -> Tls | None:
    """For sessions: routers dial workers."""
    return tls_of(security, role, peers="router", servers="worker")


def fetch_tls(security: SecurityConfig, role: str) -> Tls | None:
    """For Fetch: decode workers dial prefill workers."""
    return tls_of(security, role, peers="decode", servers="prefill")
