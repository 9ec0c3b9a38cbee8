"""The ports inside: strangers, a router in wrong hands, a peer that lies; neighbours unharmed."""

import asyncio
import contextlib
import logging
import random

import grpc
import pytest
from support.house import InProcessCluster
from support.inside import (
    FETCH,
    KEY,
    PROMPT,
    SESSION,
    RawRouter,
    good_submit,
    macs,
    open_stream,
    where_of,
)
from support.models import TINY
from support.rig import is_long, note

from core.config import EngineConfig
from core.ids import TransferId
from core.ports import StreamClosed
from core.session import Role, Task
from kv_transfer import codec, frames
from protos.baton.internal.v1 import session_pb2 as pb
from transport import grpc_network
from transport.grpc_network import GrpcNetwork, fetch_network
from transport.stream_proof import StreamProof, new_nonce, stream_key

ENGINE = EngineConfig(block_size_tokens=16, num_blocks=128, max_step_tokens=64)
DENIED = grpc.StatusCode.PERMISSION_DENIED
NEIGHBOUR = {"max_tokens": 24, "ignore_eos": True}
PAUSE_S = 0.2
"""Between two requests of the neighbour, so that attacks have the machine most of the time."""
SEED = 13


@contextlib.asynccontextmanager
async def attacked():
    """A cluster under attack: neighbours are asked all the while, and each is answered exactly."""
    async with InProcessCluster(TINY, engine=ENGINE, transport="grpc", key=KEY) as house:
        alone = await house.ask(PROMPT, **NEIGHBOUR)
        over, answers = asyncio.Event(), []

        async def ask_on():
            while not over.is_set() or not answers:
                answers.append(await house.ask(PROMPT, **NEIGHBOUR))
                await asyncio.sleep(PAUSE_S)

        asking = asyncio.create_task(ask_on())
        try:
            yield house
        finally:
            over.set()
            await asking
        assert all(a.ended.error is None and a.tokens == alone.tokens for a in answers)
        assert all(len(a.ended.timing.attempts) == 1 for a in answers), "no attempt was lost"
        assert all(unit.is_ready for unit in house.units)


def ports(house):
    """(method, address, network) of every port inside."""
    for unit in house.units:
        yield SESSION, unit.descriptor.session_address, unit.components.session_network
        yield FETCH, unit.descriptor.transfer_address, unit.components.transfer_network


# --- strangers -----------------------------------------------------------------------------------


def refusals(caplog):
    """What was told of streams that were refused."""
    return [r.fields for r in caplog.records if getattr(r, "event", "") == "stream_refused"]


async def test_strangers_are_refused_at_every_port_counted_and_told(caplog):
    caplog.set_level(logging.WARNING)
    async with attacked() as house:
        for method, address, network in ports(house):
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
    async with attacked() as house:
        decode = house.of_role(Role.DECODE)[0]
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


async def settled(unit, request_id):
    """Wait until a worker has forgotten an attempt."""
    async with asyncio.timeout(20):
        while request_id in unit.attempts.by_run:
            await asyncio.sleep(0.01)


NAN, BIG = float("nan"), 2**32 - 1
TRANSFER = {"transfer_id": b"t" * 16, "peer_id": "p", "peer_address": "grpc=127.0.0.1:9"}


def with_sampling(**fields):
    return lambda s: [setattr(s.sampling, name, value) for name, value in fields.items()]


def with_fields(**fields):
    return lambda s: [setattr(s, name, value) for name, value in fields.items()]


def extended(path, values):
    """Put values at the end of a list inside a Submit."""

    def extend(submit):
        target = submit
        for name in path.split("."):
            target = getattr(target, name)
        target.extend(values)

    return extend


def cleared(name):
    return lambda submit: submit.ClearField(name)


