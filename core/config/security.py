"""Who may come in, how the inside is closed, and what a key must be like.

Owns these settings and the least length of a key. Does not know certificates.
"""

from __future__ import annotations

from pydantic import Field

from core.config.node import Node
from core.secret_references import is_reference

MIN_KEY_CHARACTERS = 16
MAX_SEED_KEY_BYTES = 64


class SecurityConfig(Node):
    """Who may come in, and how the inside is closed."""

    api_keys: str = Field(
        "", description="file of hashed keys (`baton keys add`); empty: loopback only, anybody"
    )
    tls_dir: str = Field(
        "", description="certificates of `baton certs`: mutual TLS between routers and workers"
    )
    door_certificate: str = Field(
        "", description="PEM chain of the HTTP and gRPC servers; empty: plain text"
    )
    door_key: str = Field("", description="PEM key of that certificate")
    cluster_key: str = Field(
        "",
        repr=False,
        description="secret of this cluster's processes, at least 16 characters, which keys the "
        "names of KV blocks and, without TLS, opens the ports inside; file:PATH and env:NAME name "
        "it; empty: made at each start",
    )
    trust_network: bool = Field(
        default=False, description="allow plain text inside a cluster of several machines"
    )
    production: bool = Field(default=False, description="no reflection, no /docs")


def check_key(name: str, secret: str) -> None:
    """Refuse a key that can be guessed; one that is named only is checked where it is read.

    Raises:
        ValueError: It is too short, or too long for the hash.
    """
    if is_reference(secret):
        return
    if 0 < len(secret) < MIN_KEY_CHARACTERS:
        raise ValueError(
            f"{name} has {len(secret)} characters and can be guessed; use "
            f"{MIN_KEY_CHARACTERS} or more, or leave it empty to have one made"
        )
    if name == "seed_key" and len(secret.encode()) > MAX_SEED_KEY_BYTES:
        raise ValueError(
            f"seed_key has {len(secret.encode())} bytes, the hash takes at most "
            f"{MAX_SEED_KEY_BYTES}"
        )
