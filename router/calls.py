"""A call at a door: who calls, from where, and how it ended.

Owns the record that follows a call through a door, and the classes of addresses. Does not know HTTP
or gRPC.
"""

from __future__ import annotations

import ipaddress
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import unquote

from core.errors import (
    Cancelled,
    ClientError,
    Overloaded,
    PermissionDenied,
    RateLimited,
    ServingError,
    Unauthenticated,
)
from router.access.identities import Identity

ADDRESS_CLASSES = ("loopback", "private", "public", "unknown")
_NOBODY = Identity(tier="")
_REFUSALS = (ClientError, Overloaded, RateLimited, Unauthenticated, PermissionDenied)


@dataclass(slots=True)
class Call:
    """One call. It ends either with the requests that it started, or with a code of its own."""

    door: str
    address: str = ""
    """Where it comes from; never told as it is."""
    route: str = ""
    """Pattern or method of ours; nothing that a client wrote."""
    identity: Identity = _NOBODY
    code: str = ""
    """Why it was refused."""
    outcome: str = "rejected"
    """One of `core.metrics.OUTCOMES`; empty: its request is counted already."""
    is_read: bool = False
    """Its message has been read, where a door can tell."""
    is_told: bool = False
    """Its ending stands in the log."""

    def refuse(self, code: str, outcome: str = "rejected") -> None:
        """Note why it is refused; the first reason stays."""
        if not self.code:
            self.code = code
            self.outcome = outcome

    @property
    def client(self) -> str:
        """Class of its address."""
        return address_class(self.address)


_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def begin(call: Call) -> None:
    """Make a call the current one, for this task and those it starts."""
    _CALL.set(call)


def current() -> Call | None:
    """The call that is being served here; None inside the cluster."""
    return _CALL.get()


def caller() -> Identity:
    """Whose call this is; nobody's outside of one, which has no right to anything."""
    call = _CALL.get()
    return _NOBODY if call is None else call.identity


def note(code: str, outcome: str = "rejected") -> None:
    """Note that the current call, if there is one, is answered with a refusal."""
    call = _CALL.get()
    if call is not None:
        call.refuse(code, outcome)


def note_error(error: ServingError) -> None:
    """Note the error with which the current call is answered."""
    note(error.code, outcome_of(error))


def outcome_of(error: ServingError | None) -> str:
    """How a request ended, in one of the words of `core.metrics.OUTCOMES`."""
    if error is None:
        return "finished"
    if isinstance(error, Cancelled):
        return "cancelled"
    return "rejected" if isinstance(error, _REFUSALS) else "failed"


def peer_address(peer: str) -> str:
    """The address of gRPC's name for a peer: `ipv4:10.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    kind, _, rest = peer.partition(":")
    if kind == "unix":
        return "127.0.0.1"
    return unquote(rest).rpartition(":")[0].strip("[]")


def network_of(address: str) -> str:
    """What stands for one neighbour: an IPv4 address, or the /64 that one IPv6 host may fill."""
    found = _parsed(address)
    if found is None:
        return ""
    if found.version == 4:
        return str(found)
    return str(ipaddress.ip_network((found, 64), strict=False))


def address_class(address: str) -> str:
    """One of `ADDRESS_CLASSES`."""
    found = _parsed(address)
    if found is None:
        return "unknown"
    if found.is_loopback:
        return "loopback"
    return "public" if found.is_global else "private"


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