BAD = [
    ("prompt", cleared("prompt")),
    ("prompt", extended("prompt", [2**31])),
    ("prompt", extended("prompt", [256, BIG])),
    ("temperature", with_sampling(temperature=NAN)),
    ("temperature", with_sampling(temperature=-1.0)),
    ("top_p", with_sampling(top_p=0.0)),
    ("top_p", with_sampling(top_p=NAN)),
    ("top_k", with_sampling(top_k=BIG)),
    ("min_p", with_sampling(min_p=2.0)),
    ("presence_penalty", with_sampling(presence_penalty=1e300)),
    ("frequency_penalty", with_sampling(frequency_penalty=NAN)),
    ("repetition_penalty", with_sampling(repetition_penalty=0.0)),
    ("n", with_sampling(n=0)),
    ("n", with_sampling(n=BIG)),
    ("max_tokens", with_sampling(max_tokens=0)),
    ("max_tokens", with_sampling(max_tokens=BIG)),
    ("min_tokens", with_sampling(min_tokens=5)),
    ("seed", with_sampling(seed=2**64 - 1)),
    ("logprobs", with_sampling(logprobs=21)),
    ("prompt_logprobs", with_sampling(prompt_logprobs=BIG)),
    ("logit_bias", extended("sampling.logit_bias", [pb.TokenBias(token_id=BIG, bias=1.0)])),
    ("logit_bias", extended("sampling.logit_bias", [pb.TokenBias(token_id=1, bias=NAN)])),
    ("logit_bias", extended("sampling.logit_bias", [pb.TokenBias(token_id=1)] * 301)),
    ("allowed_token_ids", extended("sampling.allowed_token_ids", [BIG])),
    ("allowed_token_ids", extended("sampling.allowed_token_ids", [1] * 5000)),
    ("bad_words", extended("sampling.bad_words", [pb.TokenIds()])),
    ("bad_words", extended("sampling.bad_words", [pb.TokenIds(ids=[1, BIG])])),
    ("bad_words", extended("sampling.bad_words", [pb.TokenIds(ids=[1] * 2049)])),
    ("stop_token_ids", extended("sampling.stop_token_ids", [BIG])),
    ("stop_token_ids", extended("sampling.stop_token_ids", [1] * 33)),
    ("eos_token_ids", extended("eos_token_ids", [BIG])),
    ("eos_token_ids", extended("eos_token_ids", [1] * 257)),
    ("emitted", cleared("emitted")),
    ("emitted", extended("emitted", [pb.TokenIds()])),
    ("emitted", lambda s: s.emitted[0].ids.extend([1] * 5)),
    ("emitted", lambda s: s.emitted[0].ids.extend([BIG])),
    ("finished_choices", extended("finished_choices", [0])),
    ("finished_choices", extended("finished_choices", [1])),
    ("scope", with_fields(scope="x" * (1 << 20))),
    ("tier", with_fields(tier="x" * 257)),
    ("model", with_fields(model="x" * 257)),
    ("time_left_s", with_fields(time_left_s=NAN)),
    ("time_left_s", with_fields(time_left_s=float("inf"))),
    ("age_s", with_fields(age_s=NAN)),
    ("age_s", with_fields(age_s=-1.0)),
    ("age_s", with_fields(age_s=1e9)),
    ("transfer_id", with_fields(task="decode")),
    ("transfer_id", with_fields(task="prefill", **{**TRANSFER, "transfer_id": b"short"})),
    ("peer_id", with_fields(task="decode", **{**TRANSFER, "peer_id": ""})),
    ("peer_id", with_fields(task="prefill", **{**TRANSFER, "peer_id": "p" * 257})),
    ("peer_address", with_fields(task="decode", **{**TRANSFER, "peer_address": "a" * 2000})),
]


