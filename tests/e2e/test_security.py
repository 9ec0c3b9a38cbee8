"""The servers are closed: keys, tenants, certificates and roles,
and every listening socket accounted for."""

import asyncio
import contextlib
import re
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from support.descriptors import LOOPBACK, descendants, listeners
from support.process_cluster import config_of
from support.promql import unresolved

from client.stream import Client
from cluster.local import LocalCluster
from core.errors import Cancelled, ConfigError
from kv_transfer.transports.choice import read_address
from protos.baton.v1 import generation_pb2 as pb
from router.access.credentials import new_key
from router.access.identities import KeyRole
from transport.certificates import make_certificates

PROMPT = "def main(argv):\n    for value in argv: print(value, index, self)\n" * 3


@contextlib.asynccontextmanager
async def closed_cluster(folder):
    """A cluster with keys of two tenants, certificates inside and on the servers."""
    roles = {"scraper": KeyRole.METRICS, "operator": KeyRole.ADMIN}
    keys = {
        name: new_key(name, "standard", roles.get(name, KeyRole.TENANT))
        for name in ("acme", "bulk", *roles)
    }
    (folder / "keys").write_text("".join(line + "\n" for _, line in keys.values()))
    make_certificates(folder / "tls", ["localhost", "127.0.0.1"])
    config = config_of(
        router__replicas=1,
        pools__prefill__replicas=1,
        pools__decode__replicas=1,
        security__api_keys=str(folder / "keys"),
        security__tls_dir=str(folder / "tls"),
        security__door_certificate=str(folder / "tls/door.pem"),
        security__door_key=str(folder / "tls/door.key"),
        security__production=True,
    )
    cluster: Any = LocalCluster(config)
    await cluster.start()
    try:
        cluster.keys = {tenant: key for tenant, (key, _) in keys.items()}
        cluster.url = f"https://localhost:{cluster.http_port}"
        cluster.roots = (folder / "tls/ca.pem").read_bytes()
        cluster.tls = folder / "tls"
        async with asyncio.timeout(60), web(cluster, "acme") as http:
            while (await http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.1)
        yield cluster
    finally:
        await cluster.stop()


def web(cluster, tenant=None):
    import ssl

    headers = {"authorization": f"Bearer {cluster.keys[tenant]}"} if tenant else {}
    context = ssl.create_default_context(cafile=str(cluster.tls / "ca.pem"))
    return httpx.AsyncClient(base_url=cluster.url, verify=context, headers=headers, timeout=30)


async def refused(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


@pytest.mark.sampled(2)
@pytest.mark.timeout(180)
async def test_a_closed_cluster(tmp_path):
    async with closed_cluster(tmp_path) as cluster:
        await every_route_needs_a_key(cluster)
        await every_method_needs_a_key(cluster)
        await each_role_has_its_routes(cluster)
        await tenants_share_neither_cache_nor_ids(cluster)
        await every_query_of_the_dashboard_and_the_alerts_finds_its_series(cluster)
        await only_the_right_roles_may_dial_inside(cluster)
        only_listed_sockets_listen(cluster)


async def every_route_needs_a_key(cluster):
    from router.http.app import make_app

    assert make_app is not None
    routes = [
        "/v1/models",
        "/v1/models/x",
        "/ready",
        "/load",
        "/metrics",
        "/version",
        "/replicas",
        "/docs",
        "/openapi.json",
    ]
    posts = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
    async with web(cluster) as http:

        async def needs_a_key(method, path, header):
            json = {} if method == "POST" else None
            reply = await http.request(method, path, headers=header, json=json)
            assert reply.status_code == 401, path
            assert reply.json()["error"]["code"] == "invalid_api_key", path

        # At once: after some wrong keys each further refusal is held back for up to two seconds.
        await asyncio.gather(
            *(
                needs_a_key(method, path, header)
                for method, path in [*(("GET", r) for r in routes), *(("POST", p) for p in posts)]
                for header in ({}, {"authorization": "Bearer bt-00000000-" + "0" * 32})
            )
        )
        assert (await http.get("/health")).status_code == 200
    async with web(cluster, "acme") as http:
        for path in ("/docs", "/openapi.json"):
            assert (await http.get(path)).status_code == 404, (
                "production shows no pages about itself"
            )
        assert (await http.get("/v1/models")).status_code == 200


async def every_method_needs_a_key(cluster):
    """Straight from the descriptor, so that a method of tomorrow is tested too;
    and reflection is off."""
    credentials = grpc.ssl_channel_credentials(cluster.roots)
    service = pb.DESCRIPTOR.services_by_name["Generation"]
    async with grpc.aio.secure_channel(f"localhost:{cluster.grpc_port}", credentials) as channel:

        async def needs_a_key(method, metadata):
            path = f"/{service.full_name}/{method.name}"
            if method.server_streaming:
                call = channel.unary_stream(path)(b"", metadata=metadata, timeout=20).read()
            else:
                call = channel.unary_unary(path)(b"", metadata=metadata, timeout=20)
            assert await refused(call) is grpc.StatusCode.UNAUTHENTICATED, path

        strangers = (
            (),
            (("authorization", "Bearer nonsense"),),
            (("authorization", cluster.keys["acme"]),),
        )
        await asyncio.gather(*(needs_a_key(m, who) for m in service.methods for who in strangers))
        key = (("authorization", f"Bearer {cluster.keys['acme']}"),)
        reflection = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )(metadata=key)
        await reflection.done_writing()
        assert await refused(reflection.read()) is grpc.StatusCode.UNIMPLEMENTED
        health = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await health(b"", timeout=5) is not None


