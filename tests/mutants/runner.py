"""A process that runs tests of a damaged tree again and again, each time in a fresh fork.

Owns the imports that stay the same from run to run (other people's packages, none of ours), the
forks, their limits and their end. Called by the command, one for each of its jobs: a JSON line in,
one out.
"""

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

PRELOADED = """
aiohttp asyncio cryptography.x509 hypothesis.stateful hypothesis.extra httpx jinja2 msgspec numba
numpy pydantic pytest pytest_asyncio tokenizers torch yaml google.protobuf.struct_pb2
""".split()
SEED_CPU_S = 10.0
LARGEST_BYTES = 6 << 30
"""A mutant that appends for ever ends itself, not the machine."""


class FirstFailure:
    """A pytest plugin: which test failed first."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for the set-up, call and tear-down of each test."""
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        """Called by pytest for each file."""
        if report.failed and not self.name:
            self.name = f"import of {report.nodeid}"


def run_tests(paths: list[str], timeout_s: float) -> str:
    """Run tests until one fails; returns its name, or nothing if all passed."""
    import pytest

    first = FirstFailure()
    options = ["-x", "-q", "-p", "no:cov", "-o", f"timeout={timeout_s}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins were loaded before
    code = pytest.main([*options, *paths], plugins=[first])
    if code not in (0, 1, 2) or (code and not first.name):
        return f"pytest ended with code {code}"
    return first.name


def run_seeds(first: int, end: int) -> str:
    """Run seeds of the fault search until one violates something; returns which, or nothing."""
    from simulation.loads import make_plan
    from simulation.trial import run_trial

    signal.signal(signal.SIGPROF, _end_seed)
    for seed in range(first, end):
        signal.setitimer(signal.ITIMER_PROF, SEED_CPU_S)
        try:
            report = run_trial(make_plan(seed))
        except (Exception, SeedHangs) as error:  # noqa: BLE001 - whatever it raises, it was noticed
            return f"seed {seed}: {type(error).__name__}: {error}"[:200]
        wrong = [v for v in report.violations if not v.startswith("H1")]
        if wrong:
            return f"seed {seed}: {wrong[0]}"[:200]
    return ""


class SeedHangs(BaseException):  # noqa: N818 - no code of ours may catch it
    """A seed took far more CPU time than any does."""


def _end_seed(*_: object) -> None:
    raise SeedHangs(f"still running after {SEED_CPU_S} s of CPU time")


def run_stage(stage: dict[str, Any]) -> str:
    """Run tests or seeds; returns what noticed a bug, or nothing."""
    if "tests" in stage:
        return run_tests(stage["tests"], stage["timeout_s"])
    return run_seeds(*stage["seeds"])


def fork_and_run(stage: dict[str, Any], log: Path) -> dict[str, Any]:
    """Run a stage in a fork with its limits; returns what noticed,
    whether in time, CPU and wall s."""
    began_s = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(stage, log, writing)
    os.close(writing)
    ready = select.select([reading, sys.stdin], [], [], stage["limit_s"])[0]
    is_done = reading in ready
    said = os.read(reading, 1 << 16) if is_done else b""
    os.close(reading)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, _, usage = os.wait4(pid, 0)
    if sys.stdin in ready:  # nobody sends before the answer: it is closed, so nobody waits for it
        sys.exit("the command that started the tests is gone")
    result = {"by": "", "is_timed_out": not is_done}
    if is_done:  # nothing said: it died of a limit or of itself, and either was noticed
        result["by"] = json.loads(said)["by"] if said else "the process died"
    result["cpu_s"] = round(usage.ru_utime + usage.ru_stime, 2)
    result["wall_s"] = round(time.monotonic() - began_s, 2)
    return result


def _child(stage: dict[str, Any], log: Path, writing: int) -> None:
    """The fork: never returns."""
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (LARGEST_BYTES, LARGEST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.dont_write_bytecode = not stage["is_baseline"]
        by = run_stage(stage)
        os.write(writing, json.dumps({"by": by}).encode())
    except BaseException as error:  # noqa: BLE001 - a boundary: the parent hears of everything
        os.write(writing, json.dumps({"by": f"{type(error).__name__}: {error}"[:500]}).encode())
    finally:
        os._exit(0)


def main() -> None:
    """Serve stages until the input ends; the working directory is the damaged tree."""
    for name in PRELOADED:
        importlib.import_module(name)
    ours = {n for n in sys.modules if (Path.cwd() / n.partition(".")[0]).is_dir()} - {"mutants"}
    assert not ours, f"loaded before the fork, so damage to them would not show: {ours}"
    log = Path(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(fork_and_run(json.loads(line), log)), flush=True)


if __name__ == "__main__":
    main()
