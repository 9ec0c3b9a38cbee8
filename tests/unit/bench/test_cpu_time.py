"""CPU time of other processes, from a `/proc` made by hand and from the real one."""

import os
import subprocess
import sys

import pytest

from bench.cpu_time import cpu_s
from core.errors import ConfigError, WorkerLost

TICKS = os.sysconf("SC_CLK_TCK")
USE_CPU = """
import time
while time.process_time() < 0.1: pass
print(time.process_time(), flush=True)
input()
"""


@pytest.fixture
def proc(tmp_path):
    """A `/proc` without a process."""
    for name in ("self", "sys"):
        (tmp_path / name).mkdir()
    return tmp_path


def add_process(proc, pid, parent, seconds):
    folder = proc / str(pid)
    folder.mkdir()
    fields = ["S", str(parent), *["0"] * 9, str(seconds * TICKS - 1), "1", "5000", "5000"]
    (folder / "stat").write_text(f"{pid} (a (b) c) {' '.join(fields)}\n")


def test_a_process_and_its_descendants_count_and_one_that_ends_meanwhile_does_not(proc):
    add_process(proc, 10, parent=1, seconds=3)
    add_process(proc, 20, parent=10, seconds=1)
    add_process(proc, 30, parent=10, seconds=2)
    add_process(proc, 5, parent=20, seconds=4)
    add_process(proc, 60, parent=1, seconds=99)
    (proc / "40").mkdir()
    assert cpu_s(10, proc) == (3.0, 7.0)


def test_a_process_that_has_ended_and_another_system_are_told_apart(proc, tmp_path):
    with pytest.raises(WorkerLost, match="process 10 has ended"):
        cpu_s(10, proc)
    with pytest.raises(ConfigError, match="Linux"):
        cpu_s(10, tmp_path / "none")
    (proc / "self").rmdir()
    with pytest.raises(ConfigError, match="Linux"):
        cpu_s(10, proc)


def test_a_real_child_counts_for_its_parent():
    own_s, before_s = cpu_s(os.getpid())
    command = [sys.executable, "-c", USE_CPU]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        used_s = float(child.stdout.readline())
        after_s = cpu_s(os.getpid())[1]
    assert 0 < own_s <= sum(os.times()[:2]) + 2 / TICKS
    assert after_s - before_s >= used_s - 2 / TICKS, "ticks are whole ones"