async def each_role_has_its_routes(cluster):
    calls = [("GET", "/v1/models"), ("POST", "/tokenize"), ("GET", "/replicas"), ("POST", "/links")]
    allowed = {"acme": "++--", "scraper": "+-+-", "operator": "++++"}
    for name, expected in allowed.items():
        async with web(cluster, name) as http:
            codes = [
                (await http.request(method, path, json={"prompt": "a", "mib": 1})).status_code
                for method, path in calls
            ]
        assert "".join("-" if code == 403 else "+" for code in codes) == expected, (name, codes)
    async with web(cluster, "scraper") as http:
        text = (await http.get("/metrics")).text
    assert (
        'baton_refusals_total{code="permission_denied",server="http",tenant_class="default"} 4.0'
        in text
    )
    assert 'baton_bad_keys_total{client="loopback"}' in text
    assert 'baton_api_keys{state="valid"} 4.0' in text


async def every_query_of_the_dashboard_and_the_alerts_finds_its_series(cluster):
    async with web(cluster, "scraper") as http:
        assert unresolved((await http.get("/metrics")).text) == {}


async def generate(cluster, tenant, **fields):
    request = pb.GenerateRequest(
        text=PROMPT, stopping=pb.StoppingOptions(max_tokens=8, ignore_eos=True), **fields
    )
    async with Client(
        [f"localhost:{cluster.grpc_port}"], cluster.keys[tenant], cluster.roots
    ) as client:
        return [message async for message in client.generate(request)][-1].summary.usage


async def tenants_share_neither_cache_nor_ids(cluster):
    await generate(cluster, "acme")
    own, other = await generate(cluster, "acme"), await generate(cluster, "bulk")
    assert own.cached_tokens > 0 and other.cached_tokens == 0, (
        "a salt in the body cannot reach another tenant's blocks"
    )
    salted = await generate(cluster, "bulk", prompt=pb.PromptOptions(cache_salt="acme"))
    assert salted.cached_tokens == 0
    long = pb.GenerateRequest(
        text=PROMPT, request_id="mine", stopping=pb.StoppingOptions(max_tokens=400, ignore_eos=True)
    )
    address = [f"localhost:{cluster.grpc_port}"]
    async with Client(address, cluster.keys["acme"], cluster.roots) as client:
        stream = client.generate(long)
        await anext(stream)
        credentials = grpc.ssl_channel_credentials(cluster.roots)
        async with grpc.aio.secure_channel(address[0], credentials) as channel:
            abort = channel.unary_unary(
                "/baton.v1.Generation/Abort", response_deserializer=pb.AbortResponse.FromString
            )
            message = pb.AbortRequest(request_id="mine").SerializeToString()
            for tenant, outcome in (
                ("bulk", pb.ABORT_OUTCOME_NOT_RUNNING),
                ("acme", pb.ABORT_OUTCOME_ABORTED),
            ):
                metadata = (("authorization", f"Bearer {cluster.keys[tenant]}"),)
                assert (await abort(message, metadata=metadata, timeout=5)).outcome == outcome, (
                    tenant
                )
        with pytest.raises(Cancelled):
            async for _ in stream:
                pass


REFUSALS = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED}


