"""Memory of an idle demo cluster on Ray, as proportional set size (PSS) per kind of process.

Run: python -m benchmarks.footprint
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from rich.console import Console
from rich.table import Table

from benchmarks.record import save
from process.orphan_reaper import VARIABLE


def cluster_processes(parent):
    """Pids that belong to the cluster: the parent and all that carry its marker."""
    marker = next(
        (
            v
            for v in Path(f"/proc/{parent}/environ").read_bytes().split(b"\0")
            if v.startswith(VARIABLE.encode())
        ),
        None,
    )
    pids = [parent]
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != parent:
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue
            if VARIABLE.encode() in environment and (marker is None or marker in environment):
                pids.append(int(folder.name))
    return pids


def pss_bytes(pid):
    """PSS of a process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def name_of(pid):
    """A short name."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    text = b" ".join(words).decode(errors="replace")
    for key in (
        "ServeReplica:baton:prefill",
        "ServeReplica:baton:decode",
        "ServeReplica:baton:router",
        "ServeController",
        "RedisActor",
        "redis-server",
        "engine.ranks.rank",
        "router.text.tokenizing",
        "raylet",
        "gcs_server",
        "DashboardAgent",
        "RuntimeEnvAgent",
        "log_monitor",
        "monitor.py",
        "dashboard.py",
        "cli.main",
        "ray::",
    ):
        if key in text:
            return key.removeprefix("ServeReplica:baton:")
    return words[0].decode(errors="replace").rsplit("/", 1)[-1]


def main():
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "up",
        "--http-port",
        "18800",
        "--grpc-port",
        "18900",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 90
        while time.monotonic() < until:
            try:
                with urlopen("http://127.0.0.1:18800/ready", timeout=2) as reply:
                    json.loads(reply.read())
                    break
            except OSError:
                time.sleep(0.3)
        time.sleep(5)
        rows = {}
        for pid in cluster_processes(process.pid):
            try:
                rows.setdefault(name_of(pid), []).append(pss_bytes(pid))
            except OSError:
                continue
    finally:
        process.terminate()
        process.wait(timeout=60)
    total = sum(sum(v) for v in rows.values())
    table = Table("process", "count", "PSS MiB", title="idle demo cluster")
    for name, values in sorted(rows.items(), key=lambda item: -sum(item[1])):
        table.add_row(name, str(len(values)), f"{sum(values) / 2**20:.0f}")
    table.add_row("total", str(sum(map(len, rows.values()))), f"{total / 2**20:.0f}")
    Console().print(table)
    save("footprint", {"total_bytes": total, "processes": rows})


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    main()
