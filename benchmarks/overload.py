"""What a cluster does when it is asked for more than it can: 2, 5 and 20 times its capacity.

Owns the offered load (mixed prompts that never repeat) and the figures:
who was refused and how fast, what those who were let in got, what is left at rest, how soon all is
well again. A real cluster of child processes, loopback only, over HTTP. Capacity is measured in a
closed loop before and after each load, because this kind of machine drifts. Called by hand;
`benchmarks.chart` draws docs/overload.svg.
Run: python -m benchmarks.overload [--seconds 60] [--times 2 5 20] [--out NAME]
"""

import argparse
import asyncio
import resource
import time
from collections import Counter

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.http_client import HttpClient
from benchmarks.record import quantiles, save
from cluster.local import LocalCluster
from core.config import load_config

SHORT_TOKENS = (20, 40)
LONG_TOKENS = (800, 1_200)
LONG_SHARE = 0.2
OUTPUT_TOKENS = (4, 64)
MAX_OPEN = 4_000
DRAIN_S = 75.0
PROBES = 10
REST_S = 10.0
RECOVERY_S = 60.0
RAMP_SHARE = 0.25
QUEUED_OUT = "queue_timeout"
AIMS = {"refusal_p99_s": 0.05, "goodput": 0.9, "recovery_s": 2.0}


def mixed_body(client):
    sizes = LONG_TOKENS if client.rng.random() < LONG_SHARE else SHORT_TOKENS
    return client.body(client.rng.randint(*sizes), client.rng.randint(*OUTPUT_TOKENS))


def cluster_cpu_s():
    """CPU seconds of all processes of the cluster so far."""
    times = [p.cpu_times() for p in psutil.Process().children(recursive=True)]
    return sum(t.user + t.system for t in times)


async def closed_loop(client, concurrency, seconds):
    """As many at once as there are permits, each followed by the next."""
    began, outcomes = time.monotonic(), []

    async def one():
        while time.monotonic() < began + seconds:
            outcomes.append(await client.ask(mixed_body(client)))

    await asyncio.gather(*(one() for _ in range(concurrency)))
    return outcomes, began


async def open_loop(client, rate, seconds):
    """Poisson arrivals; one that finds too many open is not sent, and counted.

    Returns:
        The outcomes to come, when sending began and ended, and how many were not sent.
    """
    tasks, num_unsent, num_open = [], 0, 0

    async def one(due_at):
        nonlocal num_open
        num_open += 1
        try:
            return await client.ask(mixed_body(client), due_at)
        finally:
            num_open -= 1

    began = due_at = time.monotonic()
    while (due_at := due_at + client.rng.expovariate(rate)) < began + seconds:
        if (wait_s := due_at - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)
        if num_open >= MAX_OPEN:
            num_unsent += 1
        else:
            tasks.append(asyncio.create_task(one(due_at)))
    return tasks, began, time.monotonic(), num_unsent


def goodput(outcomes, began, ended, slo_s):
    """What came out of a loop in the steady part of its time, a second.

    Answers that ended there, those of them whose first token came in time, and output events.
    """
    began += RAMP_SHARE * (ended - began)
    good = [o for o in outcomes if o.is_ok]
    here = [o for o in good if began <= o.ended_at <= ended]
    num_events = sum(began <= at <= ended for o in good for at in o.arrivals)
    took_s = ended - began
    return {
        "answers_per_s": len(here) / took_s,
        "within_slo_per_s": sum(o.ttft_s <= slo_s for o in here) / took_s,
        "events_per_s": num_events / took_s,
    }


async def at_rest(port):
    """Permits and queue once nobody asks for anything; waits a little for them to be given back."""
    until_s = time.monotonic() + REST_S
    async with httpx.AsyncClient(timeout=5) as http:
        while True:
            load = (await http.get(f"http://127.0.0.1:{port}/load")).json()
            held = {"running": load["running"], "queued": load["queued"]}
            if not any(held.values()) or time.monotonic() > until_s:
                return held
            await asyncio.sleep(0.1)


