"""Scopes: a tenant's salts divide its own, and nobody's is another's."""

import pytest

from core.scopes import scope_of, tenant_of


@pytest.mark.parametrize(
    ("tenant", "salt", "scope"),
    [("acme", "", "acme\n"), ("acme", "s", "acme\ns"), ("", "acme", "acme"), ("", "", "")],
)
def test_a_scope_is_made_of_a_tenant_and_a_salt_and_says_whose_it_is(tenant, salt, scope):
    assert scope_of(tenant, salt) == scope
    assert tenant_of(scope) == tenant
