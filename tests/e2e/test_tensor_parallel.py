"""Models split over ranks in a whole cluster, on Ray and locally:
the same answers, ranks that come back."""

import os
import signal
import subprocess
import time

import pytest
from support.samples import sample
from support.up import BATON, ROOT, our_processes

from cluster.ray.ranks import bundles, check_fit
from core.config import PoolConfig
from core.errors import ConfigError

BODY = {"prompt": "def main(argv):\n    ", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


def settings(prefill, decode):
    return {
        "BATON_POOLS__PREFILL__ENGINE__TENSOR_PARALLEL_SIZE": str(prefill),
        "BATON_POOLS__DECODE__ENGINE__TENSOR_PARALLEL_SIZE": str(decode),
        "BATON_PLACEMENT__PATH": "pd",
    }


def ranks_of(up, role):
    return next(
        (r["rank_pids"] for r in up.status() if r["role"] == role and r["state"] == "live"), []
    )


def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])


@pytest.mark.sampled(3)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("where", sample(["ray", "--local"], 1))
def test_a_split_model_answers_like_a_whole_one_and_its_ranks_come_back(where, start, local):
    arguments = [where] if where != "ray" else []
    expected = local.complete(**BODY).json()["choices"][0]["text"]
    up = start(*arguments, **settings(1, 2))
    assert up.complete(**BODY).json()["choices"][0]["text"] == expected
    decode = next(r for r in up.status() if r["role"] == "decode")
    pids = decode["rank_pids"]
    assert len(set(pids)) == 2 and len(ranks_of(up, "prefill")) == 1
    parents = {parent(pid) for pid in pids}
    # On Ray each rank is the child of an actor of its own, which holds its resources; locally of
    # the worker.
    assert (
        (len(parents) == 2 and decode["pid"] not in parents)
        if where == "ray"
        else parents == {decode["pid"]}
    )
    os.kill(pids[1], signal.SIGKILL)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        now = ranks_of(up, "decode")
        if len(now) == 2 and not set(now) & set(pids) and up.complete(**BODY).status_code == 200:
            break
        time.sleep(0.2)
    assert not set(pids) & our_processes(), "the killed rank's sibling outlived it"
    assert up.complete(**BODY).json()["choices"][0]["text"] == expected
    assert up.end() == (0, set())


def test_a_size_that_does_not_divide_is_refused_before_anything_starts():
    environment = {**os.environ, **settings(1, 3)}
    done = subprocess.run(
        [*BATON, "up", "--local"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=60,
    )
    assert done.returncode != 0 and "possible: [1, 2, 4, 8]" in " ".join(
        (done.stdout + done.stderr).split()
    )


def test_a_worker_that_fits_no_node_is_refused_with_what_the_best_node_has():
    pool = PoolConfig(engine={"tensor_parallel_size": 4}, num_cpus=1, rank_num_cpus=2)
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    with pytest.raises(
        ConfigError, match="4 ranks needs 9 CPUs and 0 GPUs on one node; the largest nodes have 8"
    ):
        check_fit("pools.decode", pool, nodes)
    check_fit("pools.decode", pool, [{"Alive": True, "Resources": {"CPU": 9.0}}])
    assert bundles(pool) == [{"CPU": 1.0}] + [{"CPU": 2.0}] * 4
