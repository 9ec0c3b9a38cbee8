"""What one core pays as the cluster, the queue, the context and the cache grow.

Owns four sweeps over parts that run alone: a router's links and placement by workers
(`benchmarks.scaling_router`), the scheduler by waiting requests, a decode step by context and
penalties, the block pool by cached blocks. No sockets, ranks or models. Times are CPU time of this
thread, so neighbours on the machine cost little; every sample is kept. Called by hand;
`benchmarks.chart` draws docs/scaling.svg out of scaling.json and scaling_before.json.
Run: python -m benchmarks.scaling [--part NAME ...] [--repeats N] [--out NAME]
"""

import argparse
import gc
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.record import save
from benchmarks.scaling_router import BLOCK_SIZE_TOKENS, cpu_ms, measure_router
from core.ids import WorkerId
from core.plan import StepResult
from core.types import GenerateRequest, Logprob, SamplingParams
from engine.ranks import rank_wire
from engine.ranks.plan_wire import PlanEncoder
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import Limits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Handover

WAITING = (100, 1_000, 10_000)
CONTEXTS = (128, 2_048, 16_384, 32_768)
OUTPUTS = (100, 1_000, 8_000)
CACHED_BLOCKS = (10_000, 100_000, 1_000_000)
RUNNING = 64
NUM_PARTNERS = 8
VOCABULARY = 128_000
STEP_TOKENS = 512
AIMS = {
    "placement": ("ms", 1.0),
    "introduce_one": ("ms", None),
    "introduce_all": ("ms", None),
    "step_handovers_waiting": ("ms", 1.0),
    "step_prompts_waiting": ("ms", 1.0),
    "num_waiting_tokens": ("ms", None),
    "decode_plain": ("ms", 1.0),
    "decode_plain_bytes": ("bytes", None),
    "decode_repetition": ("ms", 1.0),
    "decode_repetition_bytes": ("bytes", None),
    "decode_frequency": ("ms", 1.0),
    "decode_frequency_bytes": ("bytes", None),
    "frequency_by_output": ("ms", 1.0),
    "frequency_by_output_bytes": ("bytes", None),
    "bytes_a_cached_block": ("bytes", 200.0),
    "allocate_free_100": ("ms", None),
    "evict_100": ("ms", None),
    "drop_cache": ("ms", None),
}
"""Unit of each curve, and what it may be at its largest size."""

# --- the calls that must follow the code's own shape ---------------


def make_pool(num_blocks):
    return BlockPool(num_blocks)


def make_packer():
    """Plan -> the bytes that go to every rank."""
    encoder = PlanEncoder(BLOCK_SIZE_TOKENS)
    return lambda plan: rank_wire.pack(encoder.encode(plan))


def make_handover(number):
    return Handover(WorkerId(f"decode{number % NUM_PARTNERS}"))


class Curves:
    """Samples by curve and size."""

    def __init__(self):
        self.samples = {}

    def add(self, name, size, samples):
        self.samples.setdefault(name, {}).setdefault(size, []).extend(samples)

    def rows(self):
        return {
            name: [
                {
                    "size": size,
                    "best": min(values),
                    "median": statistics.median(values),
                    "raw": [round(value, 6) for value in values],
                }
                for size, values in sorted(by_size.items())
            ]
            for name, by_size in self.samples.items()
        }


# --- scheduler ------------------------------------------------------------------------------------


class Engine:
    """A scheduler whose model says the same token again and again."""

    def __init__(self, num_blocks, step_tokens=STEP_TOKENS, max_sequences=2 * RUNNING):
        self.pool = make_pool(num_blocks)
        limits = Limits(BLOCK_SIZE_TOKENS, step_tokens, max_sequences, max_model_len=1 << 17)
        self.scheduler = Scheduler(self.pool, limits, "digest")
        self.rng = random.Random(3)
        self.numbers = itertools.count()

    def prompt(self, num_tokens):
        return tuple(self.rng.choices(range(256, VOCABULARY), k=num_tokens))

    def submit(self, token_ids, emitted=(), handover=None, **sampling):
        name = f"r{next(self.numbers)}"
        sampling = {"max_tokens": 1_000, "temperature": 0.0, "ignore_eos": True, **sampling}
        request = GenerateRequest(
            name, "m", token_ids, SamplingParams(**sampling), seed=1, deadline_at=1e9
        )
        sequence = self.scheduler.new_sequence(
            request, 1, (0,), emitted, 0.0, credit=1 << 20, handover=handover
        )
        self.scheduler.submit(sequence)

    def finish(self, plan):
        tokens = {
            (item.sequence_key, spec.choice): Logprob(300, 0.0)
            for item in plan.items
            for spec in item.samples
        }
        self.scheduler.commit(plan, StepResult(plan.step_id, tokens), 0.0)

    def step(self):
        plan = self.scheduler.plan(0.0)
        self.finish(plan)
        return plan

    def settle(self):
        """Step until the RUNNING sequences decode one token each."""
        while self.step().num_tokens != RUNNING:
            pass


def with_waiting(num_waiting, are_handovers):
    """RUNNING that decode, and so many that cannot start: for want of a partner, or of blocks."""
    blocks_each = 32 + 1
    engine = Engine(num_blocks=RUNNING * blocks_each + 70)
    for _ in range(RUNNING):
        engine.submit(engine.prompt(32 * BLOCK_SIZE_TOKENS - 100))
    engine.settle()
    for number in range(num_waiting):
        token_ids = engine.prompt(32 if are_handovers else 80 * BLOCK_SIZE_TOKENS)
        engine.submit(token_ids, handover=make_handover(number) if are_handovers else None)
    return engine


