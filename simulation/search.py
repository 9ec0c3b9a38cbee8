"""Many seeds at once: run, add up, shrink what fails, and print how to replay it.

Owns the range of seeds, the child processes that share it, the summary and the shrinking. Does not
know what a trial checks. It starts itself as `python -m simulation.search` in child processes,
which print one JSON line a seed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kv_transfer.transitions import Transition
from simulation.faults.kinds import Kind
from simulation.loads import make_plan
from simulation.plan import Style, TrialPlan
from simulation.report import Report
from simulation.trial import run_trial

LINE_LIMIT_BYTES = 1 << 20
MAX_SHRUNK = 3
COUNTS = (
    "requests",
    "tokens",
    "retries",
    "moves",
    "reconnects",
    "scored",
    "preemptions",
    "hits",
    "led",
    "charges",
    "over_quota",
    "local_charges",
    "spills",
)


@dataclass(slots=True)
class Summary:
    """What a search found; `violations` is empty when every invariant held."""

    first_seed: int
    seeds: int = 0
    virtual_s: float = 0.0
    requests: int = 0
    tokens: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    """Of trials below capacity."""
    overload_endings: Counter[str] = field(default_factory=Counter)
    styles: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    fewest_faults: int | None = None
    """Of all seeds; None before the first."""
    transitions: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    moves: int = 0
    reconnects: int = 0
    scored: int = 0
    preemptions: int = 0
    hits: int = 0
    led: int = 0
    charges: int = 0
    over_quota: int = 0
    local_charges: int = 0
    spills: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        """Count one seed's report."""
        self.seeds += 1
        self.virtual_s += line["virtual_s"]
        self.styles[line["style"]] += 1
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + line[name])
        for name in ("faults", "transitions"):
            getattr(self, name).update(line[name])
        is_overload = Style(line["style"]).is_overload
        (self.overload_endings if is_overload else self.endings).update(line["endings"])
        num_faults = sum(line["faults"].values())
        if self.fewest_faults is None or num_faults < self.fewest_faults:
            self.fewest_faults = num_faults
        self.violations += [f"seed {line['seed']}: {v}" for v in line["violations"]]

    def as_dict(self) -> dict[str, Any]:
        """For `-o json`: hours, sorted counts, and what was never met."""
        return {
            "first_seed": self.first_seed,
            "seeds": self.seeds,
            "styles": {style.value: self.styles[style.value] for style in Style},
            "virtual_hours": round(self.virtual_s / 3600, 2),
            "requests": self.requests,
            "tokens": self.tokens,
            "prompts_scored": self.scored,
            "preemptions": self.preemptions,
            "prefix_hits": self.hits,
            "placements_led_by_the_index": self.led,
            "charges": self.charges,
            "refused_over_quota": self.over_quota,
            "charges_decided_locally": self.local_charges,
            "placements_spilled_over": self.spills,
            "endings": dict(sorted(self.endings.items())),
            "endings_above_capacity": dict(sorted(self.overload_endings.items())),
            "faults": {kind.value: self.faults[kind.value] for kind in Kind},
            "fewest_faults_in_a_seed": self.fewest_faults,
            "transitions": {t.value: self.transitions[t.value] for t in Transition},
            "faults_never_met": [kind.value for kind in Kind if not self.faults[kind.value]],
            "transitions_never_met": [t.value for t in Transition if not self.transitions[t.value]],
            "fault_attempts": self.retries,
            "moves": self.moves,
            "client_reconnects": self.reconnects,
            "violations": self.violations,
        }


def as_line(seed: int, report: Report) -> dict[str, Any]:
    """One seed's report as plain values."""
    return {
        "seed": seed,
        "style": report.style,
        "virtual_s": report.virtual_s,
        **{name: getattr(report, name) for name in COUNTS},
        "endings": dict(report.endings),
        "faults": {str(k): n for k, n in report.bitten.items() if n},
        "transitions": {str(k): n for k, n in report.transitions.items()},
        "violations": report.violations,
    }


async def search(
    summary: Summary,
    num_seeds: int,
    num_processes: int,
    on_seed: Callable[[], None] = lambda: None,
) -> None:
    """Run a range of seeds in child processes.

    Args:
        summary: Has the beginning of the range, and counts every seed that has ended, so that an
            interrupted search reports what was run.
        num_seeds: How long the range is.
        num_processes: Children that share it, every n-th seed each.
        on_seed: Called after every seed, for a progress bar.
    """
    first = summary.first_seed
    end = first + num_seeds
    steps = range(min(num_processes, num_seeds))
    # When it is cancelled, a group waits for all its tasks; `gather` ends with the first of them,
    # and the loop would close before the other children are gone.
    async with asyncio.TaskGroup() as group:
        for i in steps:
            group.create_task(_run_child(first + i, end, len(steps), summary, on_seed))


async def _run_child(
    first: int, end: int, step: int, summary: Summary, on_seed: Callable[[], None]
) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "simulation.search",
        str(first),
        str(end),
        str(step),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # a replay must hash as the search did
        limit=LINE_LIMIT_BYTES,
        start_new_session=True,  # a terminal's Ctrl-C is for the parent, which ends its children
    )
    try:
        if child.stdout is not None:
            async for line in child.stdout:
                summary.add(json.loads(line))
                on_seed()
        code = await child.wait()
        if code:
            summary.violations.append(
                f"the process for seeds {first}, {first + step}, ... ended with code {code}"
            )
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


# --- one seed, again ------------------------------------------------------------------------------


def chosen(
    plan: TrialPlan, faults: Sequence[int] | None, requests: Sequence[int] | None
) -> TrialPlan:
    """Keep only some faults and requests of a plan, by their index."""
    return replace(
        plan,
        faults=plan.faults if faults is None else tuple(plan.faults[i] for i in faults),
        requests=plan.requests if requests is None else tuple(plan.requests[i] for i in requests),
    )


def shrink(seed: int) -> tuple[list[int], list[int]]:
    """Drop faults, then requests, of a failing seed as long as it still violates something.

    Returns:
        Indices of the faults and of the requests that are needed.
    """
    plan = make_plan(seed)
    faults = list(range(len(plan.faults)))
    requests = list(range(len(plan.requests)))

    def fails() -> bool:
        report = run_trial(chosen(plan, faults, requests))
        # H1 asks for many faults: a shrunk plan always violates it.
        return any(not v.startswith("H1") for v in report.violations)

    for needed in (faults, requests):
        for index in list(needed):
            needed.remove(index)
            # In their order: it decides which fault meets which message.
            if not fails():
                needed.append(index)
                needed.sort()
    return faults, requests


def replay_line(seed: int, faults: Sequence[int], requests: Sequence[int]) -> str:
    """The command that shows a shrunk failure again."""
    return (
        f"baton simulate faults --seed {seed} --only-faults {','.join(map(str, faults)) or '-'} "
        f"--only-requests {','.join(map(str, requests))}"
    )


def main() -> None:
    """Child process: every `step`-th seed of a range, one JSON line each."""
    first, end, step = (int(a) for a in sys.argv[1:4])
    # What the virtual cluster logs of injected faults would bury the results; a replay shows it.
    logging.getLogger().addHandler(logging.NullHandler())
    for seed in range(first, end, step):
        sys.stdout.write(json.dumps(as_line(seed, run_trial(make_plan(seed)))) + "\n")
        sys.stdout.flush()  # each seed at once: an interrupted search still has it


if __name__ == "__main__":
    main()