async def probe(client):
    return await client.ask(client.body(30, 4))


async def unloaded_ttft_s(client):
    outcomes = [await probe(client) for _ in range(PROBES)]
    return sorted(o.ttft_s for o in outcomes if o.is_ok)[PROBES // 2]


async def recovery_s(client, ended_at, normal_s):
    """Seconds from the end of the load to the first of two good answers; None: never."""
    first_good_at = None
    while time.monotonic() < ended_at + RECOVERY_S:
        outcome = await probe(client)
        is_good = outcome.is_ok and outcome.ttft_s <= 2 * normal_s + 0.02
        if is_good and first_good_at is not None:
            return first_good_at - ended_at
        first_good_at = outcome.arrivals[0] if is_good else None
        await asyncio.sleep(0.02)
    return None


def decision_s(outcome, queue_wait_s):
    """How long a refusal took from when it was possible: at once, or when the wait was over."""
    took_s = outcome.ended_at - outcome.sent_at
    return took_s - queue_wait_s if outcome.code == QUEUED_OUT else took_s


async def overload(client, rate, options, normal_s):
    """One load and all that is said of it."""
    cpu_began = time.process_time()
    tasks, began, ended, num_unsent = await open_loop(client, rate, options.seconds)
    generator_cpu = (time.process_time() - cpu_began) / (ended - began)
    recovered = asyncio.create_task(recovery_s(client, ended, normal_s))
    async with asyncio.timeout(DRAIN_S):
        outcomes = await asyncio.gather(*tasks)
    recovered_s = await recovered
    good = [o for o in outcomes if o.is_ok]
    refused = [o for o in outcomes if o.is_refusal]
    others = [o for o in outcomes if not o.is_ok and not o.is_refusal]
    refusals_s = [decision_s(o, options.queue_wait_s) for o in refused]
    gaps = [gap for o in good for gap in o.gaps_s]
    return {
        "rate_per_s": rate,
        "sent": len(outcomes),
        "not_sent": num_unsent,
        "ok": len(good),
        "refused": Counter(f"{o.status} {o.code}" for o in refused),
        "other": Counter(f"{o.status} {o.code}" for o in others),
        "refused_after_queuing": sum(o.code == QUEUED_OUT for o in refused),
        "refusal_s": quantiles(refusals_s) if refusals_s else None,
        "ttft_s": quantiles([o.ttft_s for o in good]) if good else None,
        "itl_s": quantiles(gaps) if gaps else None,
        "longest_stall_s": max(gaps, default=0.0),
        **goodput(outcomes, began, ended, options.slo_s),
        "generator_lag_s": quantiles([o.sent_at - o.due_at for o in outcomes]),
        "generator_cpu": generator_cpu,
        "recovery_s": recovered_s,
        "at_rest": await at_rest(client.port),
    }


async def measure(options, console):
    flags = {
        "router.http_port": 0,
        "router.grpc_port": 0,
        "router.max_running": options.max_running,
        "router.max_queued": options.max_running,
        "router.queue_wait_s": options.queue_wait_s,
        "tiers.standard.max_ttft_s": options.max_ttft_s,
        "router.log_requests": False,
        "placement.path": options.path,
    }
    cluster = LocalCluster(load_config(None, flags, {}))
    await cluster.start()
    rows, capacities = [], []
    try:
        client = HttpClient(cluster.http_port, options.seed)
        normal_s = await unloaded_ttft_s(client)

        async def capacity():
            seconds = options.capacity_seconds
            cpu_began_s = cluster_cpu_s()
            outcomes, began = await closed_loop(client, options.max_running, seconds)
            cpu_s = cluster_cpu_s() - cpu_began_s
            found = goodput(outcomes, began, began + seconds, options.slo_s)
            found["cpu_ms_per_answer"] = 1e3 * cpu_s / len(outcomes)
            found["not_ok"] = sum(not o.is_ok for o in outcomes)
            found["ttft_s"] = quantiles([o.ttft_s for o in outcomes if o.is_ok])
            capacities.append(found)
            said = (
                f"{found['answers_per_s']:.1f} answers/s, {found['cpu_ms_per_answer']:.0f} "
                "ms of CPU"
            )
            console.print(f"capacity {said} each", style="dim")

        await capacity()  # warms up
        capacities.clear()
        await capacity()
        for times in options.times:
            rate = times * capacities[-1]["answers_per_s"]
            row = {"times": times, **await overload(client, rate, options, normal_s)}
            console.print(f"{times}x: {row['ok']} of {row['sent']} ok", style="dim")
            await capacity()
            beside = capacities[-2:]
            for name in ("answers_per_s", "within_slo_per_s", "events_per_s"):
                mean = sum(c[name] for c in beside) / 2
                row[f"{name}_of_capacity"] = row[name] / mean if mean else None
            rows.append(row)
    finally:
        await cluster.stop()
    return {"unloaded_ttft_s": normal_s, "capacity": capacities, "rows": rows}


def show(result, console):
    table = Table("", *(f"{row['times']:g}x" for row in result["rows"]), "aim")

    def line(name, text, aim=""):
        table.add_row(name, *(text(row) for row in result["rows"]), aim)

    def ms(found, at):
        return f"{found[at] * 1e3:.1f}" if found else "-"

    line("sent, not sent", lambda r: f"{r['sent']}, {r['not_sent']}")
    line("ok", lambda r: str(r["ok"]))
    line("refused", lambda r: " ".join(f"{k}: {n}" for k, n in r["refused"].items()))
    line("other", lambda r: " ".join(f"{k}: {n}" for k, n in r["other"].items()) or "none", "none")
    line(
        "refusal p50, p99 ms",
        lambda r: f"{ms(r['refusal_s'], 'p50')}, {ms(r['refusal_s'], 'p99')}",
        "50",
    )
    line("TTFT p50, p99 ms", lambda r: f"{ms(r['ttft_s'], 'p50')}, {ms(r['ttft_s'], 'p99')}")
    line("ITL p99 ms", lambda r: ms(r["itl_s"], "p99"))
    line("longest stall s", lambda r: f"{r['longest_stall_s']:.2f}")
    for name in ("answers_per_s", "within_slo_per_s", "events_per_s"):
        share = f"{name}_of_capacity"
        line(
            f"{name}, of capacity",
            lambda r, n=name, s=share: f"{r[n]:.1f}, {r[s]:.0%}" if r[s] is not None else "-",
            "90%" if name == "within_slo_per_s" else "",
        )
    line(
        "recovery s",
        lambda r: "never" if r["recovery_s"] is None else f"{r['recovery_s']:.2f}",
        "2",
    )
    line(
        "permits, queue at rest",
        lambda r: f"{r['at_rest']['running']}, {r['at_rest']['queued']}",
        "0, 0",
    )
    line(
        "generator lag p99 ms, CPU",
        lambda r: f"{ms(r['generator_lag_s'], 'p99')}, {r['generator_cpu']:.0%}",
    )
    console.print(table)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--capacity-seconds", type=float, default=20.0)
    parser.add_argument("--times", type=float, nargs="+", default=[2, 5, 20])
    parser.add_argument(
        "--max-running", type=int, default=32, help="permits, and places in the queue"
    )
    parser.add_argument("--queue-wait-s", type=float, default=0.5)
    ttft_help = "tiers.standard.max_ttft_s: what may pass before a prompt's own turn; 0: off"
    parser.add_argument("--max-ttft-s", type=float, default=0.5, help=ttft_help)
    parser.add_argument("--slo-s", type=float, default=1.0, help="to the first token, from sending")
    parser.add_argument("--path", choices=("auto", "pd", "local"), default="auto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="overload", help="name of the result file")
    parser.add_argument("--note", default="", help="what else the machine did")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    console = Console(width=140)
    result = asyncio.run(measure(options, console))
    show(result, console)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "note")}
    facts = {"note": options.note, "settings": settings, "aims": AIMS, **result}
    console.print(save(options.out, facts))


if __name__ == "__main__":
    main()
