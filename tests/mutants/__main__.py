"""`make mutants`: draw mutants, run for each what is cheapest first, say which nobody noticed.

Owns the options, the copies of the tree, the journal that lets a run go on after an interruption,
and the report. Does not know the operators nor how tests run. Called by `make mutants`:

    make mutants                                 200 of the heart, others each day; saved
    make mutants MUTANTS="--count 20 --seed 7"   fewer, the same each time
    make mutants MUTANTS="--again"               only the survivors of the saved run
    make mutants MUTANTS="--given planted.bugs"  the bugs of a list, whatever should catch each
"""

import argparse
import asyncio
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from support.tree import ROOT, copy_tree

from mutants.equivalents import EQUIVALENTS
from mutants.operators import Mutant, mutants_of
from mutants.plan import MODULES, TEST_TIMEOUT_S, given, sample, stages_of

JOURNALS = ROOT / ".mutants"
BASELINE_LIMIT_S = 600
LINE_LIMIT_BYTES = 1 << 20
LATER_S = 1000
"""A damaged file is this much younger, so that nothing compiled
from the whole one is used for it."""


class Job:
    """A copy of the tree and the process that runs tests in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def start(self) -> None:
        """Start the process; the copy exists."""
        paths = [self.folder, self.folder / "tests"]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONHASHSEED": "0",
        }
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mutants.runner",
            str(self.folder / "output.txt"),
            cwd=self.folder,
            env=env,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_LIMIT_BYTES,
        )

    async def run(self, stage: dict[str, Any], limit_s: float, *, is_baseline: bool) -> Any:
        """Run a stage; returns what noticed a bug, whether it was out of time, CPU and wall s."""
        order = {
            **stage,
            "limit_s": limit_s,
            "is_baseline": is_baseline,
            "timeout_s": BASELINE_LIMIT_S if is_baseline else TEST_TIMEOUT_S,
        }
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        line = await self.process.stdout.readline()
        if not line:
            sys.exit(f"the process that runs the tests ended; see {self.folder}/output.txt")
        return json.loads(line)

    async def stop(self) -> None:
        """End the process."""
        if self.process.returncode is None:
            self.process.stdin.close()
            await self.process.wait()

    def write(self, mutant: Mutant | None, path: str) -> None:
        """Damage a file of the copy, or mend it."""
        source, target = ROOT / path, self.folder / path
        text = source.read_text()
        target.write_text(text if mutant is None else mutant.applied(text))
        at_s = source.stat().st_mtime + (0 if mutant is None else LATER_S)
        os.utime(target, (at_s, at_s))


class Run:
    """One run: what is to be tried, what was found so far."""

    def __init__(self, options: argparse.Namespace, mutants: list[Mutant]) -> None:
        self.options = options
        self.mutants = mutants
        self.known = {e.key: e.reason for e in EQUIVALENTS}
        self.results: dict[Mutant, dict[str, Any]] = {}
        self.limits_s: dict[str, float] = {}
        self.queue: asyncio.Queue[Mutant] = asyncio.Queue()
        self.journal = JOURNALS / f"{self._digest()}.jsonl"

    def _digest(self) -> str:
        """Names the run: the mutants, the options that matter, and every file they are tried on."""
        options = (self.options.seeds, self.options.far)
        digest = hashlib.sha256(repr((self.mutants, options)).encode())
        for folder in ("core", "engine", "kv_transfer", "worker", "router", "simulation", "tests"):
            for path in sorted((ROOT / folder).rglob("*.py")):
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def resume(self) -> None:
        """Take over what an interrupted run of the same mutants on the same tree has found."""
        if self.journal.exists():
            lines = [json.loads(line) for line in self.journal.read_text().splitlines()]
            found = {(r["path"], r["start"], r["text"]): r for r in lines}
            self.results = {
                m: found[key] for m in self.mutants if (key := (m.path, m.start, m.text)) in found
            }
        for mutant in self.mutants:
            if mutant not in self.results:
                self.queue.put_nowait(mutant)

    async def run(self, folder: Path) -> None:
        """Try all that is left, in `jobs` copies at once."""
        first = Job(folder / "0")
        first.folder.mkdir()
        copy_tree(first.folder)
        await first.start()
        jobs = [first]
        try:
            await self._baseline(first)
            for index in range(1, self.options.jobs):
                jobs.append(Job(folder / str(index)))
                shutil.copytree(first.folder, jobs[-1].folder)
                await jobs[-1].start()
            await asyncio.gather(*(self._work(job) for job in jobs))
        finally:
            for job in jobs:
                await job.stop()

    def _stages(self, path: str) -> list[dict[str, Any]]:
        return stages_of(path, self.options.seeds, self.options.far)

    async def _baseline(self, job: Job) -> None:
        """Every stage on the whole tree: it must pass, and sets how long a damaged one may take."""
        for path in sorted({m.path for m in self.mutants}):
            for stage in self._stages(path):
                name = json.dumps(stage)
                if name in self.limits_s:
                    continue
                found = await job.run(stage, BASELINE_LIMIT_S, is_baseline=True)
                if found["by"] or found["is_timed_out"]:
                    sys.exit(f"fails without any mutant, so it proves nothing: {found}")
                self.limits_s[name] = TEST_TIMEOUT_S + 5 * found["wall_s"]
                self._say(f"whole tree, {path}, {stage['name']}: {found['cpu_s']} s of CPU time")

    async def _work(self, job: Job) -> None:
        while not self.queue.empty():
            mutant = self.queue.get_nowait()
            result = {**asdict(mutant), **await self._try(job, mutant)}
            self.results[mutant] = result
            JOURNALS.mkdir(exist_ok=True)
            with self.journal.open("a") as out:
                out.write(json.dumps(result) + "\n")
            self._say(
                f"{len(self.results)}/{len(self.mutants)} {result['outcome']}: "
                f"{mutant.path}:{mutant.line} {mutant.operator} ({result['cpu_s']} s) "
                f"{result['by'][:90]}"
            )

    async def _try(self, job: Job, mutant: Mutant) -> dict[str, Any]:
        result = {"outcome": "survived", "stage": "", "by": "", "cpu_s": 0.0}
        if mutant.key in self.known:
            return {**result, "outcome": "equivalent", "by": self.known[mutant.key]}
        job.write(mutant, mutant.path)
        try:
            for stage in self._stages(mutant.path):
                found = await job.run(stage, self.limits_s[json.dumps(stage)], is_baseline=False)
                result["cpu_s"] = round(result["cpu_s"] + found["cpu_s"], 2)
                if found["by"] or found["is_timed_out"]:
                    outcome = "timed out" if found["is_timed_out"] else "killed"
                    return {**result, "outcome": outcome, "stage": stage["name"], "by": found["by"]}
        finally:
            job.write(None, mutant.path)
        return result

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def report(self) -> dict[str, Any]:
        """Counts and survivors, as plain values."""
        rows = [self.results[m] for m in self.mutants if m in self.results]
        outcomes = Counter(r["outcome"] for r in rows)
        noticed = outcomes["killed"] + outcomes["timed out"]
        tried = noticed + outcomes["survived"]
        modules = {
            path: dict(Counter(r["outcome"] for r in rows if r["path"] == path))
            for path in sorted({r["path"] for r in rows})
        }
        kept = ("path", "line", "operator", "before", "after")
        return {
            "seed": self.options.seed,
            "mutants": len(rows),
            "outcomes": dict(outcomes),
            "noticed_share": round(noticed / tried, 3) if tried else None,
            "seeds_of_the_fault_search": self.options.seeds,
            "cpu_s_a_mutant": round(sum(r["cpu_s"] for r in rows) / max(len(rows), 1), 1),
            "stages": dict(Counter(r["stage"] for r in rows if r["stage"])),
            "modules": modules,
            "survivors": [{k: r[k] for k in kept} for r in rows if r["outcome"] == "survived"],
            "equivalents": [
                {**{k: r[k] for k in kept}, "reason": r["by"]}
                for r in rows
                if r["outcome"] == "equivalent"
            ],
        }


def as_table(report: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'module':32} {'killed':>9} {'timed out':>9} {'survived':>9} {'equivalent':>10}"]
    for path, found in [*report["modules"].items(), ("all", report["outcomes"])]:
        cells = [found.get(name, 0) for name in ("killed", "timed out", "survived", "equivalent")]
        lines.append(f"{path:32} {cells[0]:9} {cells[1]:9} {cells[2]:9} {cells[3]:10}")
    for r in report["survivors"]:
        lines += [
            "",
            f"{r['path']}:{r['line']} {r['operator']}",
            f"  - {r['before']}",
            f"  + {r['after']}",
        ]
    lines.append(
        f"\nnoticed: {report['noticed_share']}, {report['cpu_s_a_mutant']} s of CPU time a mutant"
    )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("modules", nargs="*", help="files to draw from; all of the heart if none is named")
    add("--count", type=int, default=200, help="how many mutants")
    add("--seed", type=int, default=0, help="of the draw; a fresh one each day if left out")
    add("--seeds", type=int, default=40, help="of the fault search, for what no test noticed")
    add("--jobs", type=int, default=1, help="copies of the tree tried at once")
    add("--no-far", dest="far", action="store_false", help="no tests on real models and wires")
    add("--again", action="store_true", help="only the survivors of the last saved run")
    add("--given", default="", metavar="MODULES", help="the BUGS of modules, instead of a draw")
    add("--save", action="store_true", help="to benchmarks/results/mutants.json")
    add("-o", "--output", choices=("table", "json"), default="table")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Mutant]:
    """The mutants that the options ask for."""
    if options.given:
        lists = (importlib.import_module(name).BUGS for name in options.given.split(","))
        return given([bug for bugs in lists for bug in bugs])
    if options.again:
        last = json.loads((ROOT / "benchmarks/results/mutants.json").read_text())["survivors"]
        wanted = {(s["path"], s["before"], s["after"]) for s in last}
        paths = sorted({path for path, _, _ in wanted})
        return [m for p in paths for m in mutants_of(p, (ROOT / p).read_text()) if m.key in wanted]
    options.seed = options.seed or int(datetime.now(UTC).strftime("%Y%m%d"))
    return sample(options.modules or MODULES, options.count, options.seed)


def main() -> None:
    """Run, report, save."""
    options = parse()
    run = Run(options, chosen(options))
    run.resume()
    if not run.queue.empty():
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            asyncio.run(run.run(Path(folder)))
    report = run.report()
    if options.save:
        sys.path.insert(0, str(ROOT))
        from benchmarks.record import save

        command = " ".join(["make mutants", *(f'MUTANTS="{a}"' for a in [" ".join(sys.argv[1:])])])
        save("mutants", {**report, "command": command})
    print(json.dumps(report, indent=2) if options.output == "json" else as_table(report))


if __name__ == "__main__":
    main()
