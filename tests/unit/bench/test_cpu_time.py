"""CPU time of other processes, from a `/proc` made by hand and from the real one."""

import os

import pytest

from bench.cpu_time import cpu_s
from core.errors import ConfigError, WorkerLost

TICKS = os.sysconf("SC_CLK_TCK")


def add_process(proc, pid, ticks, children=()):
    """A process of two threads; the second one started the children."""
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    fields = ["S", *["0"] * 10, str(ticks - 1), "1", "5000", "5000"]
    (folder / "stat").write_text(f"{pid} (a (b) c) {' '.join(fields)}\n")
    for thread, own in ((pid, ()), (pid + 1, children)):
        (folder / "task" / str(thread)).mkdir(parents=True)
        text = "".join(f"{child} " for child in own)
        (folder / "task" / str(thread) / "children").write_text(text)


def test_a_process_and_its_descendants_count_and_one_that_ends_meanwhile_does_not(tmp_path):
    add_process(tmp_path, 10, 3 * TICKS, (20, 30, 40))
    add_process(tmp_path, 20, TICKS, (50,))
    add_process(tmp_path, 30, 2 * TICKS)
    add_process(tmp_path, 50, 4 * TICKS)
    add_process(tmp_path, 60, 99 * TICKS)
    assert cpu_s(10, tmp_path) == (3.0, 7.0)


def test_a_process_that_has_ended_and_another_system_are_told_apart(tmp_path):
    with pytest.raises(WorkerLost, match="process 10 has ended"):
        cpu_s(10, tmp_path)
    with pytest.raises(ConfigError, match="Linux"):
        cpu_s(10, tmp_path / "none")


def test_this_process_has_used_some():
    own_s, _ = cpu_s(os.getpid())
    assert 0 < own_s <= sum(os.times()[:2]) + 1
