"""The whole cluster on virtual time, with faults that are checked to have bitten."""

import os
import subprocess
import sys

import pytest

from core.config import EngineConfig, PlacementConfig
from simulation.cluster import Shape
from simulation.loop import Deadlock, run_virtual
from simulation.smoke import Faults, smoke

TIGHT = EngineConfig(block_size_tokens=4, num_blocks=36, max_step_tokens=16, max_sequences=6)
SHAPES = {
    "roomy": lambda: Shape(),
    "tight": lambda: Shape(engine=TIGHT, max_model_len=130),
    "fast": lambda: Shape(step_s=0.0002, token_s=0.00001, latency_s=(1e-6, 2e-5), placement=PlacementConfig(path="pd")),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_request_ends_once_and_exactly_under_all_faults_together(shape):
    bitten: dict[str, int] = {}
    finished = retries = preemptions = 0
    for seed in range(12):
        faults = Faults(session_resets=3, fetch_resets=2, flips=4, kills=2, cancels=4, preempt_odds=0.05)
        report = smoke(seed, SHAPES[shape](), faults=faults)
        assert report.violations == [], f"seed {seed}"
        for name, count in report.bitten.items():
            bitten[name] = bitten.get(name, 0) + count
        finished += sum(ending == "finished" for ending in report.endings.values())
        retries, preemptions = retries + report.retries, preemptions + report.preemptions
    assert min(bitten.get(name, 0) for name in ("session", "fetch", "flip", "kill", "cancel", "preempt")) > 0, bitten
    assert finished > 200
    assert retries > 0
    assert preemptions > 0


@pytest.mark.parametrize("kind", ["session_resets", "fetch_resets", "flips", "kills", "cancels"])
def test_each_fault_alone(kind):
    bitten = 0
    for seed in range(100, 106):
        report = smoke(seed, Shape(), faults=Faults(**{kind: 3}))
        assert report.violations == [], f"seed {seed}"
        bitten += sum(count for name, count in report.bitten.items() if name != "preempt")
    assert bitten > 0


def test_without_faults_nothing_is_retried():
    report = smoke(5, Shape(), faults=Faults())
    assert report.violations == []
    assert report.retries == 0
    assert set(report.endings.values()) == {"finished"}
    assert report.paths["pd"] > 0 and report.paths["local"] > 0


def test_frames_of_a_new_sub_attempt_never_overtake_its_restart():
    """Found by chance on real time, then by this: a frame left before the Restart that announced it."""
    for seed in range(6):
        report = smoke(seed, SHAPES["fast"](), faults=Faults(preempt_odds=0.3))
        assert report.violations == [], f"seed {seed}"
        assert report.bitten["preempt"] > 0


def test_a_seed_replays_to_the_same_run():
    faults = Faults(session_resets=3, fetch_resets=2, flips=4, kills=2, cancels=4, preempt_odds=0.05)
    first, second = (smoke(17, SHAPES["tight"](), faults=faults) for _ in range(2))
    assert first == second


def test_a_seed_replays_in_another_process_with_another_hash_seed():
    code = (
        "from simulation.smoke import smoke, Faults; r = smoke(3, faults=Faults(session_resets=3, kills=2, cancels=4));"
        "print(r.steps, r.virtual_s, sorted(r.endings.items()), sorted(r.tokens.items()))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1")
    ]
    assert runs[0] == runs[1]
    assert runs[0]


def test_simulation_needs_no_torch_grpc_or_ray():
    code = (
        "import sys, simulation.smoke; left = {'torch', 'grpc', 'ray', 'redis', 'fastapi', 'numpy'} & set(sys.modules);"
        "sys.exit(str(left) if left else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wait_without_a_wake_up_is_a_deadlock_not_a_hang():
    import asyncio

    async def forever():
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        run_virtual(forever())
