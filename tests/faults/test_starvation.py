"""Four busy loops on the machine's cores: slow is not dead, nobody fails over."""

import subprocess
import sys

import pytest
from support.rig import Rig, config_of, is_long, note

SECONDS = 300 if is_long() else 12


@pytest.mark.timeout(600)
async def test_starved_processes_are_not_taken_for_dead():
    async with Rig(config_of()) as rig:
        rig.make_requests(16, max_tokens=40)
        await rig.learn()
        hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
        try:
            await rig.load(SECONDS, 8)
            assert all(hog.poll() is None for hog in hogs)
        finally:
            for hog in hogs:
                hog.kill()
                hog.wait()
        verdict = rig.verdict()
        assert verdict["wrong"] == [] and verdict["affected"] == 0, verdict
        assert verdict["requests"] > 10
        note("starvation", {"seconds": SECONDS, **verdict})
