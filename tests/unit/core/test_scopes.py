"""Scopes: a tenant's salts divide its own, and nobody's is another's."""

import pytest

from core.scopes import PUBLIC_SCOPE, scope_of, split_scope, tenant_of, with_public


@pytest.mark.parametrize(
    ("tenant", "salt", "scope"),
    [("acme", "", "acme\n"), ("acme", "s", "acme\ns"), ("", "acme", "acme"), ("", "", "")],
)
def test_a_scope_is_made_of_a_tenant_and_a_salt_and_says_whose_it_is(tenant, salt, scope):
    assert scope_of(tenant, salt) == scope
    assert tenant_of(scope) == tenant


def test_a_public_beginning_is_part_of_a_scope_and_read_from_it():
    own = scope_of("acme", "s")
    assert with_public(own, 0) == own and split_scope(own) == (0, own)
    public = with_public(own, 96)
    assert split_scope(public) == (96, own) and tenant_of(public) == "acme"
    assert split_scope(with_public("", 96)) == (96, "") and tenant_of(with_public("", 96)) == ""


@pytest.mark.parametrize(
    "scope", ["\n", "\nx\nacme\n", "\n-1\na", "\n²\na", "\n12", "\n" + "9" * 10 + "\na"]
)
def test_a_scope_that_is_none_makes_nothing_public(scope):
    assert split_scope(scope) == (0, scope)


@pytest.mark.parametrize("salt", ["", "1", "acme"])
def test_no_tenant_and_no_salt_makes_the_scope_of_what_is_public(salt):
    for tenant in ("", "acme"):
        scope = scope_of(tenant, salt)
        assert scope != PUBLIC_SCOPE and split_scope(scope) == (0, scope)