@pytest.mark.parametrize("role", list(Role))
async def test_a_submit_that_cannot_be_ends_its_attempt_and_names_the_field(role):
    async with attacked() as house:
        victim = house.of_role(role)[0]
        async with RawRouter(victim.descriptor.session_address) as router:
            for number, (field, spoil) in enumerate(BAD):
                submit = good_submit(f"bad{number}")
                spoil(submit)
                await router.say(submit=submit)
                end, tokens = await router.end_of(f"bad{number}")
                assert end.error == "InvalidRequest" and tokens == [], (field, end)
                assert end.error_message.startswith(f"{field} "), end.error_message
            assert not any(key.startswith("bad") for key in victim.attempts.by_run)
            await router.say(submit=good_submit("good"))
            end, tokens = await router.end_of("good")
            assert not end.error and len(tokens) == 4
            await router.cancel("good")
            await settled(victim, "good")


def mutate(rng, submit):
    """Change some fields of a Submit to what a bug, or somebody, may put there."""
    numbers = (0, 1, 2, 255, 256, 257, 2**31 - 1, 2**31, BIG)
    reals = (NAN, float("inf"), float("-inf"), -1.0, 0.0, 1e-300, 1e300)
    for _ in range(rng.randint(1, 3)):
        target = rng.choice((submit, submit.sampling))
        field = rng.choice(target.DESCRIPTOR.fields)
        if field.name in ("request_id", "task", "epoch", "sampling"):
            continue
        kind, is_list = field.type, field.is_repeated
        if kind == field.TYPE_MESSAGE:
            made = pb.TokenIds(ids=rng.choices(numbers, k=rng.randint(0, 40)))
            if field.name == "logit_bias":
                made = pb.TokenBias(token_id=rng.choice(numbers), bias=rng.choice(reals))
            getattr(target, field.name).extend([made] * rng.randint(1, 9))
        elif kind == field.TYPE_DOUBLE:
            setattr(target, field.name, rng.choice(reals))
        elif kind == field.TYPE_STRING:
            setattr(target, field.name, "\0" * rng.choice((0, 1, 300, 5000)))
        elif kind == field.TYPE_BYTES:
            setattr(target, field.name, rng.randbytes(rng.choice((0, 15, 16, 17))))
        elif is_list:
            getattr(target, field.name).extend(rng.choices(numbers, k=rng.choice((1, 7, 3000))))
        elif kind == field.TYPE_BOOL:
            setattr(target, field.name, rng.random() < 0.5)
        else:
            setattr(target, field.name, rng.choice(numbers))
    return submit


async def test_random_mutations_of_a_submit_harm_no_neighbour():
    count, rng, outcomes = 2000 if is_long() else 100, random.Random(SEED), {}
    async with attacked() as house:
        victims = [
            (unit, await RawRouter(unit.descriptor.session_address, f"router-{i}").__aenter__())
            for i, unit in enumerate(house.units)
        ]
        for number in range(count):
            victim, router = victims[number % 2]
            name = f"m{number}"
            tasks = [Task.LOCAL, Task(victim.descriptor.role.value)]
            fields = {
                "transfer_id": rng.randbytes(16),
                "peer_id": "p",
                "peer_address": "grpc=127.0.0.1:9",
            }
            submit = mutate(rng, good_submit(name, rng.choice(tasks), rng.choice((1, 2)), **fields))
            await router.say(submit=submit)
            for limit, choices in ((rng.choice((0, 9)), [rng.choice((0, 1, 9, BIG))]), (BIG, [])):
                credit = pb.Credit(request_id=name, limit=limit, finished_choices=choices)
                await router.say(credit=credit)
            end = None
            if submit.task != "prefill":  # nobody would fetch it
                end, _ = await router.end_of(name)
            await router.cancel(name)
            kind = "cancelled" if end is None else end.error or "done"
            outcomes[kind] = outcomes.get(kind, 0) + 1
            await settled(victim, name)
        for victim, router in victims:
            await router.say(submit=good_submit("after"))
            end, tokens = await router.end_of("after")
            assert not end.error and len(tokens) == 4
            await router.cancel("after")
            await settled(victim, "after")
            await router.network.close()
    assert outcomes["InvalidRequest"] >= count // 4 and "InternalError" not in outcomes, outcomes
    note("mutated_submits", outcomes)


