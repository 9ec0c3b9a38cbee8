"""The whole cluster on virtual time under every fault, and proof that the search itself can see."""

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kv_transfer.transitions import Transition
from simulation.faults.injector import INFLICT
from simulation.faults.kinds import ODDS, Fault, Kind, Part, Where
from simulation.faults.wire import FAULTS as OF_THE_WIRE
from simulation.invariants import Watch
from simulation.loads import make_plan
from simulation.plan import Style
from simulation.search import Summary, as_line, chosen, replay_line, search, shrink
from simulation.trial import run_trial
from worker.attempt import Attempt

ROOT = Path(__file__).parents[2]
SEEDS = 500
METERED_SEEDS = [s for s in range(40) if any(r.key for r in make_plan(s).requests)][:3]
"""Whose keys have limits."""
REFUSED = ("QueueFull", "QueueTimeout", "TooLate")
"""How requests end for which there is no room."""


@pytest.mark.timeout(1500)
def test_no_invariant_is_violated_in_500_seeds_and_every_fault_and_transition_is_met():
    summary = Summary(0)
    asyncio.run(search(summary, SEEDS, os.cpu_count()))
    assert summary.violations == []
    found = summary.as_dict()
    assert found["seeds"] == SEEDS
    assert found["faults_never_met"] == []
    assert found["transitions_never_met"] == []
    assert min(found["styles"].values()) > SEEDS / 20
    assert found["fewest_faults_in_a_seed"] >= 5
    assert found["requests"] >= 20 * SEEDS
    ended = Counter(found["endings"])
    del ended["over_quota"]  # as it should be
    assert ended["finished"] + ended["injected"] > 0.97 * sum(ended.values())
    above = found["endings_above_capacity"]
    assert above["finished"] > sum(above.get(name, 0) for name in REFUSED) > 0
    assert found["fault_attempts"] > SEEDS
    assert found["preemptions"] > SEEDS
    assert found["prompts_scored"] > SEEDS
    assert found["prefix_hits"] > 0.2 * found["requests"]
    assert found["placements_led_by_the_index"] > found["prefix_hits"] / 2
    assert found["charges"] > found["refused_over_quota"] > SEEDS
    assert found["charges_decided_locally"] > SEEDS
    assert found["moves"] > 0
    assert found["client_reconnects"] > 0


@pytest.mark.parametrize("style", [Style.CALM, Style.ALONE])
def test_without_faults_nothing_is_retried_moved_or_lost(style):
    for seed in range(5):
        report = run_trial(make_plan(seed, num_faults=0, style=style))
        assert report.violations == [], seed
        assert set(report.endings) <= {"finished", "over_quota"}, seed
        assert (report.retries, report.moves, report.reconnects) == (0, 0, 0)
        assert report.bitten.total() == 0


@pytest.mark.parametrize("style", [Style.ADMISSION, Style.POOL, Style.GIANTS])
def test_without_faults_a_load_above_capacity_is_served_or_refused(style):
    endings = Counter()
    for seed in range(3):
        report = run_trial(make_plan(seed, num_faults=0, style=style))
        assert report.violations == [], seed
        endings += report.endings
    is_refusing = style is Style.ADMISSION
    del endings["over_quota"]
    assert set(endings) <= {"finished", *REFUSED, "DeadlineExceeded", "PoolExhausted"}
    assert endings["finished"] > (0.2 if is_refusing else 0.95) * endings.total()
    assert (sum(endings[name] for name in REFUSED) > 0) == is_refusing


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [k for k in Kind if k not in (Kind.CANCEL, Kind.SLOW_READER)])
def test_each_fault_alone_bites_and_loses_nothing(kind):
    bitten = 0
    is_of_quotas = ODDS[kind].part is Part.QUOTAS  # those need keys with limits
    seeds = METERED_SEEDS if is_of_quotas else range(4)
    for seed in seeds:
        report = run_trial(alone(kind, make_plan(seed, num_faults=0, style=Style.CALM)))
        assert [v for v in report.violations if not v.startswith("H1")] == [], seed
        served = report.endings["finished"] + report.endings["injected"]
        assert served + report.endings["over_quota"] == report.requests
        assert report.endings["injected"] <= report.bitten[kind]
        if kind is Kind.SLOW_STEP:  # it makes progress: nobody is taken for dead
            assert not [line for line in report.decisions if "worker_lost" in line]
        bitten += report.bitten[kind]
    assert bitten > 0


