"""Addresses that send wrong keys: slowed, counted and bounded."""

import asyncio

import pytest
from support.router_servers import RouterServers, counted, refusal_of, until

from protos.baton.v1 import generation_pb2 as pb
from router import calls
from router.access import bad_keys

NO_KEY = "bt-00000000-" + "0" * 32


@pytest.fixture
async def servers(tmp_path):
    async with RouterServers(tmp_path, max_body_bytes=4096).opened() as servers:
        yield servers


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.2", "loopback"),
        ("10.0.0.1", "private"),
        ("fe80::1", "private"),
        ("100.64.0.1", "private"),
        ("8.8.8.8", "public"),
        ("2606:4700::1111", "public"),
        ("", "unknown"),
        ("x\n", "unknown"),
    ],
)
def test_an_address_is_told_by_its_class(address, expected):
    assert calls.Call("http", address).client == expected


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.1:5000", "10.0.0.1"),
        ("ipv6:%5B::1%5D:5000", "::1"),
        ("ipv6:[2001:db8::1]:80", "2001:db8::1"),
        ("unix:/run/x", "127.0.0.1"),
        ("", ""),
    ],
)
def test_grpc_names_of_peers(peer, address):
    assert calls.peer_address(peer) == address


# --- many wrong keys ---------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["http", "grpc"])
async def test_many_wrong_keys_are_slowed_and_counted_and_a_good_one_never_is(
    servers, server, monkeypatch
):
    held = []
    real_sleep = asyncio.sleep

    async def sleep(seconds):
        held.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr(bad_keys.asyncio, "sleep", sleep)
    wrong = {"authorization": f"Bearer {NO_KEY}"}
    for n in range(bad_keys.FREE_MISTAKES + 30):
        if server == "http":
            async with servers.web() as http:
                assert (await http.get("/v1/models", headers=wrong)).status_code == 401
            async with servers.web("acme") as http:
                assert (await http.get("/v1/models")).status_code == 200
        else:
            message = pb.ListModelsRequest()
            assert (
                await refusal_of(servers.call("ListModels", message, **wrong)) == "UNAUTHENTICATED"
            )
            assert (await servers.call("ListModels", message, "acme")).models
    monkeypatch.undo()
    assert len(held) == 30, "the first mistakes are free, and good keys are never held"
    assert held == sorted(held) and held[0] > 0 and held[-1] == bad_keys.MAX_DELAY_S
    assert servers.service.bad_keys.num_held == 0
    await until(
        lambda: counted(servers, "baton_bad_keys_total", client="loopback") == len(held) + 10
    )


def test_mistakes_are_forgiven_and_the_table_of_addresses_is_bounded():
    now = [0.0]
    table = bad_keys.BadKeys(lambda: now[0])
    for _ in range(bad_keys.FREE_MISTAKES):
        assert table.delay_s("192.0.2.1") == 0
    assert table.delay_s("192.0.2.1") > 0 and table.delay_s("::ffff:192.0.2.1") > 0
    assert table.delay_s("192.0.2.2") == 0, "a neighbour pays for nobody"
    now[0] += 20 / bad_keys.FORGIVEN_PER_S
    assert table.delay_s("192.0.2.1") == 0
    for n in range(2 * bad_keys.MAX_ADDRESSES):
        table.delay_s(f"2001:db8:{n:x}::1")
    assert len(table._mistakes) == bad_keys.MAX_ADDRESSES
    for n in range(bad_keys.FREE_MISTAKES):
        table.delay_s(f"2001:db8:ffff::{n:x}")
    assert table.delay_s("2001:db8:ffff::ffff:1") > 0, "a host may use every address of its /64"


async def test_only_so_many_refusals_wait_at_once():
    table = bad_keys.BadKeys(lambda: 0.0)
    table.delay_s = lambda address: 60.0
    waiting = [asyncio.ensure_future(table.hold("x")) for _ in range(bad_keys.MAX_HELD)]
    await asyncio.sleep(0)
    await asyncio.wait_for(table.hold("x"), 5)
    assert table.num_held == bad_keys.MAX_HELD
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert table.num_held == 0
