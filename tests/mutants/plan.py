"""Where mutants are drawn from and what is run for each, cheapest first.

Owns the list of modules, the stages and the list of mutants that change nothing. Does not know how
a stage is run. Called by the command.
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planted.bug import Bug
from support.tree import ROOT

from mutants.operators import Mutant, compiles, mutants_of

MODULES = """
core/awake_clock.py core/change_event.py decode_worker/role.py engine/ranks/plan_wire.py
engine/scheduling/block_changes.py engine/scheduling/block_identities.py
engine/scheduling/block_lists.py engine/scheduling/block_pool.py engine/scheduling/block_supply.py
engine/scheduling/block_tables.py engine/scheduling/kept_blocks.py
engine/scheduling/prefix_blocks.py engine/scheduling/queues.py engine/scheduling/results.py
engine/scheduling/scheduler.py engine/scheduling/sequences.py engine/scheduling/step_budget.py
engine/scheduling/step_planner.py kv_transfer/agent.py kv_transfer/fenced_pool.py
kv_transfer/fetch_stream.py kv_transfer/frame_builder.py kv_transfer/parking.py
kv_transfer/receive_agent.py kv_transfer/receive_stream.py kv_transfer/receiver.py
kv_transfer/reserved_blocks.py kv_transfer/send_agent.py kv_transfer/send_stream.py
kv_transfer/sender.py kv_transfer/threadsafe_callbacks.py prefill_worker/role.py
prefix_index/entries.py prefix_index/feed.py prefix_index/publisher.py prefix_index/view.py
router/admission.py router/attempt_state.py router/attempts.py router/candidate.py
router/choice_output.py router/cost.py router/expected_prefixes.py router/orchestrator.py
router/placement.py router/pool_choice.py router/prompt_prefixes.py
router/request_state.py router/steering.py router/submits.py router/text/detokenizing.py
router/fair_queue.py router/tier_queues.py router/tiers.py
router/workers/introductions.py
router/workers/liveness.py router/workers/load.py router/workers/outbox.py
router/workers/routes.py router/workers/session.py router/workers/sessions.py
router/workers/subscriptions.py transport/sequenced.py worker/attempt.py worker/attempts.py
worker/availability.py worker/prefix_fetches.py worker/prefix_offers.py
worker/router_session.py worker/sequences.py worker/session_server.py
worker/transfers.py worker/worker.py
""".split()
"""The heart: what decides who holds which block, which attempt counts, and when it ends."""

RULES = [
    "tests/simulation/test_books.py",
    "tests/simulation/test_ending_rules.py",
    "tests/simulation/test_handover_rules.py",
    "tests/simulation/test_survival_rules.py",
    "tests/simulation/test_drain.py",
    "tests/simulation/test_fairness_rules.py",
]
NEAR = {
    "core": [
        "tests/unit/transport/test_sequenced.py",
        "tests/unit/router/workers/test_sessions.py",
    ],
    "engine": [
        "tests/unit/engine/scheduling/test_scheduler_fairness.py",
        "tests/unit/engine/scheduling/test_scheduler_partners.py",
        "tests/unit/engine/scheduling/test_scheduler_preemption.py",
        "tests/unit/engine/scheduling/test_scheduler_tiers.py",
        "tests/unit/engine/scheduling/test_scheduler.py",
        "tests/unit/engine/scheduling/test_block_pool.py",
        "tests/unit/engine/scheduling/test_block_pool_rules.py",
        "tests/unit/engine/scheduling/test_block_identities.py",
        "tests/unit/engine/scheduling/test_block_changes.py",
        "tests/unit/engine/scheduling/test_kept_blocks.py",
        "tests/unit/engine/scheduling/test_block_tables.py",
        "tests/unit/engine/ranks/test_plan_wire.py",
        "tests/unit/engine/scheduling/test_scheduler_limits.py",
        "tests/unit/engine/scheduling/test_step_budget.py",
    ],
    "kv_transfer": [
        "tests/unit/kv_transfer/test_sender.py",
        "tests/unit/kv_transfer/test_sender_queue.py",
        "tests/unit/kv_transfer/test_receiver.py",
        "tests/unit/kv_transfer/test_transitions.py",
        "tests/unit/kv_transfer/test_send_agent.py",
        "tests/unit/kv_transfer/test_receive_agent.py",
        "tests/unit/kv_transfer/test_sender_lease.py",
        "tests/unit/kv_transfer/test_receiver_faults.py",
        "tests/unit/kv_transfer/test_resharding.py",
        "tests/simulation/test_handover_rules.py",
    ],
    "router": [
        "tests/unit/router/workers/test_sessions.py",
        "tests/unit/router/workers/test_session.py",
        "tests/unit/router/workers/test_liveness.py",
        "tests/unit/router/test_choice_output.py",
        "tests/unit/router/test_attempt_state.py",
        "tests/unit/router/test_placement.py",
        "tests/unit/router/test_cost.py",
        "tests/unit/router/test_steering.py",
        "tests/unit/router/test_resuming.py",
        "tests/unit/router/http/test_replies.py",
        "tests/unit/router/http/test_formatters.py",
        "tests/unit/router/test_admission.py",
        "tests/unit/router/test_tier_queues.py",
        "tests/unit/router/test_fair_queue.py",
        "tests/unit/router/test_tiers.py",
    ],
    "prefix_index": [
        "tests/unit/prefix_index/test_view.py",
        "tests/simulation/test_prefix_rules.py",
        "tests/simulation/test_prefix_forgeries.py",
        "tests/contract/test_prefix_store.py",
    ],
    "worker": [
        "tests/unit/worker/test_attempt.py",
        "tests/unit/worker/test_attempts.py",
        "tests/unit/worker/test_session_server.py",
        "tests/simulation/test_ending_rules.py",
        "tests/simulation/test_reports.py",
    ],
    "prefill_worker": ["tests/simulation/test_pool_rules.py"],
    "decode_worker": [
        "tests/simulation/test_pool_rules.py",
        "tests/simulation/test_inside_rules.py",
    ],
}
"""Which tests to try first for the modules of a package."""

EXACT = ["tests/component/test_exactness.py", "-k", "not bare_engine and not every_family"]
FAR = {
    "engine": ["tests/component/test_sampling_exactness.py", *EXACT],
    "kv_transfer": ["tests/component/test_transports.py", "tests/component/test_introductions.py"],
    "router": ["tests/component/test_tokenizing.py"],
    "worker": ["tests/component/test_disconnects.py"],
    "prefill_worker": EXACT,
    "decode_worker": EXACT,
}
"""Tests on real models and wires, for what nothing cheaper noticed."""

SLOW = {
    f"tests/unit/{name}.py"
    for name in (
        "bench/test_load",
        "client/test_failures",
        "kv_transfer/test_copying",
        "kv_transfer/test_frames",
        "router/access/test_credentials",
    )
}
"""Unit tests that run nothing of the heart, or start processes."""

TEST_TIMEOUT_S = 30


@dataclass(frozen=True)
class Equivalent:
    """A mutant that changes nothing that anyone can see: its path, its lines, and why."""

    path: str
    before: str
    after: str
    reason: str

    @property
    def key(self) -> tuple[str, str, str]:
        """As a mutant's key."""
        return self.path, self.before, self.after


