"""What mutation testing changes: each operator, on lines as ours are;
and that its lists fit the tree."""

import random

import pytest
from mutants.equivalents import EQUIVALENTS, TUNED, tuned
from mutants.operators import compiles, mutants_of
from mutants.plan import MODULES, given, sample, stages_of
from planted.bugs import BUGS
from support.tree import ROOT

HEADER = "async def f():\n for _ in z:\n  "
CASES = {
    "if a < b: x = 'c'": {
        "if (a <= b): x = 'c'",
        "if (a >= b): x = 'c'",
        "if not (a < b): x = 'c'",
    },
    "x = a and b": {"x = (a or b)", "x = (a)", "x = (b)"},
    "x = not a": {"x = (a)"},
    "x = a + 2": {"x = (a - 2)", "x = a + 3", "x = a + 1"},
    "x = 'a' + b": set(),
    "x = -1.5": {"x = -2.5", "x = -0.5"},
    "x = -a": {"x = (a)"},
    "x: int = True": {"x: int = False"},
    "self.x = f(a, b)": {"pass", "self.x = f(b, a)"},
    "x += y": {"pass", "x -= y"},
    "await f()": {"pass"},
    "raise E(f'{a} of {b + 1}')": {"pass"},
    "return f(x)": {"return None"},
    "return False": {"return True"},
    "return": {"pass"},
    "continue": {"break"},
    "x = min(y)": {"x = max(y)"},
    "x = max(a, b, c)": {"x = min(a, b, c)"},
    "x = min(a, b, key=c)": {"x = max(a, b, key=c)", "x = min(b, a, key=c)"},
    "with contextlib.suppress(A, B): f()": {"with contextlib.suppress(A, B): pass"},
    "x = [y for y in z if y]": {"x = [y for y in z]"},
    "x = a if b else c": {"x = (a if not b else c)"},
    "x = a is not b": {"x = (a is b)"},
    "x = a < b != c": {"x = (a <= b != c)", "x = (a >= b != c)", "x = (a < b == c)"},
    "x = (a or b) == c": {
        "x = ((a or b) != c)",
        "x = ((a and b)) == c",
        "x = ((a)) == c",
        "x = ((b)) == c",
    },
    "if TYPE_CHECKING: f()": set(),
    "log.info('%d', n + 1)": set(),
    "del self.x": {"pass"},
}


@pytest.mark.parametrize("line", CASES)
def test_a_line_is_changed_in_every_way_it_should_and_no_other(line):
    source = f"{HEADER}{line}\n"
    changed = {
        m.applied(source).removeprefix(HEADER).rstrip("\n")
        for m in mutants_of("x.py", source)
        if m.line == 3
    }
    assert changed == CASES[line]


def test_a_procedure_returns_at_once_and_a_docstring_stays():
    source = 'def f():\n    """Do."""\n    a = 1\n    b(a)\n'
    assert 'def f():\n    """Do."""\n    return\n    b(a)\n' in {
        m.applied(source) for m in mutants_of("x.py", source)
    }
    assert not any(m.line == 2 for m in mutants_of("x.py", source))


def test_a_mutant_is_named_by_whole_lines_and_counts_bytes():
    source = "s = 'ä'; f(\n    1,\n)\n"
    (mutant,) = (m for m in mutants_of("x.py", source) if m.text == "2")
    assert (mutant.before, mutant.after) == ("1,", "2,")
    assert mutant.applied(source) == "s = 'ä'; f(\n    2,\n)\n"


def test_a_sample_is_the_same_for_a_seed_and_every_mutant_of_it_differs_and_compiles():
    modules = random.Random(1).sample(MODULES, 2)
    drawn = sample(modules, 30, 5)
    assert drawn == sample(modules, 30, 5) != sample(modules, 30, 6)
    for mutant in drawn:
        source = (ROOT / mutant.path).read_text()
        assert mutant.applied(source) != source and compiles(mutant.applied(source))


def test_every_module_and_every_test_that_is_named_exists():
    for path in MODULES:
        assert (ROOT / path).exists(), f"{path} is gone: where are its mutants to be drawn now?"
        for stage in stages_of(path, 10, is_far=True):
            for test in (t for t in stage.get("tests", []) if t.startswith("tests/")):
                assert (ROOT / test).exists(), test


def test_every_equivalent_is_still_a_mutant():
    for equivalent in EQUIVALENTS:
        found = mutants_of(equivalent.path, (ROOT / equivalent.path).read_text())
        assert equivalent.key in {m.key for m in found}, equivalent
        assert equivalent.reason


def test_every_tuned_number_is_still_one_and_its_shifts_and_factors_are_mutants():
    """What makes a bound another by a factor is no choice that is as good."""
    for path, names in TUNED.items():
        for name in names.split():
            assert list(tuned(path, name)), f"{name} of {path} is gone"
    operators = {m.operator for m in mutants_of("x.py", "MOST = 256 << 10")}
    assert operators == {"constant", "arithmetic"}


def test_a_planted_bug_is_a_mutant_of_the_same_text():
    for bug, mutant in zip(BUGS, given(BUGS), strict=True):
        source = (ROOT / bug.path).read_text()
        assert mutant.applied(source) == source.replace(bug.old, bug.new, 1)
