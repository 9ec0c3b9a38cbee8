"""What one placement costs by the number of workers, each of which holds a part of the prompt.

Run: python -m benchmarks.placement

Owns the sweep. Beside the choice it times the hash of the prompt, the question to the view, and
both together, as a request pays for them.
"""

import random
import time

from benchmarks.record import quantiles, save
from core.block_hash import block_hashes, root_hash
from core.ids import Incarnation, WorkerId
from core.prefix_changes import PrefixChange
from core.session import Load, Role, WorkerDescriptor
from core.types import GenerateRequest, SamplingParams
from prefix_index.view import PrefixView
from router.candidate import Candidate
from router.placement import PlacementConstraints, choose

WORKERS = (8, 64, 256, 1_000, 2_000)
PROMPT_TOKENS = 2_048
SHORT_TOKENS = 20
"""Fewer than `placement.local_below_tokens`: every decode worker could serve it alone."""
REPEATS = 200
SIZE = 16


def candidates_of(number, rng):
    made = []
    for index in range(number):
        role = Role.DECODE if index % 2 else Role.PREFILL
        name = WorkerId(f"{role.value}-{index}")
        descriptor = WorkerDescriptor(
            name, role, Incarnation(1), name, name, "m", "digest", SIZE, 4_096, 65_536
        )
        load = Load(rng.randrange(4), rng.randrange(32), rng.randrange(9_000), 2_048, 1_024)
        pending = rng.randrange(5_000)
        made.append(
            Candidate(
                descriptor,
                load,
                pending_tokens=pending,
                pending_requests=2,
                head_tokens=pending // 2,
                prefill_tokens_per_s=rng.uniform(5_000, 10_000),
                recent_work=rng.uniform(5, 12),
            )
        )
    return made


def milliseconds(action):
    samples = []
    for _ in range(REPEATS):
        began = time.thread_time()
        action()
        samples.append((time.thread_time() - began) * 1e3)
    return quantiles(samples)


def main():
    rng = random.Random(7)
    request = GenerateRequest("r", "m", tuple(range(PROMPT_TOKENS)), SamplingParams(), 1, 0.0)
    short = GenerateRequest("s", "m", tuple(range(SHORT_TOKENS)), SamplingParams(), 1, 0.0)
    constraints = PlacementConstraints()
    names = block_hashes(root_hash("digest", "scope"), request.token_ids[:-1], SIZE)
    rows = []
    for number in WORKERS:
        candidates = candidates_of(number, rng)
        view = PrefixView()
        for c in candidates:
            stored = names[: rng.randrange(len(names))]
            view.apply(c.worker_id, Incarnation(1), PrefixChange(stored))
        held = view.match(names)
        row = {
            "workers": number,
            "choose_without_hits_ms": milliseconds(
                lambda c=candidates: choose(c, request, constraints, now_s=1.0)
            ),
            "choose_ms": milliseconds(
                lambda c=candidates, h=held: choose(c, request, constraints, h, now_s=1.0)
            ),
            "choose_short_ms": milliseconds(
                lambda c=candidates: choose(c, short, constraints, now_s=1.0)
            ),
            "match_ms": milliseconds(lambda v=view: v.match(names)),
            "together_ms": milliseconds(
                lambda c=candidates, v=view: choose(
                    c, request, constraints, v.match(names), now_s=1.0
                )
            ),
        }
        print({k: v if isinstance(v, int) else round(v["p50"], 4) for k, v in row.items()})
        rows.append(row)
    hash_ms = milliseconds(
        lambda: block_hashes(root_hash("digest", "scope"), request.token_ids[:-1], SIZE)
    )
    result = {"prompt_tokens": PROMPT_TOKENS, "unit": "CPU ms", "hash_ms": hash_ms, "rows": rows}
    print(save("placement", result))


if __name__ == "__main__":
    main()
