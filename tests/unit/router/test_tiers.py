"""Who may ask for which tier, and by which names."""

import pytest

from core.config import load_config
from core.errors import InvalidRequest, PermissionDenied
from router.access.identities import ANYBODY, Identity, KeyRole
from router.tiers import Tiers

TIERS = Tiers(load_config(flags={"tiers.gold.delay_s": 5}, environment={}).tiers, "gold")


def chosen(tier, field="", header="", role=KeyRole.TENANT):
    return TIERS.choose(Identity("acme", tier, role), field, header)


@pytest.mark.parametrize("name", ["", "auto", "default", "scale"])
def test_who_asks_for_nothing_gets_the_tier_of_its_key(name):
    assert chosen("batch", name) == chosen("batch", "", name) == "batch"
    assert chosen("default", name) == "gold"


@pytest.mark.parametrize(
    ("name", "tier"), [("flex", "batch"), ("priority", "interactive"), ("standard", "standard")]
)
def test_a_tier_is_asked_for_by_its_own_name_or_as_at_openai(name, tier):
    assert chosen("interactive", name) == chosen("interactive", "", name) == tier


def test_field_and_header_may_say_the_same_and_not_two_things():
    assert chosen("interactive", "flex", "batch") == "batch"
    assert chosen("interactive", "auto", "batch") == "batch"
    with pytest.raises(InvalidRequest, match="tier batch and header x-baton-tier for standard"):
        chosen("interactive", "flex", "standard")


def test_a_key_may_step_back_or_aside_and_not_ahead():
    assert chosen("standard", "batch") == "batch"
    assert chosen("standard", "gold") == "gold", "both have the same delay"
    assert chosen("gold", "standard") == "standard"
    fact = "tier interactive goes before standard, .* ask for one of standard, batch, gold, or"
    for asked in ({"field": "priority"}, {"header": "interactive"}):
        with pytest.raises(PermissionDenied, match=fact):
            chosen("standard", **asked)
    with pytest.raises(PermissionDenied):
        chosen("unknown", "interactive")


def test_who_operates_the_cluster_and_everybody_without_keys_may_ask_for_any():
    assert chosen("batch", "interactive", role=KeyRole.ADMIN) == "interactive"
    assert TIERS.choose(ANYBODY, "interactive", "") == "interactive"
    assert TIERS.choose(ANYBODY, "", "") == "gold"


@pytest.mark.parametrize("asked", [{"field": "Batch"}, {"header": "x" * 100}])
def test_an_unknown_tier_is_refused_with_the_names_that_there_are(asked):
    with pytest.raises(InvalidRequest) as caught:
        chosen("batch", **asked)
    assert (
        caught.value.field == {"field": "service_tier", "header": "x-baton-tier"}[next(iter(asked))]
    )
    for name in ("interactive", "standard", "batch", "gold", "flex", "priority", "auto"):
        assert name in caught.value.message
    assert len(caught.value.message) < 200
