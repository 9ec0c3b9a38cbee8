"""Hosts of both families are written, bound and dialled as a user writes them."""

import socket

import pytest

from cluster.server_ports import claimed
from core.addresses import bare_host, family_of, is_any, is_loopback, join_address, unmapped
from core.config import load_config
from core.errors import ConfigError


@pytest.mark.parametrize(
    ("host", "address", "family", "is_here"),
    [
        ("127.0.0.1", "127.0.0.1:9000", socket.AF_INET, True),
        ("localhost", "localhost:9000", socket.AF_INET, True),
        ("::1", "[::1]:9000", socket.AF_INET6, True),
        ("[::1]", "[::1]:9000", socket.AF_INET6, True),
        ("::", "[::]:9000", socket.AF_INET6, False),
        ("2001:db8::7", "[2001:db8::7]:9000", socket.AF_INET6, False),
        ("0.0.0.0", "0.0.0.0:9000", socket.AF_INET, False),
        ("host.example", "host.example:9000", socket.AF_INET, False),
    ],
)
def test_a_host_is_joined_bound_and_judged(host, address, family, is_here):
    assert join_address(host, 9000) == address
    assert family_of(host) is family
    assert is_loopback(host) is is_here
    assert bare_host(host) == host.strip("[]")


@pytest.mark.parametrize(
    ("host", "is_every"),
    [("", True), ("0.0.0.0", True), ("[::]", True), ("10.0.0.1", False), ("host.example", False)],
)
def test_an_address_that_stands_for_all_is_known(host, is_every):
    assert is_any(host) is is_every


@pytest.mark.parametrize(
    ("host", "shown"),
    [("::ffff:10.0.0.1", "10.0.0.1"), ("2001:db8::7", "2001:db8::7"), ("a.example", "a.example")],
)
def test_a_mapped_address_is_shown_as_what_it_is(host, shown):
    assert unmapped(host) == shown


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_port_of_ipv6_is_free_or_taken_and_told(host):
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        flags = {"router.host": host, "router.http_port": port, "router.grpc_port": 0}
        with pytest.raises(ConfigError, match="in use.*--http-port"):
            claimed(load_config(flags=flags, environment={})).__enter__()
    with claimed(load_config(flags=flags, environment={})):
        pass
