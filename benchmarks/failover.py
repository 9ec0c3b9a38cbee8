"""How long a client waits when a process under its stream is killed or stops:
gap by kind of fault and load.

Two of each role on this machine, path pd, our client; every gap is the longest wait between two
messages of one affected stream. The control is the same load without a fault.
Run: python -m benchmarks.failover [--streams 4 8 16] [--rounds N]
"""

import argparse
import asyncio
import sys
from pathlib import Path

from rich.progress import Progress

from benchmarks.record import quantiles, save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.process_cluster import ProcessCluster, config_of

KINDS = [(what, role) for what in ("kill", "hang") for role in ("decode", "prefill", "router")]
LOAD_S = {"kill": 4.0, "hang": 6.0}
HANG_S = 5.0
AIM_S = {"kill": 2.0, "hang": 4.0}


async def one_round(cluster, what, role, streams):
    """A fault at a random moment under load; the affected clients' longest gaps."""
    cluster.answers.clear()
    load = asyncio.create_task(cluster.load(LOAD_S[what], streams))
    await asyncio.sleep(cluster.rng.uniform(0.5, 2.0))
    await (cluster.kill(role) if what == "kill" else cluster.hang(role, HANG_S))
    await load
    wrong = cluster.verdict()["wrong"]
    if wrong:
        raise SystemExit(f"{what} {role}: {wrong}")
    await cluster.wait_whole()
    return [answer.longest_gap_s for _, answer in cluster.answers if answer.is_affected]


async def at_load(streams, rounds, progress, task):
    """All six kinds at one load, in turn, and the control before and after."""
    async with ProcessCluster(config_of(placement__path="pd")) as cluster:
        cluster.make_requests(max(24, streams + 8), max_tokens=80)
        await cluster.learn()
        gaps = {kind: [] for kind in KINDS}
        control = []
        for _ in range(rounds):
            cluster.answers.clear()
            await cluster.load(3.0, streams)
            control += [answer.longest_gap_s for _, answer in cluster.answers]
            for what, role in KINDS:
                gaps[what, role] += await one_round(cluster, what, role, streams)
                progress.advance(task)
    rows = [
        {
            "streams": streams,
            "fault": f"{what} {role}",
            "aim_p99_s": AIM_S[what],
            **quantiles(values),
        }
        for (what, role), values in gaps.items()
        if values
    ]
    return [{"streams": streams, "fault": "none", "aim_p99_s": None, **quantiles(control)}, *rows]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    with Progress() as progress:
        task = progress.add_task("faults", total=len(options.streams) * options.rounds * len(KINDS))
        for streams in options.streams:
            rows += asyncio.run(at_load(streams, options.rounds, progress, task))
    for row in rows:
        print(
            f"{row['streams']:3} streams  {row['fault']:13}  p50 {row['p50']:.2f} s  p99 "
            f"{row['p99']:.2f} s  aim {row['aim_p99_s']}  n {row['count']}"
        )
    save("failover", {"rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
