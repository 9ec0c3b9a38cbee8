"""How a host and a port are written together, IPv6 included: `[::1]:9000`.

Owns that form and the choice of a socket's family. Does not know who listens.
"""

from __future__ import annotations

import ipaddress
import socket


def join_address(host: str, port: int) -> str:
    """Write `host:port`; an IPv6 host goes into brackets, and may be in them already."""
    bare = bare_host(host)
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def bare_host(host: str) -> str:
    """Return the host as sockets want it: without the brackets of `[::1]`."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def family_of(host: str) -> socket.AddressFamily:
    """The family of sockets that can bind a host: IPv6 for an IPv6 address, else IPv4."""
    try:
        version = ipaddress.ip_address(bare_host(host)).version
    except ValueError:
        return socket.AF_INET
    return socket.AF_INET6 if version == 6 else socket.AF_INET


def unmapped(host: str) -> str:
    """Return an IPv4 address that came in the form of IPv6 as what it is; any other host as is."""
    try:
        found = ipaddress.ip_address(bare_host(host))
    except ValueError:
        return host
    return str(getattr(found, "ipv4_mapped", None) or host)


def is_any(host: str) -> bool:
    """Does it stand for every address of a machine?"""
    try:
        return not host or ipaddress.ip_address(bare_host(host)).is_unspecified
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Can only this machine reach an address?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare_host(host)).is_loopback
    except ValueError:
        return False