def stages_of(path: str, num_seeds: int, is_far: bool) -> list[dict[str, Any]]:
    """What to run for a mutant of a module, cheapest first: a name, and tests or seeds each."""
    package, stem = path.split("/", maxsplit=1)[0], Path(path).stem
    folder = ROOT / "tests" / "unit" / Path(path).parent
    own = sorted([*folder.glob(f"test_{stem}.py"), *folder.glob(f"test_{stem}_*.py")])
    named = [*(str(p.relative_to(ROOT)) for p in own), *NEAR.get(package, [])]
    near = [t for t in dict.fromkeys(named) if (ROOT / t).exists()]
    units, simulated = (
        sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"tests/{level}/**/test_*.py"))
        for level in ("unit", "simulation")
    )
    units = [t for t in units if t not in SLOW]
    ordered = dict.fromkeys([*RULES, *(t for t in simulated if "test_trials" not in t), *units])
    rules = list(ordered)  # the near ones too: one list for all modules is tried whole once
    stages = [{"name": "near", "tests": near}] if near else []
    stages += [{"name": "rules", "tests": rules}, {"name": "seeds", "seeds": [0, num_seeds]}]
    if is_far and package in FAR:
        stages.append({"name": "far", "tests": FAR[package]})
    return stages


def sample(modules: list[str], count: int, seed: int) -> list[Mutant]:
    """A random choice of all mutants of some modules; the same for the same seed and text."""
    sources = {path: (ROOT / path).read_text() for path in modules}
    everything = [m for path, source in sources.items() for m in mutants_of(path, source)]
    random.Random(seed).shuffle(everything)
    fine = (m for m in everything if compiles(m.applied(sources[m.path])))
    return list(itertools.islice(fine, count))


def given(bugs: list[Bug]) -> list[Mutant]:
    """Bugs made by hand, as mutants."""
    found = []
    for bug in bugs:
        source = (ROOT / bug.path).read_text()
        at = source.index(bug.old)
        start = len(source[:at].encode())
        found.append(
            Mutant(
                bug.path,
                source.count("\n", 0, at) + 1,
                bug.name,
                start,
                start + len(bug.old.encode()),
                bug.new,
                " ".join(bug.old.split()),
                " ".join(bug.new.split()),
            )
        )
    return found
