"""Scopes of the prefix cache: who shares blocks with whom.

Owns how a scope is made of a tenant and a salt, and whose it is. Does not know blocks.
"""

from __future__ import annotations

_SEPARATOR = "\n"
"""Neither names of tenants nor salts contain it."""


def scope_of(tenant: str, salt: str) -> str:
    """Return the scope of a request: the tenant's, divided by the request's salt."""
    return f"{tenant}{_SEPARATOR}{salt}" if tenant else salt


def tenant_of(scope: str) -> str:
    """Return whose scope it is; without keys all are nobody's, however they are salted."""
    tenant, separator, _ = scope.partition(_SEPARATOR)
    return tenant if separator else ""
