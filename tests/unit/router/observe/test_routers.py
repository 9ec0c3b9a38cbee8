"""The list of routers, and what Prometheus reads of it."""

import pytest

from router.observe.routers import RouterEntry, RouterList

HERE = RouterEntry("router-b", 2, "10.0.0.1", 8000, 9000, 9101)
OTHER = RouterEntry("router-a", 1, "10.0.0.2", 8000, 9000, 9100)
ANYWHERE = RouterEntry("router-c", 3, "", 8000, 9000, 9102)


def listed(*told, own=HERE, num_configured=3):
    routers = RouterList(num_configured)
    routers.listens(own)
    routers.update(told)
    return routers


def test_every_router_is_a_target_once_with_its_own_port():
    assert listed(OTHER, HERE).targets("192.0.2.7") == [
        {"targets": ["10.0.0.2:9100"], "labels": {"__meta_baton_router": "router-a"}},
        {"targets": ["10.0.0.1:9101"], "labels": {"__meta_baton_router": "router-b"}},
    ]


@pytest.mark.parametrize(
    ("reached_at", "address"),
    [("192.0.2.7", "192.0.2.7:9102"), ("2001:db8::7", "[2001:db8::7]:9102")],
)
def test_a_router_on_every_address_is_where_the_caller_has_reached_this_one(reached_at, address):
    *_, last = listed(ANYWHERE).targets(reached_at)
    assert last["targets"] == [address]
    assert listed(ANYWHERE).shown(reached_at)[-1]["metrics_address"] == address


def test_a_router_knows_of_itself_before_it_is_told_and_better_than_whoever_tells():
    assert [entry.router_id for entry in listed().entries()] == ["router-b"]
    old = RouterEntry("router-b", 2, "10.0.0.1", 8000, 9000, 1)
    assert [entry.metrics_port for entry in listed(old, OTHER).entries()] == [9100, 9101]


def test_a_list_replaces_the_one_before():
    routers = listed(OTHER)
    routers.update([ANYWHERE])
    assert [entry.router_id for entry in routers.entries()] == ["router-b", "router-c"]


def test_missing_routers_show_in_the_counts():
    assert listed(OTHER).num_by_state() == {"configured": 3, "listening": 2}
