"""The ports inside: strangers, a router in wrong hands, a peer that lies; neighbours unharmed."""

import asyncio
import logging
import random

import grpc
import pytest
from support.hostile_peers import (
    FETCH,
    KEY,
    SESSION,
    RawRouter,
    attacked,
    good_submit,
    macs,
    open_stream,
    settled,
    where_of,
)

from core.ports import StreamClosed
from core.session import Role
from protos.baton.internal.v1 import session_pb2 as pb
from transport import grpc_network
from transport.grpc_network import GrpcNetwork
from transport.stream_proof import StreamProof, new_nonce, stream_key

DENIED = grpc.StatusCode.PERMISSION_DENIED


SEED = 13


def ports(cluster):
    """(method, address, network) of every port inside."""
    for unit in cluster.units:
        yield SESSION, unit.descriptor.session_address, unit.components.session_network
        yield FETCH, unit.descriptor.transfer_address, unit.components.transfer_network


# --- strangers -----------------------------------------------------------------------------------


def refusals(caplog):
    """What was told of streams that were refused."""
    return [r.fields for r in caplog.records if getattr(r, "event", "") == "stream_refused"]


async def test_strangers_are_refused_at_every_port_counted_and_told(caplog):
    caplog.set_level(logging.WARNING)
    async with attacked() as cluster:
        for method, address, network in ports(cluster):
            nonce, mine = address.partition("@")[0], new_nonce()
            guesses = {
                "nothing": {},
                "no MAC": macs(StreamProof(b"", method, nonce, mine), mine) | {"baton-dialler": ""},
                "without a key": macs(StreamProof(b"", method, nonce, mine), mine),
                "another key": macs(StreamProof(stream_key("x" * 32), method, nonce, mine), mine),
                "another kind of stream": macs(StreamProof(KEY, "/x.Y/Z", nonce, mine), mine),
                "another listener": macs(StreamProof(KEY, method, new_nonce(), mine), mine),
                "another dialler": macs(StreamProof(KEY, method, nonce, mine), new_nonce()),
                "the listener's MAC": {
                    "baton-nonce": mine,
                    "baton-dialler": StreamProof(KEY, method, nonce, mine).listener_mac,
                },
            }
            for name, metadata in guesses.items():
                status, why = await open_stream(address, method, metadata)
                assert (status, name) == (DENIED, name)
                assert why == "the caller does not know the cluster's key"
            assert network.num_refused == len(guesses)
            good = macs(StreamProof(KEY, method, nonce, mine), mine)
            assert (await open_stream(address, method, good, b"no message"))[0] is not DENIED
            assert network.num_refused == len(guesses)
    told = refusals(caplog)
    streams = [fields["stream"] for fields in told]
    assert streams.count(SESSION) >= 2 and streams.count(FETCH) >= 2
    assert all(fields["peer"].startswith("ipv4:127.0.0.1:") for fields in told)


async def test_a_stranger_cannot_fill_the_log(caplog, monkeypatch):
    monkeypatch.setattr(grpc_network, "REFUSAL_LOG_PERIOD_S", 3600.0)
    caplog.set_level(logging.WARNING)
    network = GrpcNetwork(SESSION, key=KEY)

    async def never(stream):
        raise AssertionError("a stranger was let in")

    address = await network.listen(never)
    assert {(await open_stream(address, SESSION))[0] for _ in range(50)} == {DENIED}
    await network.close()
    assert network.num_refused == 50 and len(refusals(caplog)) == 1


async def test_who_takes_over_a_port_is_told_nothing_and_believed_nothing():
    """It answers whatever comes, and has seen the word that a dialler shows."""
    server, seen = grpc.aio.server(), []

    async def answer(_, context):
        seen.append(dict(context.invocation_metadata()))
        await context.write(await context.read())

    method = grpc.stream_stream_rpc_method_handler(answer)
    service, name = SESSION.strip("/").split("/")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {name: method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    dialler, worker = (GrpcNetwork(SESSION, key=KEY) for _ in range(2))
    try:
        stream = await dialler.dial(f"{new_nonce()}@127.0.0.1:{port}")
        await stream.send(b"hello")
        with pytest.raises(StreamClosed, match="does not know the cluster's key"):
            await stream.recv()
        address = await worker.listen(lambda stream: asyncio.sleep(0))
        metadata = {k: v for k, v in seen[0].items() if k.startswith("baton-")}
        assert len(metadata) == 2 and (await open_stream(address, SESSION, metadata))[0] is DENIED
    finally:
        await dialler.close()
        await worker.close()
        await server.stop(0)


# --- a router that says what it likes ------------------------------------------------------------


def random_bytes(rng):
    return rng.randbytes(rng.choice((1, 2, 9, 100, 5000)))


async def test_what_is_no_message_ends_its_session_and_nothing_else(caplog):
    caplog.set_level(logging.WARNING)
    rng = random.Random(SEED)
    known = [
        pb.ToWorker(submit=pb.Submit(request_id="x", task="rm -rf")),
        pb.ToWorker(submit=good_submit("i" * 161)),
        pb.ToWorker(cancel=pb.Cancel(request_id="c" * 100_000)),
        pb.ToWorker(credit=pb.Credit(request_id="c" * 161)),
        pb.ToWorker(hello=pb.Hello(router_id="r" * 161)),
        pb.ToWorker(hello=pb.Hello(router_id="")),
        pb.ToWorker(number=2**64 - 1, heartbeat=pb.RouterHeartbeat()),
        pb.ToWorker(),
    ]
    async with attacked() as cluster:
        decode = cluster.of_role(Role.DECODE)[0]
        async with RawRouter(decode.descriptor.session_address) as router:
            for data in [m.SerializeToString() for m in known] + [
                random_bytes(rng) for _ in range(30)
            ]:
                for is_first in (True, False):
                    if is_first:
                        router.stream, router.number = await router.network.dial(router.address), 0
                    else:
                        await router.greet()
                    await router.say_bytes(data)
                    if is_first or not pb_is_harmless(data):
                        await ended(router.stream)
            await router.greet()
            await router.say(submit=good_submit("after"))
            end, tokens = await router.end_of("after")
            assert not end.error and len(tokens) == 4
            await router.cancel("after")
            await settled(decode, "after")
    malformed = [r for r in caplog.records if "is malformed" in r.getMessage()]
    assert len(malformed) >= 9 and not any(r.exc_info for r in caplog.records)


def pb_is_harmless(data):
    """A message of a newer version, or a second greeting: there is nothing in it to do."""
    try:
        message = pb.ToWorker.FromString(data)
    except Exception:
        return False
    is_next = message.number <= 1
    return is_next and message.WhichOneof("message") in (None, "hello") and len(data) < 100


async def ended(stream):
    async with asyncio.timeout(20):
        with pytest.raises(StreamClosed):
            while True:
                await stream.recv()


def test_where_of_an_address_is_what_a_machine_listens_on():
    assert where_of("6e6f@127.0.0.1:80") == where_of("127.0.0.1:80") == "127.0.0.1:80"
