"""Of clusters that want one port exactly one gets it, and its routers share it."""

import contextlib
import multiprocessing
import socket
import threading

import pytest

from cli import up
from cluster.server_ports import claimed
from core.config import BatonConfig
from core.errors import ConfigError

ROUNDS = 50


def free_ports(number):
    with contextlib.ExitStack() as held:
        sockets = [
            held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)
        ]
        return [s.getsockname()[1] for s in sockets]


def config(http_port, grpc_port=0, host="127.0.0.1"):
    servers = {"host": host, "http_port": http_port, "grpc_port": grpc_port}
    return BatonConfig.model_validate({"router": servers, "security": {"api_keys": "keys"}})


def router(port):
    """Listen as a router does."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64)
    return listener


@pytest.fixture
def port():
    return free_ports(1)[0]


@pytest.mark.parametrize("server", ["http", "grpc"])
def test_a_port_is_held_before_and_between_routers_and_they_share_it(port, server):
    mine = config(port) if server == "http" else config(0, port)
    with claimed(mine):
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(ConfigError, match=rf"port {port} .*in use.*--{server}-port"):
                claimed(
                    config(port, host=host) if server == "http" else config(0, port, host)
                ).__enter__()
        with router(port), router(port) as second:
            second.settimeout(10)
            threading.Thread(target=knock_until, args=(port, second), daemon=True).start()
            second.accept()[0].close()
            with pytest.raises(ConfigError, match="in use"):
                claimed(mine).__enter__()
        with pytest.raises(ConfigError, match="in use"):
            claimed(mine).__enter__()
        router(port).close()
    with claimed(mine):
        pass


def knock_until(port, listener):
    """Connect until the kernel has given a connection to this one of the routers."""
    for _ in range(60):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
            pass


def test_a_claim_alone_takes_no_connections(port):
    with claimed(config(port)), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


def test_connections_of_an_ended_cluster_keep_no_other_out(port):
    with claimed(config(port)), router(port) as listener:
        client = socket.create_connection(("127.0.0.1", port), 5)
        listener.accept()[0].close()  # the server is first: its side waits a minute
        assert client.recv(1) == b""
        client.close()
    with claimed(config(port)):
        pass


def race(ports, start, results):
    for port in ports:
        start.wait(30)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(claimed(config(port)))
                held.enter_context(router(port))
                results.put(port)
            except ConfigError:
                pass
            start.wait(30)


def test_of_clusters_that_start_at_once_exactly_one_gets_the_port():
    ports = free_ports(ROUNDS)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    racers = [context.Process(target=race, args=(ports, start, results)) for _ in range(2)]
    for racer in racers:
        racer.start()
    winners = [results.get(timeout=60) for _ in ports]
    for racer in racers:
        racer.join(60)
    assert sorted(winners) == sorted(ports) and results.empty()
    assert [racer.exitcode for racer in racers] == [0, 0]


def test_up_holds_its_ports_while_it_runs(port, monkeypatch):
    seen = []

    async def run(config, *_):
        with pytest.raises(ConfigError, match="in use"):
            claimed(config).__enter__()
        seen.append(config.router.http_port)

    monkeypatch.setattr(up, "_run_local", run)
    up.run_up(None, {"router.http_port": port, "router.grpc_port": 0}, "", is_local=True)
    assert seen == [port]
