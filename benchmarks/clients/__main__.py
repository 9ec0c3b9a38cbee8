"""Other people's clients against a closed cluster. Run: python -m benchmarks.clients

Owns the environments, a cluster with an API key, and the record. Does not know what is called:
that is in `python_calls.py` and `node_calls.mjs`. Needs npm, and the package registries.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from rich.console import Console

from benchmarks import compatibility
from benchmarks.record import RESULTS, save
from cluster.local import LocalCluster
from core.config import load_config
from router.access.credentials import new_key

HERE = Path(__file__).parent
LIMIT_S = 300.0
MODEL = "baton-tiny"


def python_clients(folder):
    """An environment with the pinned Python clients alone; returns the command."""
    venv.create(folder / "venv", with_pip=True)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--requirement", HERE / "requirements.txt"], check=True)
    return [folder / "venv/bin/python", HERE / "python_calls.py"]


def node_clients(folder):
    """The same for JavaScript."""
    for name in ("package.json", "package-lock.json", "node_calls.mjs"):
        (folder / name).write_bytes((HERE / name).read_bytes())
    subprocess.run(["npm", "ci", "--silent"], cwd=folder, check=True)
    return ["node", folder / "node_calls.mjs"]


async def outcomes(command, url, key):
    """What became of each call, as the clients' process wrote it."""
    arguments = [*map(str, command), f"{url}/v1", key, MODEL]
    child = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    async with asyncio.timeout(LIMIT_S):
        lines, _ = await child.communicate()
    if child.returncode:
        raise SystemExit(f"{command[-1].name} ended with {child.returncode}")
    return [json.loads(line) for line in lines.splitlines()]


async def run(folder, status):
    """Make every call of every client on a cluster with an API key."""
    status.update("environments")
    commands = [python_clients(folder), node_clients(folder)]
    key, line = new_key("clients", "standard")
    keys = folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(line + "\n")
    flags = {"router.http_port": 0, "router.grpc_port": 0, "security.api_keys": str(keys)}
    status.update("a cluster")
    cluster = LocalCluster(load_config(None, flags, {}))
    await cluster.start()
    try:
        url = f"http://127.0.0.1:{cluster.http_port}"
        calls = []
        for command in commands:
            status.update(f"calls of {command[-1].name}")
            calls += await outcomes(command, url, key)
        return calls
    finally:
        await cluster.stop()


def main():
    console = Console()
    with tempfile.TemporaryDirectory() as name, console.status("") as status:
        calls = asyncio.run(run(Path(name), status))
    save("clients", {"calls": calls})
    tests = RESULTS / "compatibility.json"
    compatibility.write(json.loads(tests.read_text())["tests"], tests)
    faults = [call for call in calls if call["fault"]]
    for call in faults:
        console.print(f"{call['client']}: {call['call']}: {call['fault']}", markup=False)
    console.print(f"{len(calls) - len(faults)} of {len(calls)} calls are right")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
