"""Whether a cluster of several machines keeps its secrets off the network.

Owns one list: every plane that would send something in plain text, and every secret that would
travel inside Ray. Does not know how planes are started.
"""

from __future__ import annotations

from cluster.ray.probe import RayEndpoint
from cluster.secrets import secrets_of
from core.config import BatonConfig
from core.errors import ConfigError
from core.references import is_reference, read_reference

OPEN_RAY = (
    "this Ray cluster asks nobody for a token: whoever reaches it can run code on it; start it "
    "with RAY_AUTH_MODE=token on every node, or set security.trusts_network"
)


def check_network(config: BatonConfig, door: RayEndpoint, *, is_loopback: bool) -> None:
    """Refuse plain text between machines, and a Ray that anybody may use.

    Raises:
        ConfigError: Says what to set, everything at once.
    """
    if is_loopback:
        is_open = not door.has_tokens and not config.security.trusts_network
        faults = [OPEN_RAY] if is_open else []
    else:
        faults = faults_between_machines(config, door)
    if faults:
        raise ConfigError("; ".join(faults))


def faults_between_machines(config: BatonConfig, door: RayEndpoint) -> list[str]:
    """List what keeps a cluster from running on several machines; empty if nothing does."""
    faults = []
    if not config.security.trusts_network:
        if not door.has_tokens:
            faults.append(OPEN_RAY)
        if not door.has_tls:
            faults.append(
                "Ray's own traffic, its token included, would cross the network in plain text; set "
                "RAY_USE_TLS=1 and RAY_TLS_CA_CERT, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY on "
                "every node, or security.trusts_network if the network is closed"
            )
        if not config.security.tls_dir:
            faults.append(
                "security.tls_dir is empty: KV and prompts would cross the network in plain text; "
                "make certificates with `baton certs`, or set security.trusts_network if the "
                "network is closed"
            )
        if config.redis.is_on and _is_plain(read_reference("redis.url", config.redis.url)):
            faults.append(
                "redis.url has no TLS: set it to a rediss:// address, redis.is_on to false, or "
                "security.trusts_network if the network is closed"
            )
    faults += [
        f"{name} is {'written in the config' if value else 'empty'} and would travel inside Ray; "
        f"put it into a file on every node and set {name} to file:PATH, or to env:NAME"
        for name, value in secrets_of(config).items()
        if not is_reference(value) and (value or name != "redis.url")
    ]
    return faults


def _is_plain(url: str) -> bool:
    """Does an address send its password readable? One that is empty names no server at all."""
    return bool(url) and not url.startswith("rediss://")
