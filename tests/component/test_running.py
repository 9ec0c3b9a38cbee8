"""`baton down` finds a cluster from its start to its end."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from cli import instances as running
from core.errors import ConfigError

STARTING = """
import asyncio, sys
from cluster import local
from cli import up

async def start(self):
    print("starting", flush=True)
    await asyncio.Event().wait()

local.LocalCluster.start = start
ports = {"router.http_port": int(sys.argv[1]), "router.grpc_port": 0}
up.run_up(None, ports, "", is_local=True)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "baton"


@contextlib.contextmanager
def begun(port=0):
    """A `baton up` whose workers never come up."""
    command = [sys.executable, "-c", STARTING, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert any("starting" == line.strip() for line in process.stdout)
            yield process
        finally:
            process.kill()


def test_a_cluster_that_is_still_starting_is_found_and_ended(folder):
    with begun() as process:
        ended = running.stop()
        assert (ended.pid, ended.kind, process.wait(30)) == (process.pid, "local", 0)
    assert list(folder.iterdir()) == []
    with pytest.raises(ConfigError, match="no `baton up` of this user"):
        running.stop()


def test_the_port_is_known_as_soon_as_it_is(folder):
    with running.announced("local") as tell:
        tell(0, 0)
        (found,) = running.find_running()
        assert (found.pid, found.http_port) == (os.getpid(), 0)
        tell(8001, 9001)
        assert [(r.http_port, r.grpc_port) for r in running.find_running()] == [(8001, 9001)]
        with pytest.raises(ConfigError, match="with HTTP port 8002"):
            running.stop(8002)
    assert running.find_running() == []


def test_of_several_clusters_each_is_named_and_none_is_ended(folder, tmp_path):
    with running.announced("local", "baton-tiny", tmp_path / "a.yaml") as tell, begun() as other:
        tell(8001, 9001)
        with pytest.raises(ConfigError) as caught:
            running.stop()
        told = caught.value.message
        assert told.startswith("2 clusters run: ") and "choose one with --http-port" in told
        own = f"HTTP port 8001, config {tmp_path}/a.yaml, local, pid {os.getpid()}"
        assert f"baton-tiny ({own})" in told
        assert f"baton-tiny (still starting, local, pid {other.pid})" in told
        assert other.poll() is None


def test_a_cluster_of_an_older_version_is_found(folder):
    with running.announced("local") as tell:
        tell(8001, 9001)
        (path,) = folder.iterdir()
        tree = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in tree.items() if k not in ("model", "config")}))
        (found,) = running.find_running()
        assert str(found) == f"a cluster (HTTP port 8001, local, pid {os.getpid()})"
