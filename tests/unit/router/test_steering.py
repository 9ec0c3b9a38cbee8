"""Keys that callers give: which workers they used, and whose keys they are."""

from core.session import Role, WorkerDescriptor
from core.types import GenerateRequest, Path, SamplingParams
from router.placement import Placement
from router.steering import Steering


def worker(name, role):
    return WorkerDescriptor(name, role, 1, "a", "b", "m", "digest", 16, 100, 1_000)


P, P2 = (worker(name, Role.PREFILL) for name in ("p", "p2"))
D, D2 = (worker(name, Role.DECODE) for name in ("d", "d2"))


def request(*affinity, tenant="acme"):
    return GenerateRequest(
        "r", "m", (1,), SamplingParams(), 1, 0.0, tenant=tenant, affinity=affinity
    )


def test_a_key_prefers_the_workers_it_used_last_of_either_role():
    steering = Steering()
    assert steering.preferred(request("a")) == frozenset()
    steering.placed(request("a"), Placement(Path.PD, P, D, ""))
    assert steering.preferred(request("a")) == {"p", "d"}
    steering.placed(request("a"), Placement(Path.LOCAL, D2, D2, ""))
    assert steering.preferred(request("a")) == {"p", "d2"}
    steering.placed(request("a"), Placement(Path.PD, P2, D, ""))
    assert steering.preferred(request("a")) == {"p2", "d"}


def test_a_key_is_its_tenants_own():
    steering = Steering()
    steering.placed(request("a"), Placement(Path.PD, P, D, ""))
    assert not steering.preferred(request("a", tenant="other"))
    assert not steering.preferred(request("a", tenant=""))


def test_the_narrowest_key_that_is_known_decides():
    steering = Steering()
    steering.placed(request("session 1", "cache x"), Placement(Path.PD, P, D, ""))
    steering.placed(request("session 2", "cache x"), Placement(Path.PD, P2, D2, ""))
    assert steering.preferred(request("session 1", "cache x")) == {"p", "d"}
    assert steering.preferred(request("session 3", "cache x")) == {"p2", "d2"}


def test_the_key_that_was_used_longest_ago_makes_room():
    steering = Steering(max_keys=2)
    for key in "aba":
        steering.placed(request(key), Placement(Path.PD, P, D, ""))
    steering.placed(request("c"), Placement(Path.PD, P, D, ""))
    assert [bool(steering.preferred(request(key))) for key in "abc"] == [True, False, True]
    steering.placed(request(), Placement(Path.PD, P, D, ""))
    assert not steering.preferred(request())
