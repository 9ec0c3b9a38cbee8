"""A router's own port for its metrics: which port, what it answers and to whom."""

import contextlib
import socket

import httpx
import pytest
from support.router_servers import RouterServers

from cluster.http_servers import metrics_socket
from cluster.router_process import RunningRouter
from core.config import BatonConfig, RouterConfig
from core.errors import ConfigError
from router.http.app import make_metrics_app
from router.observe.routers import RouterEntry
from simulation.ports import StaticMembership

HOST = "127.0.0.1"


def free_ports(number):
    """The first of so many ports in a row that nobody has."""
    for first in range(20_000, 30_000, number):
        with contextlib.suppress(OSError), contextlib.ExitStack() as taken:
            for port in range(first, first + number):
                taken.enter_context(socket.create_server((HOST, port)))
            return first
    raise AssertionError("no ports are free")


def test_each_router_takes_the_first_free_port_of_its_range_and_no_further_one():
    first = free_ports(3)
    config = RouterConfig(replicas=2, metrics_port=first)
    with metrics_socket(config) as one, metrics_socket(config) as two:
        assert [s.getsockname()[1] for s in (one, two)] == [first, first + 1]
        with pytest.raises(ConfigError, match=f"no port from {first} to {first + 1} on {HOST}"):
            metrics_socket(config)
    with metrics_socket(config) as again:
        assert again.getsockname()[1] == first


def test_any_free_port_will_do_where_none_is_named():
    with metrics_socket(RouterConfig()) as one, metrics_socket(RouterConfig()) as two:
        ports = {s.getsockname()[1] for s in (one, two)}
        assert len(ports) == 2 and 0 not in ports
        assert {s.getsockname()[0] for s in (one, two)} == {HOST}


@pytest.fixture
def own_port(tmp_path):
    """Clients of the application behind a router's own port, by the name of a key."""
    servers = RouterServers(tmp_path)
    servers.service.status.routers.listens(RouterEntry("router-a", 1, "", 8000, 9000, 9100))

    def client(name=None):
        transport = httpx.ASGITransport(make_metrics_app(servers.service))
        headers = {"authorization": f"Bearer {servers.keys[name]}"} if name else {}
        return httpx.AsyncClient(transport=transport, base_url="http://10.0.0.1", headers=headers)

    return client


@pytest.mark.parametrize("path", ["/metrics", "/metrics/targets"])
@pytest.mark.parametrize(
    ("name", "status"), [(None, 401), ("acme", 403), ("scraper", 200), ("operator", 200)]
)
async def test_the_own_port_wants_the_keys_that_the_shared_one_wants(own_port, path, name, status):
    async with own_port(name) as http:
        assert (await http.get(path)).status_code == status


async def test_the_own_port_shows_metrics_and_targets_and_generates_nothing(own_port):
    async with own_port("operator") as http:
        assert "baton_routers" in (await http.get("/metrics")).text
        reply = await http.get("/metrics/targets")
        assert reply.headers["content-type"] == "application/json"
        assert [group["targets"] for group in reply.json()] == [["10.0.0.1:9100"]]
        for path in ("/v1/completions", "/links", "/tokenize"):
            assert (await http.post(path, json={"prompt": "a"})).status_code == 404
        for path in ("/v1/models", "/replicas", "/docs", "/openapi.json"):
            assert (await http.get(path)).status_code == 404
        assert (await http.get("/health")).status_code == 200


async def test_two_routers_on_one_http_port_show_their_metrics_apart():
    async with contextlib.AsyncExitStack() as running:
        routers = []
        http_port = 0
        for _ in range(2):
            servers = {"http_port": http_port, "grpc_port": 0, "replicas": 2}
            config = BatonConfig.model_validate({"router": servers})
            router = RunningRouter(config, StaticMembership())
            running.push_async_callback(router.stop)
            await router.start()
            http_port = router.http_port
            routers.append(router)
        entries = [router.entry for router in routers]
        assert {entry.http_port for entry in entries} == {http_port}
        assert len({entry.metrics_port for entry in entries}) == 2
        routers[0].service.status.routers.update(entries)
        http = await running.enter_async_context(httpx.AsyncClient())
        for entry in entries:
            reply = await http.get(f"http://{HOST}:{entry.metrics_port}/metrics")
            assert reply.headers["x-baton-router"] == entry.router_id
        own = entries[0].metrics_port
        found = (await http.get(f"http://{HOST}:{own}/metrics/targets")).json()
        assert sorted(group["targets"][0] for group in found) == sorted(
            f"{HOST}:{entry.metrics_port}" for entry in entries
        )
        state = (await http.get(f"http://{HOST}:{own}/metrics")).text
        assert 'baton_routers{state="configured"} 2' in state
        assert 'baton_routers{state="listening"} 2' in state
