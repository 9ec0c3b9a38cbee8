"""A new user's first minutes, timed: clone, `make demo` twice, unit tests, the whole suite.

Needs a package cache to be comparable. Run: python -m benchmarks.clean_clone
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks.record import save

ROOT = Path(__file__).parent.parent


def timed(command, folder):
    """Run a command; returns seconds, the last line of its output and, of tests, the slowest."""
    environment = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("VIRTUAL_ENV", "BATON_", "PYTHONPATH"))
    }
    environment["PYTEST_ADDOPTS"] = "--durations=40"
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment, check=False
    )
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(
            f"{command} failed after {seconds:.0f} s:\n{done.stdout[-20000:]}\n"
            f"{done.stderr[-2000:]}"
        )
    slowest = re.findall(r"^ *[0-9.]+s (?:call|setup|teardown) .*$", done.stdout, re.M)
    return (
        seconds,
        done.stdout.strip().splitlines()[-1],
        [" ".join(line.split()) for line in slowest],
    )


def main():
    folder = Path(tempfile.mkdtemp()) / "baton"
    console, rows = Console(), {}
    try:
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        for name, command in (
            ("demo_first", ["make", "demo"]),
            ("demo_second", ["make", "demo"]),
            ("unit_tests", ["make", "test-unit"]),
            ("check", ["make", "check"]),
            ("suite", ["make", "test"]),
        ):
            seconds, last, slowest = timed(command, folder)
            rows[name] = {
                "command": " ".join(command),
                "seconds": round(seconds, 1),
                "last_line": last,
            }
            console.print(name, rows[name])
            if slowest:
                rows[name]["slowest"] = slowest
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)
    save("clean_clone", {"rows": rows})


if __name__ == "__main__":
    main()