async def test_other_commands_that_cannot_be_harm_what_they_name_at_most(caplog):
    async with attacked() as house:
        decode = house.of_role(Role.DECODE)[0]
        async with RawRouter(decode.descriptor.session_address) as router:
            await router.say(submit=good_submit("long", credit=1))
            await router.say(credit=pb.Credit(request_id="long", limit=2, finished_choices=[BIG]))
            end, _ = await router.end_of("long")
            assert (end.error, end.error_message.split()[0]) == (
                "InvalidRequest",
                "finished_choices",
            )
            await router.say(submit=good_submit("parked", credit=1))
            for epoch in (0, BIG):
                await router.cancel("nobody's", epoch)
                await router.say(credit=pb.Credit(request_id="nobody's", epoch=epoch, limit=BIG))
            await router.say(connect_peers=pb.ConnectPeers(addresses=["grpc=127.0.0.1:9"] * 513))
            await router.say(connect_peers=pb.ConnectPeers(addresses=["a" * 1025]))
            await router.say(
                connect_peers=pb.ConnectPeers(
                    addresses=["", "x", "grpc=", "@"], probe_bytes=2**64 - 1
                )
            )
            wanted = [
                pb.Wanted(request_id="parked", next_positions=[BIG] * 3, finished_choices=[BIG])
            ]
            again = RawRouter(router.address, router.router_id)
            again.stream = await again.network.dial(again.address)
            await again.say(
                hello=pb.Hello(router_id=router.router_id, wanted=wanted, stream_number=BIG)
            )
            assert (await again.hear()).WhichOneof("message") == "welcome"
            end, _ = await again.end_of("parked")
            assert (end.error, end.error_message.split()[0]) == ("InvalidRequest", "next_positions")
            await again.cancel("parked")
            await settled(decode, "parked")
            await again.say(submit=good_submit("after"))
            assert not (await again.end_of("after"))[0].error
            await again.cancel("after")
            await settled(decode, "after")
            await again.network.close()


# --- a peer that lies on the transfer wire --------------------------------------------------------


def spoiled(rng):
    """A message of a fetch stream, whole, cut, or with bytes of it changed."""
    opened = frames.Open(TransferId(rng.randbytes(16)), "p", rng.getrandbits(63), "x=1", 2, 16)
    message = rng.choice(
        (
            opened,
            frames.Reserved(0, BIG),
            frames.Resend(0, ((BIG, BIG, BIG),)),
            frames.Resend(0, ()),
            frames.Probe(2**64 - 1),
            frames.Ack(),
            frames.Refused("x" * 5000),
            frames.Starting(9, BIG, 0, 0),
        )
    )
    data = bytearray(codec.encode(rng.choice((0, 0, 0, 1, BIG)), message))
    if rng.random() < 0.5:
        data = data[: rng.randrange(len(data))] + rng.randbytes(rng.choice((0, 0, 3, 3000)))
    elif rng.random() < 0.5:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


async def test_what_a_peer_sends_on_the_transfer_port_harms_no_neighbour(monkeypatch):
    monkeypatch.setattr("kv_transfer.probing.MAX_PROBE_BYTES", 1 << 16)
    rng, count = random.Random(SEED), 1000 if is_long() else 60
    async with attacked() as house:
        network = fetch_network(key=KEY)
        for number in range(count):
            unit = house.units[number % 2]
            stream = await network.dial(unit.descriptor.transfer_address)
            with contextlib.suppress(StreamClosed):
                await stream.send(spoiled(rng))
                await stream.send(spoiled(rng))
            stream.reset()
        await network.close()
    assert all(unit.agent.num_live == 0 for unit in house.units)


def test_where_of_an_address_is_what_a_machine_listens_on():
    assert where_of("6e6f@127.0.0.1:80") == where_of("127.0.0.1:80") == "127.0.0.1:80"
