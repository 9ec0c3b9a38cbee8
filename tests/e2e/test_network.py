"""What a fresh cluster on Ray opens, to whom, and where its secrets go."""

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path

import grpc
import httpx
import pytest
from support.descriptors import LOOPBACK, descendants, listeners
from support.process_cluster import config_of

from client.stream import Client
from cluster.local import LocalCluster
from cluster.ray.probe import RayEndpoint, probe
from core.addresses import join_address
from process.orphan_reaper import VARIABLE, cluster_processes
from protos.baton.v1 import generation_pb2 as pb

IPV6_LOOPBACK = "00000000000000000000000001000000"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
ALLOWED = {
    "the driver": r"cli\.main up",
    "Ray's control store": r"/gcs_server ",
    "Ray's scheduler": r"/raylet/raylet ",
    "Ray's monitor and its metrics": r"/autoscaler/\S*monitor\.py",
    "Ray's dashboard process and its metrics": r"/dashboard/dashboard\.py",
    "Ray's agents": (
        r"^ray::(DashboardAgent|RuntimeEnvAgent)|/(dashboard|runtime_env/agent)/\S*\.py"
    ),
    "actors of Serve and replicas of ours": r"^ray::(Serve|RedisActor|IDLE)",
}
"""Whose sockets may listen; a new line here needs one in SECURITY.md."""


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def processes_of(up):
    """Every process of the cluster, and Ray's session folder."""
    family = descendants(up.process.pid)
    folders = {
        found[0] for p in family if (found := re.search(r"/\S*/session_[^/\s]+", command_of(p)))
    }
    assert len(folders) == 1
    environments = [Path(f"/proc/{p}/environ").read_bytes().split(b"\0") for p in family]
    marks = {v.decode() for e in environments for v in e if v.startswith(VARIABLE.encode())}
    assert len(marks) == 1
    found = cluster_processes(marks.pop().partition("=")[2], list(folders), {os.getpid()})
    return family | set(found), Path(folders.pop())


def memory_of(pid):
    """Yield every writable stretch of a process's memory."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode = line.split()[:2]
            first, end = (int(part, 16) for part in span.split("-"))
            with contextlib.suppress(OSError):  # unmapped meanwhile
                if mode.startswith("rw"):
                    memory.seek(first)
                    yield memory.read(end - first)


@pytest.mark.sampled(3)
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_fresh_cluster_on_ray_listens_on_loopback_alone_and_keeps_secrets_out_of_ray(start):
    up = start(timeout_s=300)
    pids, session = processes_of(up)
    by_pid = {pid: (command_of(pid), listeners({pid})) for pid in pids if command_of(pid)}
    unlisted = [
        command
        for command, sockets in by_pid.values()
        if sockets and not any(re.search(pattern, command) for pattern in ALLOWED.values())
    ]
    assert unlisted == []
    everywhere = [
        (command, port)
        for command, sockets in by_pid.values()
        for address, port in sockets
        if address not in LOOPBACK
    ]
    # Serve binds one port of each replica to every address, and leaves nobody a say in it.
    assert [c for c, _ in everywhere if not c.startswith("ray::ServeReplica:baton:")] == []
    assert len(everywhere) == 3
    assert {call_of_a_stranger(port) for _, port in everywhere} == {UNAUTHENTICATED}
    assert sum(len(sockets) for _, sockets in by_pid.values()) > 12, "the search is blind"

    (gcs,) = (pid for pid, (command, _) in by_pid.items() if "/gcs_server " in command)
    ((_, port),) = by_pid[gcs][1]
    assert probe(f"127.0.0.1:{port}") == RayEndpoint(has_tokens=True, has_tls=False)
    agents = [s for c, s in by_pid.values() if "DashboardAgent" in c or "dashboard/agent.py" in c]
    replies = [job_of_a_stranger(port) for sockets in agents for _, port in sockets]
    assert 401 in replies
    assert 200 not in replies

    servers = [p for p in pids if re.search(r"/(redis|valkey)-server", command_of(p))]
    assert len(servers) == 1
    assert not listeners(set(servers))
    folder = Path(f"/proc/{servers[0]}/cwd").readlink()
    url = (folder / "url").read_text()
    # The replicas' arguments stand in the control store: names of files do, what is in them does
    # not.
    named = re.compile(rb"file:(/[\w/.-]+/baton-secrets-\w+/security\.cluster_key)")
    names = {name for held in memory_of(gcs) for name in named.findall(held)}
    assert len(names) == 1
    key = Path(names.pop().decode())
    secret = key.read_bytes()
    password = url.split(":")[2].partition("@")[0].encode()
    assert len(secret) > 30
    assert len(password) > 30
    assert not any(secret in held or password in held for held in memory_of(gcs))
    for file in session.rglob("*"):
        if file.is_file():
            assert password not in file.read_bytes(), file.name
    code, left = up.end()
    assert (code, left) == (0, set())
    assert not folder.exists()
    assert not key.parent.exists()


def call_of_a_stranger(port):
    """Call a replica through Serve without a token; returns how it ends."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=20)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def job_of_a_stranger(port):
    """Try to have Ray's agent run a command; returns the HTTP status, 0 for what speaks no HTTP."""
    try:
        url = f"http://127.0.0.1:{port}/api/job_agent/jobs/"
        return httpx.post(url, json={"entrypoint": "true"}, timeout=5).status_code
    except httpx.HTTPError:
        return 0


