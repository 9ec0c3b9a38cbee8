"""The `Membership` port: what it lists, and that whoever watches hears of every change."""

import pytest

from cluster.members import PushedMembership
from core.session import Role, WorkerDescriptor
from simulation.ports import StaticMembership

FIRST, SECOND = (
    WorkerDescriptor(name, role, 1, "a", "b", "m", "digest", 16, 100, 2048)
    for name, role in (("d1", Role.DECODE), ("p1", Role.PREFILL))
)


class Pushed:
    """The list of a real cluster, replaced as a whole."""

    def __init__(self):
        self.port = PushedMembership()

    def set(self, members, *, is_starting=False):
        self.port.update(members, is_starting=is_starting)


class Simulated:
    """The list of a simulation, edited member by member."""

    def __init__(self):
        self.port = StaticMembership()

    def set(self, members, *, is_starting=False):
        self.port.starting = int(is_starting)
        for gone in {m.worker_id for m in self.port.members()} - {m.worker_id for m in members}:
            self.port.leave(gone)
        for member in members:
            if member not in self.port.members():
                self.port.join(member)


@pytest.fixture(params=[Pushed, Simulated])
def membership(request):
    return request.param()


def test_the_list_is_what_was_set_last_and_every_change_is_heard_of(membership):
    heard = []
    membership.port.watch(lambda: heard.append(set(membership.port.members())))
    membership.set([FIRST])
    assert heard == [{FIRST}]
    membership.set([FIRST, SECOND])
    membership.set([FIRST, SECOND])
    assert heard == [{FIRST}, {FIRST, SECOND}]
    membership.set([SECOND])
    assert heard[-1] == {SECOND} == set(membership.port.members())


def test_everybody_who_watches_hears(membership):
    heard = []
    membership.port.watch(lambda: heard.append(1))
    membership.port.watch(lambda: heard.append(2))
    membership.set([FIRST])
    assert sorted(heard) == [1, 2]


def test_it_says_whether_more_workers_are_expected(membership):
    membership.set([FIRST], is_starting=True)
    assert membership.port.is_starting()
    membership.set([FIRST])
    assert not membership.port.is_starting()
