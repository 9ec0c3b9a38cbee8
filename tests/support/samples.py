"""What `make test` takes of a matrix, and of the slowest tests, that `make test-long` runs whole:
a share that changes every day.

Owns the draw and its seed. A failure is repeated with the seed that the run ends with:
`SAMPLE=20260131 make test`.
"""

import os
import random
import zlib
from datetime import UTC, datetime

from support.process_cluster import is_long

SEED = int(os.environ.get("SAMPLE", datetime.now(UTC).strftime("%Y%m%d")))


def sample(cases, count):
    """So many cases of a list, in its order; all of them in `make test-long`."""
    cases = list(cases)
    if is_long() or count >= len(cases):
        return cases
    # The sizes belong to the seed: else two matrices would always draw the same places together.
    rng = random.Random(f"{SEED} {len(cases)} {count}")
    taken = rng.sample(range(len(cases)), count)
    return [case for index, case in enumerate(cases) if index in taken]


def is_due(test_id, every_days, seed=SEED):
    """True on one of so many days in a row, on which is as good as drawn."""
    return (zlib.crc32(test_id.encode()) + seed) % every_days == 0