def test_each_fault_is_carried_out_where_it_happens_and_nowhere_else():
    places = {Where.CLUSTER: set(INFLICT), Where.WIRE: set(OF_THE_WIRE)}
    for where, kinds in places.items():
        assert kinds == {kind for kind in Kind if ODDS[kind].where is where}


def alone(kind, plan):
    """A plan with three faults of one kind and no other."""
    low, high = ODDS[kind].lasts_s
    faults = tuple(
        Fault(kind, 0.3 + 0.9 * i, 0.3 * i + 0.1, low + (high - low) * 0.4) for i in range(3)
    )
    requests = list(plan.requests)
    if ODDS[kind].where is Where.CLIENT:
        requests[:3] = [replace(planned, raises=kind) for planned in requests[:3]]
    return replace(plan, faults=faults, requests=tuple(requests))


def test_a_seed_replays_to_the_same_run():
    first, second = (run_trial(make_plan(17)) for _ in range(2))
    assert first == second and first.decisions


def test_a_search_does_not_show_the_faults_that_it_injects():
    command = [sys.executable, "-m", "simulation.search", "0", "1", "1"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["seed"] == 0 and not done.stderr


INTERRUPTED = """
import os, signal
from cli.main import app
from simulation.search import Summary

add = Summary.add

def add_and_interrupt(summary, line):
    add(summary, line)
    if summary.seeds == 3:
        os.killpg(0, signal.SIGINT)  # as a terminal does: the whole group hears it

Summary.add = add_and_interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
app()
"""


@pytest.mark.parametrize("output", ["table", "json"])
def test_ctrl_c_ends_a_search_with_what_was_run(output):
    command = [sys.executable, "-c", INTERRUPTED, "simulate", "faults", "--seeds", "100000"]
    done = subprocess.run(
        [*command, "-o", output],
        cwd=ROOT,
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (130, "")
    if output == "table":
        assert re.search(r"interrupted after [3-9] of 100000 seeds", done.stdout)
        assert "never reached, so not proved by these seeds:" in " ".join(done.stdout.split())
        assert "no violation" in done.stdout
    else:
        found = json.loads(done.stdout)
        assert 3 <= found["seeds"] < 10 and found["seeds_wanted"] == 100_000
        assert found["is_interrupted"] and found["requests"] > 0
        assert found["violations"] == found["replay"] == []


def test_a_seed_replays_in_another_process_with_another_hash_seed():
    def lines(hash_seed):
        command = [sys.executable, "-m", "simulation.search", "3", "5", "1"]
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=env, capture_output=True, check=True, cwd=ROOT).stdout

    assert (
        lines("1")
        == lines("2")
        == b"".join(
            json.dumps(as_line(s, run_trial(make_plan(s)))).encode() + b"\n" for s in (3, 4)
        )
    )


@pytest.mark.sampled(3)
@pytest.mark.timeout(600)
def test_a_planted_bug_is_found_and_shrunk_to_a_line_that_shows_it_again(monkeypatch):
    """After a reconnect the worker forgets to send again what was lost with the stream."""
    monkeypatch.setattr(Attempt, "rewind", lambda self, wanted: None)
    seed = next(s for s in range(60) if run_trial(make_plan(s)).violations)
    plan, (faults, requests) = make_plan(seed), shrink(seed)
    assert len(faults) < len(plan.faults) and len(requests) < len(plan.requests)
    assert any(not v.startswith("H1") for v in run_trial(chosen(plan, faults, requests)).violations)
    line = replay_line(seed, faults, requests)
    assert line.startswith(f"baton simulate faults --seed {seed} --only-faults ")


def test_a_summary_adds_up():
    summary = Summary(3)
    for seed in (3, 4):
        summary.add(as_line(seed, run_trial(make_plan(seed))))
    found = summary.as_dict()
    plans = [make_plan(seed) for seed in (3, 4)]
    ended = sum(found["endings"].values()) + sum(found["endings_above_capacity"].values())
    assert found["seeds"] == 2 == sum(found["styles"].values())
    assert ended == found["requests"] == sum(len(plan.requests) for plan in plans)
    assert set(found["transitions"]) == {t.value for t in Transition}


def test_simulation_loads_nothing_that_touches_the_world():
    code = (
        "import sys, simulation.search;"
        "left = {'torch', 'grpc', 'ray', 'redis', 'fastapi'} & set(sys.modules);"
        "sys.exit(str(left) if left else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- lint: what would make a run depend on anything but its seed ----------------------------------

SIMULATED = [
    "core",
    "engine",
    "kv_transfer",
    "worker",
    "prefill_worker",
    "decode_worker",
    "router",
    "prefix_index",
]
OUTSIDE = (
    # adapters and processes that a simulation replaces by its own side of a port
    "core/addresses.py",
    "core/config/",
    "core/clocks.py",
    "core/ids.py",
    "core/logs.py",
    "core/certificate_files.py",
    "engine/model/collectives.py",
    "engine/ranks/rank.py",
    "engine/ranks/rank_group.py",
    "engine/ranks/shared_group.py",
    "engine/ranks/shared_kv.py",
    "kv_transfer/agent_thread.py",
    "kv_transfer/copying.py",
    "kv_transfer/sidecar/",
    "kv_transfer/transports/shared_memory.py",
    "router/access/",
    "router/child_pool.py",
    "router/descriptors.py",
    "router/grpc/",
    "router/http/",
    "router/observe/request_log.py",
    "router/reply_thread.py",
    "router/text/chat_template.py",
    "router/text/tokenizer_child.py",
    "router/text/tokenizing.py",
)
FORBIDDEN = {
    "time",
    "threading",
    "random",
    "subprocess",
    "socket",
    "secrets",
    "uuid",
    "concurrent",
    "multiprocessing",
    "datetime",
}


def simulated_files():
    for package in SIMULATED:
        for path in sorted((ROOT / package).rglob("*.py")):
            if not path.relative_to(ROOT).as_posix().startswith(OUTSIDE):
                yield path


def faults_of(tree):
    """Wall clocks, threads, unseeded randomness,
    waits of unordered completion, iteration over sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            yield from (f"imports {n}" for n in names if n.split(".")[0] in FORBIDDEN)
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "asyncio"
        ):
            if node.attr in {"wait", "as_completed", "to_thread"}:
                yield f"uses asyncio.{node.attr}"
        if isinstance(node, ast.For | ast.comprehension) and is_set(node.iter):
            yield "iterates over a set"


def is_set(node):
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"set", "frozenset"}
    )


def test_lint_keeps_clocks_threads_and_unordered_iteration_out_of_simulated_code():
    found = {
        str(p.relative_to(ROOT)): list(faults_of(ast.parse(p.read_text())))
        for p in simulated_files()
    }
    assert {path: faults for path, faults in found.items() if faults} == {}
    assert len(found) > 40


@pytest.mark.parametrize(
    "code",
    [
        "import time",
        "from threading import Lock",
        "for x in set(y): pass",
        "[x for x in {1, 2}]",
        "asyncio.wait(x)",
    ],
)
def test_the_lint_can_see(code):
    assert list(faults_of(ast.parse(code)))


def test_a_watch_that_breaks_is_no_clean_trial(monkeypatch):
    def breaks(self):
        raise RuntimeError("the watch itself is broken")

    monkeypatch.setattr(Watch, "_check_bounds", breaks)
    with pytest.raises(RuntimeError, match="itself is broken"):
        run_trial(make_plan(3))