@pytest.mark.timeout(300)
async def test_servers_on_an_ipv6_address_answer_where_they_say_they_are():
    cluster = LocalCluster(
        config_of(
            router__host="[::1]",
            router__replicas=1,
            pools__prefill__replicas=1,
            pools__decode__replicas=1,
        )
    )
    await cluster.start()
    try:
        address = join_address("::1", cluster.grpc_port)
        url = f"http://{join_address('::1', cluster.http_port)}"
        async with httpx.AsyncClient(base_url=url, timeout=60) as http, Client([address]) as client:
            reply = await http.post("/v1/completions", json={"prompt": "def", "max_tokens": 2})
            assert reply.status_code == 200
            request = pb.GenerateRequest(text="def", stopping=pb.StoppingOptions(max_tokens=2))
            messages = [message async for message in client.generate(request)]
        assert messages[-1].summary.usage.completion_tokens == 2
        servers = {
            port: address
            for address, port in listeners({c.process.pid for c in cluster._routers.values()})
        }
        assert set(servers.values()) == {IPV6_LOOPBACK}
        metrics_port = cluster.routers[0].metrics_port
        assert set(servers) == {cluster.http_port, cluster.grpc_port, metrics_port}
    finally:
        await cluster.stop()


@pytest.mark.timeout(300)
async def test_every_router_tells_where_all_show_their_metrics_and_keeps_its_port():
    config = config_of(pools__prefill__replicas=1, pools__decode__replicas=1)
    cluster = LocalCluster(config)
    await cluster.start()
    try:
        ports = {f"127.0.0.1:{entry.metrics_port}" for entry in cluster.routers.values()}
        assert len(ports) == 2
        killed = cluster.routers[1]
        async with httpx.AsyncClient(timeout=60) as http:
            for address in ports:
                assert await targets_at(http, address) == ports
                assert (await http.get(f"http://{address}/v1/models")).status_code == 404
            os.kill(killed.pid, signal.SIGKILL)
            async with asyncio.timeout(120):
                while cluster.routers[1].pid == killed.pid:
                    await asyncio.sleep(0.1)
            again = cluster.routers[1]
            assert again.router_id != killed.router_id
            assert again.metrics_port == killed.metrics_port
            assert await targets_at(http, f"127.0.0.1:{again.metrics_port}") == ports
    finally:
        await cluster.stop()


async def targets_at(http, address):
    """Where a router says that all of them show their metrics."""
    groups = (await http.get(f"http://{address}/metrics/targets")).json()
    return {target for group in groups for target in group["targets"]}
