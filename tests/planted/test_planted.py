"""The suite is tested by bugs: each is planted in a copy of the tree,
and what should catch it must.

A sample in `make test`, all of them in `make test-long`.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from support.process_cluster import is_long, note
from support.samples import sample
from support.tree import ROOT, copy_tree

from planted.bugs import BUGS, UNCAUGHT

SAMPLE = sample(BUGS, 3)
TIMEOUT_S = 280
caught: dict[str, str] = {}


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    """A copy of the tree, to be damaged and mended."""
    folder = tmp_path_factory.mktemp("tree")
    copy_tree(folder)
    yield folder
    note(
        "planted",
        {
            "planted": len(BUGS) + len(UNCAUGHT),
            "caught": len(caught),
            "by": caught,
            "uncaught": UNCAUGHT,
        },
    )


def run(folder, by):
    """Run what should catch a bug; True if it did."""
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    if not by.startswith("seeds "):
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", by]
        done = subprocess.run(
            command,
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
        return done.returncode == 1
    first, end = by.removeprefix("seeds ").split("-")
    command = [sys.executable, "-m", "simulation.search", first, end, "1"]
    child = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        for line in child.stdout:
            if any(not v.startswith("H1") for v in json.loads(line)["violations"]):
                return True
        return child.wait() != 0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bug", BUGS if is_long() else SAMPLE, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(copy, bug):
    path = copy / bug.path
    whole = path.read_text()
    assert whole.count(bug.old) >= 1, "the bug no longer fits the code; plant it anew"
    path.write_text(whole.replace(bug.old, bug.new, 1))
    try:
        assert run(copy, bug.by), f"nobody noticed: {bug.name} (should be caught by {bug.by})"
        caught[bug.name] = bug.by
    finally:
        path.write_text(whole)


def test_every_bug_fits_the_code_as_it_is():
    for bug in BUGS:
        assert bug.old in (ROOT / bug.path).read_text(), bug.name
    assert len(BUGS) >= 30


def test_a_planted_bug_is_code_that_knows_its_names(tmp_path):
    """A name that is gone is caught by any test, and shows nothing of the bug."""
    planted = [bug for bug in BUGS if bug.path.endswith(".py")]
    for number, bug in enumerate(planted):
        whole = (ROOT / bug.path).read_text()
        (tmp_path / f"{number}.py").write_text(whole.replace(bug.old, bug.new, 1))
    command = [
        sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821",
        "--output-format", "concise", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wrong = {planted[int(n)].name for n in re.findall(r"(\d+)\.py:\d+:", done.stdout)}
    assert done.returncode == 0, (wrong, done.stdout[-2000:], done.stderr[-2000:])
