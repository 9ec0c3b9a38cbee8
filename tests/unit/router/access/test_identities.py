"""What each role may do, and what names a tenant."""

import pytest

from core.errors import ConfigError, PermissionDenied
from router.access.credentials import new_key
from router.access.identities import ANYBODY, Identity, KeyRole, Right


def test_each_role_has_its_rights_and_no_others():
    rights = {role: set() for role in KeyRole}
    for role in KeyRole:
        for right in Right:
            try:
                Identity("t", "standard", role).check(right)
                rights[role].add(right)
            except PermissionDenied as error:
                assert "admin" in error.message
    assert rights == {
        KeyRole.TENANT: {Right.ANY_KEY, Right.GENERATE},
        KeyRole.METRICS: {Right.ANY_KEY, Right.OBSERVE},
        KeyRole.ADMIN: set(Right),
    }
    assert all(ANYBODY.check(right) is None for right in Right), "an open cluster stays open"


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 65, "a/b"])
def test_names_of_tenants_are_names(name):
    with pytest.raises(ConfigError, match="tenant"):
        new_key(name, "standard")
