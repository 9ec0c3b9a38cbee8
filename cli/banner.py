"""What `baton up` shows once its cluster serves: addresses, and a command that reaches them.

Owns that table and the choice of host, authority and key in the command. Does not know how a
cluster starts.
"""

from __future__ import annotations

import shlex
from itertools import zip_longest
from pathlib import Path

from rich.console import Console
from rich.table import Table

from client.endpoints import API_KEY_VARIABLE
from cluster.pools import pools_of
from core import events
from core.addresses import bare_host, join_address
from core.config import BatonConfig, SecurityConfig

WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - not bound here
"""Wildcard addresses, and how this machine itself reaches them."""


def announce(console: Console, config: BatonConfig, addresses: list[tuple[int, int]]) -> None:
    """Show the addresses of a started cluster, and log the event.

    Args:
        console: The terminal.
        config: The cluster's.
        addresses: (HTTP port, gRPC port) of each router.
    """
    host = config.router.host
    http_port, grpc_port = addresses[0]
    events.CLUSTER_READY.log(http_port=http_port, grpc_port=grpc_port)
    scheme = "https" if config.security.door_certificate else "http"
    table = Table("pool", "workers", "server", "address", title="ready" if http_port else "")
    servers = [
        ("HTTP", f"{scheme}://{join_address(host, http_port)}"),
        ("gRPC", join_address(host, grpc_port)),
    ]
    for other_http, other_grpc in dict.fromkeys(addresses[1:]):
        if (other_http, other_grpc) != addresses[0]:
            http_url = f"{scheme}://{join_address(host, other_http)}"
            grpc_address = join_address(host, other_grpc)
            servers.append(("router", f"{http_url}, gRPC {grpc_address}"))
    # A colocated cluster shows that it has no prefill workers.
    counts = {"prefill": "0"} | {
        str(pool_id): str(pool.replicas) for pool_id, pool in pools_of(config).items()
    }
    for pool, server in zip_longest(counts.items(), servers, fillvalue=("", "")):
        table.add_row(*pool, *server)
    console.print(table)
    command = " ".join(["baton generate 'def main('", *arguments_to_reach(config, grpc_port)])
    console.print(f"try: {command}    Ctrl-C ends the cluster", soft_wrap=True)
    if config.security.api_keys:
        console.print(
            f"     with a key in {API_KEY_VARIABLE}: `baton keys add` makes one", soft_wrap=True
        )


def arguments_to_reach(config: BatonConfig, grpc_port: int) -> list[str]:
    """Return the arguments with which `baton generate` reaches and trusts the cluster here."""
    security = config.security
    host = WILDCARDS.get(bare_host(config.router.host), config.router.host)
    authority = None
    if security.door_certificate:
        host, authority = _trusted(security, host)
    arguments = ["--grpc", join_address(host, grpc_port)]
    return [*arguments, "--ca", shlex.quote(str(authority))] if authority else arguments


def _trusted(security: SecurityConfig, host: str) -> tuple[str, Path | None]:
    """Return a host of the servers' certificate, `host` if possible, and the authority's file.

    No file beside the certificate has signed it: then the system should know the authority.
    """
    from transport.certificates import hosts_of, is_signed_by  # noqa: PLC0415 - most have no certificates

    certificate = Path(security.door_certificate)
    folders = [
        certificate.parent,
        *([Path(security.tls_dir).expanduser()] if security.tls_dir else []),
    ]
    try:
        chain = certificate.read_bytes()
        hosts = [name for name in hosts_of(chain) if not name.startswith("*")]
    except (OSError, ValueError):
        return host, None  # on Ray the file may be on other machines only
    host = host if bare_host(host) in hosts or not hosts else hosts[0]
    for authority in (folder / "ca.pem" for folder in folders):
        try:
            if is_signed_by(chain, authority.read_bytes()):
                return host, authority
        except (OSError, ValueError):
            continue
    return host, None
