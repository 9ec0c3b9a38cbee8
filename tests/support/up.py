"""`baton up` as a user starts it, with its servers on free ports."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from support.tree import ROOT

BATON = [sys.executable, "-m", "cli.main"]


def is_of_this_run(folder):
    """Whether a process was started by this run of the suite, or by Ray, whose workers forget it.

    What neither started is somebody else's: a Redis of the machine, a search for one of the words.
    """
    names = dict(v.partition(b"=")[::2] for v in (folder / "environ").read_bytes().split(b"\0"))
    run = names.get(b"TEST_RUN")
    if run is None:
        return any(name.startswith(b"RAY_") for name in names)
    return run == os.environ["TEST_RUN"].encode()


def processes(word):
    """Pids of live processes whose command line holds a word."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if word not in command or state == "Z" or not is_of_this_run(folder):
                    continue
            except OSError:
                continue
            found.add(int(folder.name))
    return found


OURS = (
    "cluster.child",
    "engine.ranks.rank",
    "router.text.tokenizer_child",
    "redis-server",
    "valkey-server",
    "raylet",
    "gcs_server",
    "ray::",
    "cli.main up",
)


def our_processes():
    return {pid for word in OURS for pid in processes(word)}


def wait_gone(before, timeout_s=15):
    """Wait until no process of ours is left but those from before; returns what is left."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and our_processes() - before:
        time.sleep(0.1)
    return our_processes() - before


class Up:
    """A running `baton up`."""

    def __init__(self, *arguments, timeout_s=120, key="", **settings):
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self.kind = "local" if "--local" in arguments else "ray"
        self.before = our_processes()
        self.process = subprocess.Popen(
            [*BATON, "up", "--http-port", "0", "--grpc-port", "0", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "200", **settings},
            start_new_session=True,
        )
        self.lines = []
        is_up = threading.Event()

        def drain():  # to the end: a full pipe would be a slow reader of the request log
            for line in self.process.stdout:
                self.lines.append(line)
                if "try: baton generate" in line:
                    is_up.set()
            is_up.set()

        self.reader = threading.Thread(target=drain, daemon=True)
        self.reader.start()
        assert is_up.wait(timeout_s), self.output
        http, grpc = (
            re.search(r"http://127.0.0.1:(\d+)", self.output),
            re.search(r"--grpc 127.0.0.1:(\d+)", self.output),
        )
        assert http and grpc, self.output
        self.url, self.grpc = f"http://127.0.0.1:{http[1]}", f"127.0.0.1:{grpc[1]}"
        self.wait_ready()

    @property
    def output(self):
        return "".join(self.lines)

    def logged(self, request_id, timeout_s=10):
        """The request log's line."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for line in self.lines:
                if line.startswith("{") and json.loads(line).get("request_id") == request_id:
                    return json.loads(line)
            time.sleep(0.05)
        raise AssertionError(f"no log line of {request_id}")

    def wait_ready(self, timeout_s=40):
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            try:
                reply = httpx.get(f"{self.url}/ready", headers=self.headers)
                if reply.status_code == 200:
                    return reply.json()
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready: {self.output}")

    def complete(self, prompt="def main(", **fields):
        headers = {"x-baton-timing": "1"}
        body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, **fields}
        return httpx.post(
            f"{self.url}/v1/completions", content=json.dumps(body), headers=headers, timeout=60
        )

    def status(self):
        done = subprocess.run(
            [*BATON, "status", "--url", self.url, "-o", "json"],
            capture_output=True,
            text=True,
            check=False,
        )
        return json.loads(done.stdout)["replicas"]

    def end(self, number=signal.SIGTERM, timeout_s=30):
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=timeout_s)
        self.reader.join(timeout=10)
        self.process.stdout.close()
        return code, wait_gone(self.before)


def idle(local):
    """Wait until no block is held anywhere."""
    for _ in range(80):
        loads = [r["load"] for r in httpx.get(f"{local.url}/replicas").json()["replicas"]]
        if all(
            x["running"] == 0
            and x["waiting"] == 0
            and x["free_blocks"] + x["cached_blocks"] == x["total_blocks"]
            for x in loads
        ):
            return True
        time.sleep(0.1)
    return loads
