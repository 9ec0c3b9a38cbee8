"""Where a figure comes from: commit, machine, command; and where it goes.

Owns the JSON envelope of every result. Called by the benchmarks.
"""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def quantiles(values):
    """p50, p95, p99, mean and count of a list."""
    ordered = sorted(values)

    def at(share):
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    return {
        "p50": at(0.5),
        "p95": at(0.95),
        "p99": at(0.99),
        "mean": sum(ordered) / len(ordered),
        "count": len(ordered),
    }


def save(name, result):
    """Write a result with its origin; returns the path."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    import os

    program = Path(sys.argv[0])
    module = f"benchmarks.{program.parent.name if program.stem == '__main__' else program.stem}"
    envelope = {
        "commit": git.stdout.strip(),
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **result,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(envelope, indent=2) + "\n")
    return path
