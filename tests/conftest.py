"""Fixtures shared by all suites: nothing may be left behind."""

import gc
import logging
import os
import sys
import threading
import uuid
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ["TEST_RUN"] = uuid.uuid4().hex
"""Every process started from here inherits it: another run on the same machine is not ours."""
# No test asserts a time: by default hypothesis fails an example of more than 200 ms, which a traced
# run, or one beside others, takes now and then.
hypothesis.settings.register_profile("baton", deadline=None)
hypothesis.settings.load_profile("baton")


def _segments() -> int:
    """Shared-memory segments this process has open."""
    from support.descriptors import opened

    return sum("memfd:baton" in name for name in opened())


def _children() -> set[int]:
    """Live child processes that this project spawned."""
    task = Path(f"/proc/{os.getpid()}/task")
    pids: set[int] = set()
    if task.exists():
        for thread in task.iterdir():
            try:
                pids |= {int(p) for p in (thread / "children").read_text().split()}
            except OSError:
                continue
    found = set()
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z" and any(
            word in command
            for word in (
                b"engine.ranks.rank",
                b"cluster.child",
                b"slow_child",
                b"router.text.tokenizer_child",
                b"redis-server",
                b"valkey-server",
            )
        ):
            found.add(pid)
    from support import shared

    return found.difference(*(pids() for pids in shared.children))


def pytest_addoption(parser):
    parser.addoption(
        "--sampled",
        action="store_true",
        help="of the tests that are marked `sampled`, run only those that are due today",
    )


def pytest_collection_modifyitems(config, items):
    """Of the slowest tests, leave out those that are due another day."""
    from support import samples

    if not config.getoption("--sampled"):
        return
    days = {item: mark.args[0] for item in items if (mark := item.get_closest_marker("sampled"))}
    late = [item for item in days if not samples.is_due(item.nodeid, days[item])]
    config.hook.pytest_deselected(items=late)
    items[:] = [item for item in items if item not in late]


def pytest_terminal_summary(terminalreporter):
    """How to repeat this run: which share of the sampled matrices it took."""
    from support import samples

    terminalreporter.write_line(f"samples of this run: SAMPLE={samples.SEED}")


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After every test: no process, segment or asyncio task of ours more than before."""
    before = _children(), _segments()
    yield
    if _segments() > before[1]:
        gc.collect()
    assert _children() <= before[0], "a child process was left behind"
    assert _segments() <= before[1], "a shared-memory segment was left behind"


@pytest.fixture(autouse=True)
def log_as_before():
    """A command that a test runs in this process sets up its log: only until the test's end."""
    from core import events, logs

    levels = [(logger, logger.level) for logger in (logging.getLogger(), events.LOGGER)]
    hooks = sys.excepthook, threading.excepthook
    yield
    if (sys.excepthook, threading.excepthook) == hooks:
        return
    logs.close()
    logging.captureWarnings(capture=False)
    sys.excepthook, threading.excepthook = hooks
    for logger, level in levels:
        logger.setLevel(level)
    for name in (logs.FORMAT_VARIABLE, logs.LEVEL_VARIABLE):
        os.environ.pop(name, None)
