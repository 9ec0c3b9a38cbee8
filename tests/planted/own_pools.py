"""Bugs of pools that tiers have for themselves: who may use them, and when one leaves them."""

from planted.bug import Bug

CHOICE = "tests/unit/router/test_pool_choice.py::"
CONFIG = "tests/unit/core/config/test_tier_pools.py::"
CLUSTER = "tests/simulation/test_own_pools.py::"
FIRST = CHOICE + "test_the_first_pools_that_have_a_worker_for_it_serve_a_request"
LATE = CHOICE + "test_a_request_that_would_be_late_spills_to_where_it_is_earlier"

BUGS: list[Bug] = [
    Bug(
        "everybody runs in everybody's pools",
        "router/pool_choice.py",
        "        if not self.is_divided:\n            return place(candidates)\n",
        "        if not self.is_divided or candidates:\n            return place(candidates)\n",
        FIRST,
    ),
    Bug(
        "a worker does not say in whose pool it is",
        "worker/components.py",
        "            tier=self.tier,\n",
        "",
        CLUSTER + "test_a_tier_runs_in_its_own_pool_and_nobody_else_does",
    ),
    Bug(
        "a retry goes back to the pool that failed it",
        "router/pool_choice.py",
        "if c.worker_id not in excluded]",
        "if c.worker_id]",
        FIRST,
    ),
    Bug(
        "a full pool is left by nobody",
        "router/pool_choice.py",
        "+ request.sampling.n <= c.num_available",
        "+ request.sampling.n <= 10**9",
        FIRST,
    ),
    Bug(
        "who would be late waits for its own pool",
        "router/pool_choice.py",
        "        if not limit_s or placed[name].predicted_s <= limit_s:\n",
        "        if True:\n",
        LATE,
    ),
    Bug(
        "where all would be late, the last pools serve",
        "router/pool_choice.py",
        "min(placed.items(), key=lambda one: one[1].predicted_s)",
        "list(placed.items())[-1]",
        LATE,
    ),
    Bug(
        "a tier without any worker is taken",
        "core/config/tier_pools.py",
        "    return num_decode > 0 or (num_prefill > 0 and not pair.decode.tier)\n",
        "    return num_decode > 0 or num_prefill > 0\n",
        CONFIG + "test_what_cannot_be_meant_is_refused_with_a_remedy",
    ),
    Bug(
        "a tier that lacks one pool has none of the shared ones",
        "core/config/tier_pools.py",
        'PoolId(Role.PREFILL, "" if tier.pools.prefill is None else name)',
        "PoolId(Role.PREFILL, name)",
        CONFIG + "test_a_tier_uses_a_shared_pool_where_it_has_none_of_its_own",
    ),
]
