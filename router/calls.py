"""A call to one of the servers: who calls, from where, and how it ended.

Owns the record that follows a call through its server, and the classes of addresses. Does not know
HTTP or gRPC.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
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
from core.tenant_classes import NO_CLASS
from router.access.identities import Identity

ADDRESS_CLASSES = ("loopback", "private", "public", "unknown")
_NOBODY = Identity(tier="", tenant_class=NO_CLASS)
_REFUSALS = (ClientError, Overloaded, RateLimited, Unauthenticated, PermissionDenied)


@dataclass(slots=True)
class Call:
    """One call. It ends either with the requests that it started, or with its own code."""

    server: str
    """`http` or `grpc`."""
    address: str = ""
    """Where it comes from; never logged."""
    route: str = ""
    """The pattern or method that matched; nothing that a client wrote."""
    identity: Identity = _NOBODY
    asked_tier: str = ""
    """Its request's, once that is read."""
    code: str = ""
    """Why it was refused."""
    outcome: str = "rejected"
    """One of `core.metrics.OUTCOMES`; empty: its request is counted already."""
    is_read: bool = False
    """Its message has been read, where the server can know that."""
    is_recorded: bool = False
    """Its end is logged and counted."""
    leave: Callable[[], None] | None = None
    """Leaves its place among those who arrive."""

    def refuse(self, code: str, outcome: str = "rejected") -> None:
        """Note why it is refused; the first reason counts."""
        # A later one is a consequence: a body refused as too long also ends as disconnected.
        if not self.code:
            self.code = code
            self.outcome = outcome

    def arrived(self) -> None:
        """Leave its place among those who arrive, if it has one."""
        if self.leave is not None:
            self.leave()
            self.leave = None

    @property
    def tier(self) -> str:
        """The tier that its end counts for: its request's, else that of its key."""
        return self.asked_tier or self.identity.tier

    @property
    def client(self) -> str:
        """Class of its address."""
        return address_class(self.address)


# A context variable: what refuses a call is deep below the server, and each task inherits its
# call's.
_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def begin(call: Call) -> None:
    """Make this the current call of this task and of the tasks that it starts."""
    _CALL.set(call)


def current() -> Call | None:
    """Return the call that is served here; None inside the cluster."""
    return _CALL.get()


def arrives(leave: Callable[[], None]) -> None:
    """Note that the current call has a place among those who arrive."""
    call = _CALL.get()
    if call is None:
        leave()
    else:
        call.leave = leave


def arrived() -> None:
    """Leave the place of the current call, if it has one."""
    call = _CALL.get()
    if call is not None:
        call.arrived()


def asks_for(tier: str) -> None:
    """Note the tier of the current call's request."""
    call = _CALL.get()
    if call is not None:
        call.asked_tier = tier


def caller() -> Identity:
    """Return who calls; outside of any call, an identity without rights."""
    call = _CALL.get()
    return _NOBODY if call is None else call.identity


def note(code: str, outcome: str = "rejected") -> None:
    """Note the refusal that answers the current call, if there is one."""
    call = _CALL.get()
    if call is not None:
        call.refuse(code, outcome)


def note_error(error: ServingError) -> None:
    """Note the error that answers the current call."""
    note(error.code, outcome_of(error))


def outcome_of(error: ServingError | None) -> str:
    """Return how a request ended: one of `core.metrics.OUTCOMES`."""
    if error is None:
        return "finished"
    if isinstance(error, Cancelled):
        return "cancelled"
    return "rejected" if isinstance(error, _REFUSALS) else "failed"


def peer_address(peer: str) -> str:
    """Return the address in gRPC's peer: `ipv4:10.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    kind, _, rest = peer.partition(":")
    # Whoever can open a socket's file is on this machine.
    if kind == "unix":
        return "127.0.0.1"
    return unquote(rest).rpartition(":")[0].strip("[]")


def network_of(address: str) -> str:
    """Return what one host controls: its IPv4 address, or its /64 of IPv6 addresses."""
    found = _parsed(address)
    if found is None:
        return ""
    if found.version == 4:
        return str(found)
    # A host is given a whole /64, so one address of it more costs it nothing.
    return str(ipaddress.ip_network((found, 64), strict=False))


def address_class(address: str) -> str:
    """Return one of `ADDRESS_CLASSES`."""
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
    # A listener on `::` sees IPv4 clients as ::ffff:10.0.0.1; they count as what they are.
    return getattr(found, "ipv4_mapped", None) or found
