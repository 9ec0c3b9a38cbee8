"""Four busy loops on the machine's cores: slow is not dead, nobody fails over."""

import subprocess
import sys

import pytest
from support.process_cluster import is_long, note

SECONDS = 300 if is_long() else 10


@pytest.mark.timeout(600)
@pytest.mark.asyncio(loop_scope="session")
async def test_starved_processes_are_not_taken_for_dead(learned):
    cluster = learned
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        await cluster.load(SECONDS, 8)
        assert all(hog.poll() is None for hog in hogs)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    verdict = cluster.verdict()
    assert verdict["wrong"] == [] and verdict["affected"] == 0, verdict
    assert verdict["requests"] > 10
    note("starvation", {"seconds": SECONDS, **verdict})
