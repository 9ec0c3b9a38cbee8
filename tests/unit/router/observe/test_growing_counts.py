"""Sums over workers' counts: nothing is added twice, and the memory is bounded."""

from types import SimpleNamespace

from router.observe import growing_counts
from router.observe.growing_counts import GrowingCounts


def life(name, incarnation=1):
    return SimpleNamespace(descriptor=SimpleNamespace(worker_id=name, incarnation=incarnation))


def test_a_worker_adds_what_it_has_counted_since_its_last_report_and_another_life_all_of_it():
    counts = GrowingCounts()
    for worker, number, total in (
        (life("a"), 5, 5),
        (life("a"), 5, 5),
        (life("b"), 2, 7),
        (life("a"), 0, 7),
        (life("a"), 6, 8),
        (life("a", 2), 1, 9),
        (life("a"), 6, 9),
    ):
        counts.note(worker, {"x": number})
        assert counts.sums == {"x": total}


def test_the_lives_that_were_seen_last_are_remembered(monkeypatch):
    monkeypatch.setattr(growing_counts, "MAX_LIVES", 2)
    counts = GrowingCounts()
    for name in ("a", "b", "a", "c", "a"):
        counts.note(life(name), {"x": 1})
    assert counts.sums == {"x": 3}
    counts.note(life("b"), {"x": 1})
    assert counts.sums == {"x": 4}
