"""The slowest tests: each has its day."""

from support.samples import is_due


def test_each_is_due_on_one_of_so_many_days_and_about_as_many_on_each():
    names = [f"tests/a.py::test_{index}" for index in range(1000)]
    for every_days in (1, 2, 3):
        days = [{n for n in names if is_due(n, every_days, day)} for day in range(every_days)]
        assert set().union(*days) == set(names)
        assert sum(map(len, days)) == len(names)
        assert min(map(len, days)) > 0.8 * len(names) / every_days
