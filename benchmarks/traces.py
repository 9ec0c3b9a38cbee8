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


def replayed(trace, policy, cache_tokens, warm_up_s=0.0):
    began = time.perf_counter()
    plan = ReplayPlan(NUM_WORKERS, cache_tokens, PREFILL_TOKENS_PER_S, policy, warm_up_s=warm_up_s)
    figures = Replay(trace, plan).run()
    row = {"policy": policy.value, "cache_tokens": cache_tokens, **figures}
    print({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}, flush=True)
    return {**row, "wall_s": time.perf_counter() - began}


def second_half(trace):
    """TTFT of the later prompts, with caches that the earlier ones have filled.

    The weights of the cost were chosen by figures of whole traces. Of 23 others around them, some
    are better by the first halves alone, and none by more than 3 % in the second halves.
    """
    arrivals = sorted(request.arrival_s for request in trace.requests)
    warm_up_s = arrivals[len(arrivals) // 2]
    rows = {p.value: replayed(trace, p, CACHE_TOKENS, warm_up_s) for p in Policy}
    cost_s = rows["cost"]["ttft_mean_s"]
    return {
        "from_s": warm_up_s,
        "ttft_mean_s": {name: row["ttft_mean_s"] for name, row in rows.items()},
        "ttft_mean_of_least_queued": cost_s / rows["least-queued"]["ttft_mean_s"],
        "ttft_mean_of_round_robin": cost_s / rows["round-robin"]["ttft_mean_s"],
    }


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
            # Of sessions, each has its own clock: there is no later half.
            "second_half": None if trace.requests[0].session else second_half(trace),
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
