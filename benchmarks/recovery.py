"""What a client sees when the decode worker is killed in mid-stream: gap, tokens, end, replacement.

Trials with path auto (an attempt elsewhere is possible) and with pd forced (it is not), on a local
Ray. Run: python -m benchmarks.recovery [--trials N]
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from urllib.request import Request, urlopen

from rich.console import Console
from rich.table import Table

from benchmarks.record import save

BODY = {"prompt": "import os", "max_tokens": 600, "temperature": 0, "ignore_eos": True}


def start(path):
    """`baton up` on a local Ray; returns the process and the HTTP address."""
    environment = {
        **os.environ,
        "BATON_PLACEMENT__PATH": path,
        "BATON_PLACEMENT__LOCAL_BELOW_TOKENS": "0",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "cli.main", "up", "--http-port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    output = ""
    for line in process.stdout:
        output += line
        if "try: baton" in line:
            break
    return process, re.search(r"http://127.0.0.1:\d+", output)[0]


def get(url, path):
    """GET JSON, also from a 503."""
    try:
        with urlopen(url + path, timeout=10) as reply:
            return json.loads(reply.read())
    except OSError as error:
        return json.loads(error.read()) if hasattr(error, "read") else {}


def wait_ready(url):
    """Wait for the canary; returns seconds."""
    started = time.monotonic()
    while not get(url, "/ready").get("ready"):
        time.sleep(0.1)
    return time.monotonic() - started


def stream(url, kill_after=None):
    """Stream a completion; optionally kill the decode worker after some tokens."""
    request = Request(url + "/v1/completions", json.dumps({**BODY, "stream": True}).encode())
    text, error, stamps, killed_at = "", None, [], None
    with urlopen(request, timeout=60) as reply:
        for raw in reply:
            line = raw.decode().strip()
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            error = event.get("error") or error
            for choice in event.get("choices", []):
                text += choice["text"]
                stamps.append(time.monotonic())
            if kill_after is not None and killed_at is None and len(text) > kill_after:
                pid = next(
                    r["pid"]
                    for r in get(url, "/replicas")["replicas"]
                    if r["role"] == "decode" and r["state"] == "live"
                )
                os.kill(pid, signal.SIGKILL)
                killed_at = time.monotonic()
    after = [t for t in stamps if killed_at is not None and t > killed_at]
    gap = (
        max((b - a for a, b in zip([killed_at, *after], after, strict=False)), default=None)
        if killed_at is not None
        else None
    )
    return {
        "text": text,
        "error": error,
        "gap_s": gap,
        "end_s": time.monotonic() - killed_at if killed_at is not None else None,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for path in ("auto", "pd"):
        process, url = start(path)
        try:
            wait_ready(url)
            expected = stream(url)["text"]
            for _ in range(options.trials):
                result = stream(url, kill_after=60)
                replaced_s = wait_ready(url)
                time.sleep(8 if path == "auto" else 1)
                rows.append(
                    {
                        "path": path,
                        "gap_s": result["gap_s"],
                        "end_s": result["end_s"],
                        "ending": result["error"]["code"] if result["error"] else "finished",
                        "is_exact": expected.startswith(result["text"])
                        if result["error"]
                        else result["text"] == expected,
                        "ready_again_s": replaced_s,
                    }
                )
        finally:
            process.terminate()
            process.wait(timeout=60)
    table = Table(
        "path",
        "ending",
        "exact",
        "longest gap s",
        "ended after s",
        title="kill -9 of the only decode worker, on Ray",
    )
    for r in rows:
        gap = "-" if r["gap_s"] is None else f"{r['gap_s']:.2f}"
        table.add_row(r["path"], r["ending"], str(r["is_exact"]), gap, f"{r['end_s']:.2f}")
    Console().print(table)
    save("recovery", {"rows": rows})


if __name__ == "__main__":
    main()
