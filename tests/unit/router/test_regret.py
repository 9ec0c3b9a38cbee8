"""What a placement took, beside what was predicted of it and of the others."""

from dataclasses import replace

import pytest

from core.session import Role, WorkerDescriptor
from core.types import Path
from router.cost import Cost
from router.observe.why import why_of
from router.placement import Placement
from router.regret import MeasuredCost, regret_of


def worker(name, role):
    return WorkerDescriptor(name, role, 1, "a", "b", "m", "digest", 16, 100, 2048)


def cost(name, prefill_s, transfer_s=0.0):
    """A prediction of so many seconds, weighed as if it were the dearest of all."""
    return Cost(name, 0, 100, 0, prefill_s, transfer_s, 0.0, weighed_s=99.0)


P1, P2, D = worker("p1", Role.PREFILL), worker("p2", Role.PREFILL), worker("d", Role.DECODE)
ACROSS = (cost("p1", 0.30, 0.05), cost("p2", 0.25, 0.20))
ALONE = (cost("d", 0.50), cost("e", 0.42))
MEASURED = MeasuredCost(queue_s=0.125, prefill_s=0.25, transfer_s=0.025, fetch_s=0.0625)


@pytest.mark.parametrize(
    ("path", "sender", "costs", "error_s", "best", "regret_s"),
    [
        (Path.PD, P1, (ACROSS, ALONE), 0.05, (Path.LOCAL, "e"), -0.02),
        (Path.PD, P2, (ACROSS, ALONE), -0.05, (Path.PD, "p1"), 0.05),
        (Path.LOCAL, D, (ACROSS, ALONE), -0.10, (Path.PD, "p1"), 0.05),
        (Path.PD, P1, (ACROSS[:1], ()), 0.05, None, None),
        (Path.LOCAL, D, ((), ALONE), -0.10, (Path.LOCAL, "e"), -0.02),
    ],
    ids=["faster than all", "the other sender", "the other path", "no other", "another alone"],
)
def test_regret_is_against_the_best_candidate_that_was_not_chosen(
    path, sender, costs, error_s, best, regret_s
):
    """0.4 s were measured."""
    across, alone = costs
    placement = Placement(path, sender, D, "", prefill_costs=across, local_costs=alone)
    found = regret_of(placement, MEASURED)
    assert found.error_s == pytest.approx(error_s)
    other = found.best_other
    assert (other and (other[0], other[1].worker_id)) == best
    assert found.regret_s == (None if regret_s is None else pytest.approx(regret_s))


def test_a_worker_is_a_candidate_of_its_own_on_each_path():
    """One that decodes and computes: chosen for one path, it is another candidate for the other."""
    placement = Placement(Path.LOCAL, D, D, "", prefill_costs=(cost("d", 0.2),), local_costs=ALONE)
    found = regret_of(placement, MEASURED)
    assert found.predicted_s == 0.5 and found.best_other[0] is Path.PD


def test_without_the_prediction_of_the_chosen_one_nothing_is_compared():
    placement = Placement(Path.PD, worker("p9", Role.PREFILL), D, "", prefill_costs=ACROSS)
    assert regret_of(placement, MEASURED) is None


def test_people_see_each_phase_and_whom_it_is_compared_with():
    placement = Placement(Path.PD, P2, D, "", prefill_costs=ACROSS, local_costs=ALONE)
    assert "measured" not in why_of(placement)
    assert why_of(placement, regret_of(placement, MEASURED))["measured"] == {
        "queue_ms": 125.0,
        "fetch_ms": 62.5,
        "prefill_ms": 250.0,
        "transfer_ms": 25.0,
        "total_ms": 400.0,
        "predicted_ms": 450.0,
        "error_ms": -50.0,
        "best_other": {"path": "pd", "worker": "p1", "total_ms": 350.0, "delay_ms": 0.0},
        "regret_ms": 50.0,
    }
    alone = Placement(Path.PD, P1, D, "", prefill_costs=ACROSS[:1])
    shown = why_of(alone, regret_of(alone, MEASURED))["measured"]
    assert "regret_ms" not in shown and "best_other" not in shown


@pytest.mark.parametrize(
    ("path", "sender", "best", "regret_s"),
    [(Path.PD, P1, "p2", -0.05), (Path.LOCAL, D, "p1", 0.35)],
    ids=["others are spared", "others are delayed"],
)
def test_what_others_lose_counts_on_both_sides(path, sender, best, regret_s):
    """Local takes 0.05 s less, and 0.3 s from others."""
    alone = (replace(cost("d", 0.30), delay_s=0.30),)
    placement = Placement(path, sender, D, "", prefill_costs=ACROSS, local_costs=alone)
    found = regret_of(placement, MEASURED)
    assert (found.best_other[1].worker_id, found.error_s) == (
        best,
        pytest.approx(0.4 - (0.35 if path is Path.PD else 0.30)),
    )
    assert found.regret_s == pytest.approx(regret_s)
