"""Clusters that `baton up` starts, as a user starts them."""

import pytest
from support.up import Up, wait_gone


@pytest.fixture()
def start():
    """Start clusters; whatever a test leaves running is killed after it."""
    started = []

    def make(*arguments, **settings):
        started.append(Up.__new__(Up))
        started[-1].__init__(*arguments, **settings)
        return started[-1]

    yield make
    for up in started:
        if up.process.poll() is None:
            up.process.kill()
            up.process.wait()
            up.reader.join(timeout=10)
            up.process.stdout.close()
        wait_gone(up.before)


@pytest.fixture(scope="session")
def local():
    """One cluster of child processes, path pd forced, for all tests that leave it whole."""
    up = Up("--local", BATON_PLACEMENT__PATH="pd")
    yield up
    code, left = up.end()
    assert code == 0 and not left
