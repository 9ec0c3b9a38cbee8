"""The parts of this benchmark, in the order in which they run.

Owns the list. Does not know options or output.
"""

from types import ModuleType
from typing import NamedTuple

from benchmarks.tiers import attacks, burst, fairness, preemption, quota


class Part(NamedTuple):
    """`module.measure(step, seconds)` returns its result, `module.lines(result)` its table."""

    module: ModuleType
    num_steps: int


PARTS = {
    "fairness": Part(fairness, 3),
    "quota": Part(quota, 1 + len(quota.SCENARIOS)),
    "preemption": Part(preemption, 3),
    "burst": Part(burst, 1 + len(burst.PHASES)),
    "attacks": Part(attacks, 6),
}
