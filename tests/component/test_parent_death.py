"""Programs that die with the process that started them."""

import os
import subprocess
import sys
import time

from process.parent_death import hanging

PARENT = """
import subprocess, sys
from process.parent_death import hanging
child = subprocess.Popen(hanging(["/bin/sleep", "60"]), start_new_session=True)
print(child.pid, flush=True)
sys.stdin.read()
"""


def name_of(pid):
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()


def wait_for(condition, timeout_s=20.0):
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "it did not come"
        time.sleep(0.01)


def test_a_program_dies_with_the_process_that_started_it():
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        wait_for(lambda: name_of(pid) == "sleep")
        parent.kill()
        parent.wait()
        wait_for(lambda: not os.path.exists(f"/proc/{pid}") or _is_zombie(pid))


def _is_zombie(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"


def test_nothing_runs_for_a_parent_that_died_before_the_signal_was_set():
    command = hanging([sys.executable, "-c", "print('ran')"])
    command[3] = str(os.getppid())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    command[3] = str(os.getpid())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ran\n")
