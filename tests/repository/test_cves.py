"""docs/cves.md names tests that exist, sources for every id,
and the versions that the code asks for."""

import re
from pathlib import Path

from cluster.redis.binary import LOWEST_SAFE

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "cves.md").read_text()
ROWS = [line for line in TEXT.splitlines() if re.match(r"\| \d+ \|", line)]


def test_every_class_has_a_source_and_a_test_or_a_reason():
    assert len(ROWS) >= 15
    for row in ROWS:
        _, number, ids, what, here, _ = (cell.strip() for cell in row.split("|"))
        linked = set(re.findall(r"CVE-\d{4}-\d+", " ".join(re.findall(r"\[([^]]+)\]\(https", ids))))
        assert linked == set(re.findall(r"CVE-\d{4}-\d+", re.sub(r"\(https[^)]*\)", "", ids))), (
            number
        )
        assert linked, number
        assert what, number
        assert "::" in here or here.startswith("cannot apply"), number


def test_the_tests_that_are_named_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 20
    for path, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.M), (path, name)


def test_the_lowest_releases_are_those_of_the_code():
    table = TEXT.partition("## Redis and Valkey")[2]
    for product, lines in LOWEST_SAFE.items():
        rows = re.findall(rf"^\| {product} \| ([\d., ]+) \|", table, re.M)
        found = {tuple(map(int, v.split("."))) for row in rows for v in row.split(", ")}
        assert found == {(*line, patch) for line, patch in lines.items()}