def measure_scheduler(curves, repeats):
    for num_waiting in WAITING:
        for name, are_handovers in (("handovers", True), ("prompts", False)):
            engine = with_waiting(num_waiting, are_handovers)
            engine.settle()
            curves.add(f"step_{name}_waiting", num_waiting, cpu_ms(engine.step, 2 * repeats))
            assert engine.step().num_tokens == RUNNING, "what should wait has started"
        scheduler = engine.scheduler
        samples = cpu_ms(lambda s=scheduler: s.num_waiting_tokens, repeats)
        curves.add("num_waiting_tokens", num_waiting, samples)


def decode_steps(num_prompt_tokens, num_output_tokens, repeats, **sampling):
    """(plan + pack milliseconds, bytes to a rank) of steps in which RUNNING sequences decode."""
    num_tokens = num_prompt_tokens + num_output_tokens
    num_blocks = RUNNING * (num_tokens // BLOCK_SIZE_TOKENS + 8)
    engine = Engine(num_blocks, step_tokens=RUNNING * num_tokens, max_sequences=RUNNING)
    for _ in range(RUNNING):
        emitted = engine.prompt(num_output_tokens)
        max_tokens = num_output_tokens + 4 * BLOCK_SIZE_TOKENS
        engine.submit(engine.prompt(num_prompt_tokens), emitted, max_tokens=max_tokens, **sampling)
    packer = make_packer()
    packed = []
    is_settled = False
    while not is_settled:  # the ranks hear of every step, the large ones too
        plan = engine.scheduler.plan(0.0)
        packer(plan)
        engine.finish(plan)
        is_settled = plan.num_tokens == RUNNING
    gc.collect()
    for _ in range(2 * repeats):
        began = time.thread_time()
        plan = engine.scheduler.plan(0.0)
        message = packer(plan)
        packed.append(((time.thread_time() - began) * 1e3, len(message)))
        assert plan.num_tokens == RUNNING
        engine.finish(plan)
    return packed


def measure_decode(curves, repeats):
    kinds = {
        "plain": {},
        "repetition": {"repetition_penalty": 1.1},
        "frequency": {"frequency_penalty": 0.5},
    }
    for context in CONTEXTS:
        for kind, sampling in kinds.items():
            times, sizes = zip(*decode_steps(context, 0, repeats, **sampling), strict=True)
            curves.add(f"decode_{kind}", context, times)
            curves.add(f"decode_{kind}_bytes", context, sizes)
    for num_output in OUTPUTS:
        steps = decode_steps(128, num_output, repeats, **kinds["frequency"])
        times, sizes = zip(*steps, strict=True)
        curves.add("frequency_by_output", num_output, times)
        curves.add("frequency_by_output_bytes", num_output, sizes)


# --- block pool -----------------------------------------------------------------------------------


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4_096


def fill(num_blocks):
    """A pool whose every block is cached, by prompts of 128 blocks that have been answered."""
    engine = Engine(num_blocks, step_tokens=2_048, max_sequences=1)
    while (left := num_blocks - engine.pool.num_cached) > 0:
        engine.submit(engine.prompt(min(128, left) * BLOCK_SIZE_TOKENS), max_tokens=1)
        engine.step()
    return engine.pool


def churn(pool):
    return cpu_ms(lambda: pool.free(pool.allocate(100)), 5, inner=20)


def pool_alone(num_blocks):
    """In a process of its own: what the operating system says of a pool full of cached blocks."""
    fill(1_000)
    before = resident_bytes()
    found = {"allocate_free_100": churn(make_pool(num_blocks))}
    pool = fill(num_blocks)
    found["bytes_a_cached_block"] = [(resident_bytes() - before) / num_blocks]
    held = []
    found["evict_100"] = cpu_ms(lambda: held.extend(pool.allocate(100)), 20)
    pool.free(held)
    found["drop_cache"] = cpu_ms(pool.drop_cache, 1)
    print(json.dumps(found))


def measure_pool(curves, repeats):
    for num_blocks in CACHED_BLOCKS:
        for _ in range(2 if num_blocks >= 1_000_000 else repeats):
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.scaling", "--pool-alone", str(num_blocks)],
                capture_output=True,
                text=True,
                check=True,
            )
            for name, samples in json.loads(done.stdout).items():
                curves.add(name, num_blocks, samples)


# --- all ------------------------------------------------------------------------------------------

PARTS = {
    "router": measure_router,
    "scheduler": measure_scheduler,
    "decode": measure_decode,
    "pool": measure_pool,
}


def show(curves, console):
    table = Table("what", "median by size", "aim at the largest", "")
    for name, rows in curves.items():
        unit, aim = AIMS[name]
        figures = "  ".join(f"{r['size']:,}: {r['median']:.4g}" for r in rows)
        verdict = "" if aim is None else "met" if rows[-1]["median"] <= aim else "missed"
        table.add_row(f"{name} ({unit})", figures, "" if aim is None else f"{aim:g}", verdict)
    console.print(table)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="scaling", help="name of the result file")
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--pool-alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pool_alone:
        pool_alone(options.pool_alone)
        return
    console = Console(width=160)
    curves = Curves()
    for part in options.part:
        began = time.monotonic()
        PARTS[part](curves, options.repeats)
        console.print(f"{part}: {time.monotonic() - began:.0f} s", style="dim")
    rows = curves.rows()
    show(rows, console)
    aims = {name: {"unit": unit, "at_most": aim} for name, (unit, aim) in AIMS.items()}
    result = {"note": options.note, "aims": aims, "curves": rows}
    console.print(save(options.out, result))


if __name__ == "__main__":
    main()
