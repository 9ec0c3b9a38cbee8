"""Scopes of the prefix cache: who shares blocks with whom.

Owns how a scope is made of a tenant, a salt and the length of a prompt's public beginning, and how
they are read from it. Does not know blocks.

    TENANT ⏎ SALT                    blocks of one tenant; without keys the salt alone
    ⏎ TOKENS ⏎ (one of the above)    the first tokens are public: any tenant may have computed them
"""

from __future__ import annotations

PUBLIC_SCOPE = "\n"
"""Of all blocks that are public: no tenant and no salt makes it."""
_SEPARATOR = "\n"
"""Neither names of tenants nor salts contain it."""
_MAX_DIGITS = 9


def scope_of(tenant: str, salt: str) -> str:
    """Return the scope of a request: the tenant's, divided by the request's salt."""
    return f"{tenant}{_SEPARATOR}{salt}" if tenant else salt


def with_public(scope: str, num_tokens: int) -> str:
    """Return the scope of a prompt whose first tokens are public."""
    return f"{_SEPARATOR}{num_tokens}{_SEPARATOR}{scope}" if num_tokens else scope


def split_scope(scope: str) -> tuple[int, str]:
    """Return how many of the first tokens are public, and the scope of the others."""
    if not scope.startswith(_SEPARATOR):
        return 0, scope
    number, separator, own = scope[1:].partition(_SEPARATOR)
    is_number = number.isascii() and number.isdigit() and len(number) <= _MAX_DIGITS
    # A scope of any other kind shares nothing: it is one that nobody else has.
    return (int(number), own) if separator and is_number else (0, scope)


def tenant_of(scope: str) -> str:
    """Return whose scope it is; without keys all are nobody's, however they are salted."""
    tenant, separator, _ = split_scope(scope)[1].partition(_SEPARATOR)
    return tenant if separator else ""
