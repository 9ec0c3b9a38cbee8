"""What `baton up --address` asks before it deploys, and what it takes away again: only its own."""

import asyncio
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError
from ray.serve.context import ReplicaContext

from cluster.ray import app as ray_app
from cluster.ray import replicas
from cluster.ray.app import RayCluster
from cluster.ray.probe import RayEndpoint
from cluster.secrets import with_read_secrets
from core.config import load_config
from core.errors import ConfigError
from router.observe.routers import RouterEntry, RouterList

CLOSED = RayEndpoint(has_tokens=True, has_tls=False)
OPEN = RayEndpoint(has_tokens=False, has_tls=False)


@pytest.fixture()
def ray(monkeypatch):
    """A Ray of one node that somebody else runs; what is deployed and deleted is kept."""
    seen = SimpleNamespace(endpoint=CLOSED, deployed=[], deleted=[])
    context = SimpleNamespace(gcs_address="127.0.0.1:1", get_node_id=lambda: "n")
    nodes = [{"Alive": True, "Resources": {"CPU": 64.0}}]
    fake = SimpleNamespace(
        nodes=lambda: nodes,
        is_initialized=lambda: True,
        shutdown=lambda: None,
        get_runtime_context=lambda: context,
    )
    ports = SimpleNamespace(result=lambda timeout_s: {"http": 1, "grpc": 2})
    router = SimpleNamespace(
        ports=SimpleNamespace(remote=lambda: ports),
        broadcast=lambda verb: SimpleNamespace(results=lambda timeout_s: None),
    )

    def run(app, **_):
        seen.deployed.append(app)
        return router

    monkeypatch.setattr(ray_app, "ray", fake)
    monkeypatch.setattr(ray_app, "_join", lambda address: None)
    monkeypatch.setattr(ray_app, "probe", lambda address: seen.endpoint)
    monkeypatch.setattr(ray_app, "build_app", lambda config, *, is_loopback: config)
    monkeypatch.setattr(ray_app.serve, "start", lambda **_: None)
    monkeypatch.setattr(ray_app.serve, "run", run)
    monkeypatch.setattr(ray_app.serve, "delete", seen.deleted.append)
    return seen


def cluster():
    return RayCluster(load_config(flags={"redis.enabled": False}, environment={}), "somewhere:6379")


def test_a_ray_without_tokens_is_refused_whatever_is_set_here(ray, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    ray.endpoint = OPEN
    refused = cluster()
    with pytest.raises(ConfigError, match="requires no token"):
        refused.start()
    refused.stop()
    assert ray.deployed == []
    assert ray.deleted == [], "what runs there is somebody else's"


def test_who_deployed_takes_it_away_and_its_secrets_with_it(ray):
    own = cluster()
    own.start()
    (config,) = ray.deployed
    assert config.security.cluster_key.startswith("file:")
    assert config.seed_key.startswith("file:")
    folder = own._secrets.name
    own.stop()
    assert ray.deleted == ["baton"]
    with pytest.raises(ConfigError, match=folder):
        with_read_secrets(config)


async def test_a_router_on_ray_asks_the_others_where_they_listen_until_it_stops(monkeypatch):
    """A router that does not answer costs the list nothing, and the next answer counts."""
    entries = [RouterEntry(f"router-{n}", n, "10.0.0.1", 8000, 9000, 9100 + n) for n in (1, 2)]
    answers = [RayError("a replica is starting"), [asdict(entry) for entry in entries]]
    asked = []

    class Answer:
        async def results_async(self):
            found = answers.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

    def handle(deployment, app_name):
        asked.append((deployment, app_name))
        return SimpleNamespace(broadcast=lambda verb: asked.append(verb) or Answer())

    assert hasattr(ReplicaContext, "app_name") and hasattr(ReplicaContext, "deployment")
    context = SimpleNamespace(app_name="baton", deployment="router")
    monkeypatch.setattr(replicas.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(replicas.serve, "get_deployment_handle", handle)
    monkeypatch.setattr(replicas, "FOLLOW_ROUTERS_S", 0.001)
    routers = RouterList(2)
    status = SimpleNamespace(routers=routers)
    router = SimpleNamespace(service=SimpleNamespace(status=status), entry=entries[0])
    replica = object.__new__(replicas.RouterReplica)
    replica._router = router
    assert RouterEntry(**await replica.entry()) == entries[0]
    following = asyncio.create_task(replica._follow_routers())
    async with asyncio.timeout(10):
        while not routers.entries():
            await asyncio.sleep(0.001)
    following.cancel()
    assert routers.entries() == entries
    assert asked[:3] == [("router", "baton"), "entry", "entry"]
