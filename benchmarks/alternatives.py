"""The two pieces that nobody would write first, beside what one would write instead.

The copy that sums (`kv_transfer.copying`) beside a copy and a checksum a part; the sum of ranks in
shared memory (`engine.ranks.shared_group`) beside gloo. CPU time of one thread, the least of many
passes, so that other work on the machine disturbs little; the wall time of a message is the median.
Run: pip install xxhash; python -m benchmarks.alternatives [--messages N]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import save
from kv_transfer import copying
from process.shared_memory import create_segment, map_segment

PART_BYTES = 8192
FRAME_PARTS = 128
POOL_PARTS = 8192
PASSES = 3
WIDTHS = {"tiny, one row": (1, 64), "0.5B, one row": (1, 896), "0.5B, 64 rows": (64, 896)}
SIZE = 2
CHILD = [sys.executable, "-m", "benchmarks.alternatives", "--child"]
PAGE, SLOT_BYTES = 4096, 1 << 20


def ways():
    """Name to a function that moves a frame's parts, and says what they sum to."""
    import xxhash

    def rows(array):
        return array.view(np.uint8).reshape(-1, PART_BYTES)

    def plain(source, source_at, target, target_at):
        read, written = rows(source), rows(target)
        for begin, end in zip(source_at, target_at, strict=True):
            np.copyto(written[end], read[begin])

    def with_sum(digest):
        def one(source, source_at, target, target_at):
            read, written = rows(source), rows(target)
            for begin, end in zip(source_at, target_at, strict=True):
                np.copyto(written[end], read[begin])
                digest(written[end])

        return one

    def gathered(source, source_at, target, target_at):
        written = rows(target)
        written[target_at] = rows(source)[source_at]
        for end in target_at:
            xxhash.xxh3_64_intdigest(written[end])

    def kernel(how):
        words = PART_BYTES // 8

        def one(source, source_at, target, target_at):
            tallies = np.empty(len(source_at), np.uint64)
            read = copying._read_only(source)
            at = source_at * words, target_at * words
            steps = words, words
            copying._move(
                read, at[0], steps, target, at[1], steps, (1, 1), words, how, True, tallies
            )

        return one

    return {
        "np.copyto a part, no sum": plain,
        "np.copyto + zlib.crc32": with_sum(zlib.crc32),
        "np.copyto + xxh3_64": with_sum(xxhash.xxh3_64_intdigest),
        "one indexed copy a frame + xxh3_64": gathered,
        "kernel, word by word": kernel(copying.PLAINLY),
        "kernel, lines": kernel(copying.BY_LINES),
        "kernel, lines past the cache": kernel(copying.PAST_THE_CACHE),
    }


def aligned(num_parts):
    """uint64 words of so many parts, beginning on a cache line."""
    room = np.ones(num_parts * PART_BYTES // 8 + 8, np.uint64)
    first = -room.ctypes.data % 64 // 8
    return room[first : first + num_parts * PART_BYTES // 8]


def copies():
    """GB/s of each way, from and to memory and within a frame that stays in the cache."""
    rng = np.random.default_rng(1)
    source, target = aligned(POOL_PARTS), aligned(POOL_PARTS)
    source[:] = rng.integers(0, 2**63, len(source), dtype=np.uint64)
    orders = {
        "memory": (rng.permutation(POOL_PARTS), rng.permutation(POOL_PARTS)),
        "cache": (np.arange(FRAME_PARTS),) * 2,
    }
    found = {name: {} for name in ways()}
    for place, (read_at, write_at) in orders.items():
        repeats = 1 if place == "memory" else 20
        for _ in range(PASSES):
            for name, move in ways().items():
                began = time.thread_time()
                for _ in range(repeats):
                    for first in range(0, len(read_at), FRAME_PARTS):
                        frame = slice(first, first + FRAME_PARTS)
                        move(source, read_at[frame], target, write_at[frame])
                took_s = time.thread_time() - began
                speed = len(read_at) * repeats * PART_BYTES / took_s / 1e9
                found[name][place] = max(speed, found[name].get(place, 0.0))
    return found


def child(kind, rank, fd, rendezvous, messages):
    """One rank that sums again and again; prints its figures."""
    import torch

    from engine.model import collectives
    from engine.ranks import shared_group

    torch.set_num_threads(1)
    if kind == "gloo":
        group = collectives.DistributedGroup.join(Path(rendezvous), rank, SIZE)
    else:
        common = map_segment(fd, PAGE + 2 * SIZE * SLOT_BYTES)
        shared_group.SPIN_S = {"spin, then futex": 50e-6, "futex at once": 0.0}[kind]
        group = shared_group.SharedGroup(rank, SIZE, common[:PAGE], common[PAGE:])
    found = {}
    for name, (rows, width) in WIDTHS.items():
        x = torch.ones(rows, width)
        for _ in range(20):
            group.sum(x, rows)
        cpu_s, times = time.process_time(), []
        for _ in range(messages):
            began = time.perf_counter()
            group.sum(x, rows)
            times.append(time.perf_counter() - began)
        cpu_s = time.process_time() - cpu_s
        best = sorted(times)[len(times) // 10]
        found[name] = {"median_s": median(times), "p10_s": best, "cpu_s": cpu_s / messages}
    if rank == 0:
        print(json.dumps(found))


def sums(kind, messages):
    """Figures of the first of two ranks that join in one way."""
    fd = create_segment(PAGE + 2 * SIZE * SLOT_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [*CHILD, kind, str(rank), str(fd), f"{folder}/meet", str(messages)],
                stdout=subprocess.PIPE,
                pass_fds=(fd,),
                text=True,
            )
            for rank in range(SIZE)
        ]
        os.close(fd)
        first, *_ = [rank.communicate(timeout=600)[0] for rank in ranks]
        return json.loads(first)


def main():
    if "--child" in sys.argv:
        kind, rank, fd, rendezvous, messages = sys.argv[2:]
        child(kind, int(rank), int(fd), rendezvous, int(messages))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--messages", type=int, default=2000)
    messages = parser.parse_args().messages
    copied = copies()
    summed = {kind: sums(kind, messages) for kind in ("spin, then futex", "futex at once", "gloo")}
    console = Console(width=110)
    table = Table("GB/s of one thread", "from memory", "in the cache")
    for name, speeds in copied.items():
        table.add_row(name, f"{speeds['memory']:.2f}", f"{speeds['cache']:.2f}")
    console.print(table)
    table = Table("µs a sum of two ranks: median / best tenth / CPU", *WIDTHS)
    for kind, found in summed.items():
        cells = [
            " / ".join(f"{f[key] * 1e6:.0f}" for key in ("median_s", "p10_s", "cpu_s"))
            for f in found.values()
        ]
        table.add_row(kind, *cells)
    console.print(table)
    facts = {"copies_gb_per_s": copied, "sums": summed}
    save(
        "alternatives", {"command": f"python -m {Path(__file__).parent.name}.alternatives", **facts}
    )


if __name__ == "__main__":
    main()