async def only_the_right_roles_may_dial_inside(cluster):
    """Every port of every worker, with no certificate, a foreign one, and every role's."""
    folder = cluster.tls
    make_certificates(folder / "foreign", ["localhost"])

    def pair(name, base=folder):
        return grpc.ssl_channel_credentials(
            cluster.roots, (base / f"{name}.key").read_bytes(), (base / f"{name}.pem").read_bytes()
        )

    strangers = {
        "nobody": None, "no certificate": grpc.ssl_channel_credentials(cluster.roots),
        "another authority's": pair("router", folder / "foreign"),
    }  # fmt: skip
    roles = {role: pair(role) for role in ("router", "prefill", "decode")}
    allowed = {
        "/baton.internal.v1.SessionService/Open": ("session_address", "worker", {"router"}),
        "/baton.internal.v1.KVTransfer/Fetch": ("transfer_address", "prefill", {"decode"}),
    }
    member = next(m for m in cluster._members.values() if m.role.value == "prefill")

    async def is_let_in_by_its_role(method, field, server, may, name, credentials):
        options = [
            ("grpc.ssl_target_name_override", f"{server}.baton.internal"),
            ("grpc.enable_http_proxy", 0),
        ]
        address = getattr(member, field)
        address = read_address(address)["grpc"] if field == "transfer_address" else address
        code = await code_of(address, method, credentials, options)
        if name in strangers:
            assert code is grpc.StatusCode.UNAVAILABLE, (method, name)
        elif name in may:
            assert code not in REFUSALS, (method, name, code)
        else:
            assert code is grpc.StatusCode.PERMISSION_DENIED, (method, name)

    await asyncio.gather(
        *(
            is_let_in_by_its_role(method, *place, name, credentials)
            for method, place in allowed.items()
            for name, credentials in {**strangers, **roles}.items()
        )
    )


async def code_of(address, method, credentials, options):
    """How a call ends that says nothing of sense."""
    if credentials is None:
        channel = grpc.aio.insecure_channel(address, options=options)
    else:
        channel = grpc.aio.secure_channel(address, credentials, options=options)
    async with channel:
        call = channel.stream_stream(method)(timeout=5)
        try:
            await call.write(b"")  # refused by its role, or else by what it says
            await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            pass
        return await call.code()


def only_listed_sockets_listen(cluster):
    children = [*cluster._routers.values(), *cluster._workers.values()]
    pids = set().union(
        *(descendants(child.process.pid) for child in children), {cluster._redis.pid}
    )
    found = listeners(pids)
    listed = {cluster.http_port, cluster.grpc_port}
    listed |= {entry.metrics_port for entry in cluster.routers.values()}
    for member in cluster._members.values():
        addresses = (member.session_address, read_address(member.transfer_address)["grpc"])
        listed |= {int(address.rsplit(":", 1)[1]) for address in addresses}
    assert {port for _, port in found} == listed
    assert {address for address, _ in found} <= LOOPBACK
    assert not listeners({cluster._redis.pid})


def test_certificates_are_not_overwritten_and_keys_are_private(tmp_path):
    made = make_certificates(tmp_path, ["localhost"])
    assert all(path.stat().st_mode & 0o077 == 0 for path in made if path.suffix == ".key")
    with pytest.raises(ConfigError, match="exists already"):
        make_certificates(tmp_path, ["localhost"])


FORBIDDEN = re.compile(
    r"\b(?:import (?:pickle|marshal|shelve|dill)|from (?:pickle|marshal) "
    r"|torch\.load\(|(?<![\w.])eval\(|(?<![\w.])exec\(|yaml\.load\(|trust_remote_code=True)"
)


def test_no_wire_or_file_of_ours_can_run_code():
    root = Path(__file__).parents[2]
    packages = (
        "core engine kv_transfer worker prefill_worker decode_worker prefix_index router "
        "cluster client simulation"
    ).split()
    files = [p for name in packages for p in (root / name).rglob("*.py")]
    assert [str(p) for p in files if FORBIDDEN.search(p.read_text())] == []
    assert (
        len(files) > 100
        and FORBIDDEN.search("import pickle")
        and FORBIDDEN.search("x = eval(text)")
    )


def test_the_commands_that_make_keys_and_certificates(tmp_path):
    """As a user runs them: the key is shown once, the file is private,
    a second certificate run refuses."""
    import subprocess
    import sys
    import time

    from router.access.credentials import Keyring

    def baton(*arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return (done.stdout + done.stderr).strip()

    file = tmp_path / "keys"
    keys = [
        baton("keys", "add", "--file", str(file), "--tenant", tenant, "--tier", "batch")
        for tenant in ("a", "b")
    ]
    ring = Keyring(str(file), time.monotonic)
    assert [ring.identify(f"Bearer {key}").tenant for key in keys] == ["a", "b"]
    assert file.stat().st_mode & 0o077 == 0
    assert "use 1 to 64 letters" in baton(
        "keys", "add", "--file", str(file), "--tenant", "a b", code=2
    )
    assert "router.pem" in baton("certs", "--out", str(tmp_path / "tls"))
    assert "exists already" in baton("certs", "--out", str(tmp_path / "tls"), code=2)
