"""Who calls, and what such a caller may do.

Owns the roles of keys and the rights of each role. Does not know keys, files, HTTP or gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from core.errors import PermissionDenied
from core.tenant_classes import DEFAULT_CLASS
from core.types import DEFAULT_TIER


class Right(Enum):
    """What a route or method requires of its caller."""

    ANY_KEY = "any key"
    """Facts about the service: its models, version and readiness."""
    GENERATE = "generate"
    """Work for the caller's tenant."""
    OBSERVE = "observe"
    """Reading what concerns every tenant: metrics, load, replicas, KV routes."""
    OPERATE = "operate"
    """Loading or changing the cluster."""


class KeyRole(Enum):
    """What a key is for."""

    TENANT = "tenant"
    METRICS = "metrics"
    ADMIN = "admin"


# A key that scrapes metrics can generate nothing: such keys lie in monitoring's config files.
RIGHTS = {
    KeyRole.TENANT: frozenset({Right.ANY_KEY, Right.GENERATE}),
    KeyRole.METRICS: frozenset({Right.ANY_KEY, Right.OBSERVE}),
    KeyRole.ADMIN: frozenset(Right),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls. The tenant scopes the prefix cache, request ids and aborts."""

    tenant: str = ""
    tier: str = DEFAULT_TIER
    role: KeyRole = KeyRole.TENANT
    key: str = field(default="", compare=False)
    """Name of the API key, which is no secret; empty where there are no keys."""
    tenant_class: str = DEFAULT_CLASS
    """As what it counts in metrics and traces."""

    def has(self, right: Right) -> bool:
        """True if a key of this role may do it."""
        return right in RIGHTS[self.role]

    def check(self, right: Right) -> None:
        """Refuse what a key of this role may not do.

        Raises:
            PermissionDenied: Names the roles that may.
        """
        if not self.has(right):
            able = " or ".join(role.value for role in KeyRole if right in RIGHTS[role])
            raise PermissionDenied(
                f"a key of role {self.role.value} may not do this; use one of role {able} "
                "(`baton keys add --role`)"
            )


ANYBODY = Identity(role=KeyRole.ADMIN)
"""Every caller of a cluster without keys, which only this machine can reach."""
