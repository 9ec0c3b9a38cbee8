"""Replays traces under every policy, and under several sizes of the workers' caches.

Run: python -m benchmarks.traces conversation=FILE synthetic=FILE agents=FILE

Owns which replays are run; `simulation.replay` runs them. Called by hand: each takes seconds, and
its result does not depend on the machine.
"""

import sys
import time
from pathlib import Path

from benchmarks.record import save
from simulation.replay import Policy, Replay, ReplayPlan
from simulation.traces import read_trace

NUM_WORKERS = 8
CACHE_TOKENS = 3_000_000
PREFILL_TOKENS_PER_S = 8_000.0
SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)


def replayed(trace, policy, cache_tokens):
    began = time.perf_counter()
    plan = ReplayPlan(NUM_WORKERS, cache_tokens, PREFILL_TOKENS_PER_S, policy)
    figures = Replay(trace, plan).run()
    row = {"policy": policy.value, "cache_tokens": cache_tokens, **figures}
    print({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}, flush=True)
    return {**row, "wall_s": time.perf_counter() - began}


def main():
    for argument in sys.argv[1:]:
        name, _, file = argument.partition("=")
        trace = read_trace(Path(file))
        rows = [replayed(trace, policy, CACHE_TOKENS) for policy in Policy]
        by_policy = {row["policy"]: row for row in rows}
        cost = by_policy["cost"]
        result = {
            "trace": Path(file).name,
            "requests": len(trace.requests),
            "workers": NUM_WORKERS,
            "prefill_tokens_per_s": PREFILL_TOKENS_PER_S,
            "policies": rows,
            "share_of_ideal": cost["token_hit_rate"] / (cost["ideal_token_hit_rate"] or 1.0),
            "ttft_mean_of_least_queued": cost["ttft_mean_s"]
            / by_policy["least-queued"]["ttft_mean_s"],
            "ttft_mean_of_round_robin": cost["ttft_mean_s"]
            / by_policy["round-robin"]["ttft_mean_s"],
            "by_cache_size": [
                cost if size == CACHE_TOKENS else replayed(trace, Policy.COST, size)
                for size in SIZES
            ],
        }
        # The files are the user's: only their names are part of the result.
        sys.argv[1:] = [f"{name}={Path(file).name}"]
        print(save(f"trace_{name}", result))


if __name__ == "__main__":
    main()
