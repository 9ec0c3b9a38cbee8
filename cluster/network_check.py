"""Whether a cluster of several machines keeps its secrets off the network.

Owns one list: every connection that would be in plain text, and every secret that would travel
inside Ray. Does not know how connections are made.
"""

from __future__ import annotations

from cluster.ray.probe import RayEndpoint
from cluster.secrets import secrets_of
from core.config import BatonConfig
from core.errors import ConfigError
from core.secret_references import is_reference, read_reference

OPEN_RAY = (
    "this Ray cluster requires no token: anyone who reaches it can run code on it; start it "
    "with RAY_AUTH_MODE=token on every node, or set security.trust_network"
)


def check_network(config: BatonConfig, ray: RayEndpoint, *, is_loopback: bool) -> None:
    """Refuse plain text between machines, and a Ray that anyone may use.

    Raises:
        ConfigError: Names everything to set at once.
    """
    if is_loopback:
        is_open = not ray.has_tokens and not config.security.trust_network
        faults = [OPEN_RAY] if is_open else []
    else:
        faults = faults_between_machines(config, ray)
    if faults:
        raise ConfigError("; ".join(faults))


def faults_between_machines(config: BatonConfig, ray: RayEndpoint) -> list[str]:
    """List what forbids a cluster to run on several machines; empty if nothing does."""
    faults = []
    if not config.security.trust_network:
        if not ray.has_tokens:
            faults.append(OPEN_RAY)
        if not ray.has_tls:
            faults.append(
                "Ray's own traffic, its token included, would cross the network in plain text; set "
                "RAY_USE_TLS=1 and RAY_TLS_CA_CERT, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY on "
                "every node, or security.trust_network if the network is closed"
            )
        if not config.security.tls_dir:
            faults.append(
                "security.tls_dir is empty: KV and prompts would cross the network in plain text; "
                "make certificates with `baton certs`, or set security.trust_network if the "
                "network is closed"
            )
        if config.redis.enabled and _is_plain(read_reference("redis.url", config.redis.url)):
            faults.append(
                "redis.url has no TLS: set it to a rediss:// address, redis.enabled to false, or "
                "security.trust_network if the network is closed"
            )
    # Ray keeps actors' arguments in its store and logs: a secret there has left our hands.
    faults += [
        f"{name} is {'written in the config' if value else 'empty'} and would travel inside Ray; "
        f"put it into a file on every node and set {name} to file:PATH, or to env:NAME"
        for name, value in secrets_of(config).items()
        if not is_reference(value) and (value or name != "redis.url")
    ]
    return faults


def _is_plain(url: str) -> bool:
    """True if an address sends its password in plain text; an empty one names no server."""
    return bool(url) and not url.startswith("rediss://")
