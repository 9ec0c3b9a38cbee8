"""Commands and transfers inside the cluster with impossible values harm only what they name."""

import contextlib
import random

import pytest
from support.hostile_peers import (
    KEY,
    RawRouter,
    attacked,
    good_submit,
    settled,
)
from support.process_cluster import is_long, note

from core.ids import TransferId
from core.ports import StreamClosed
from core.session import Role, Task
from kv_transfer import codec, frames
from protos.baton.internal.v1 import session_pb2 as pb
from transport.fetch_streams import fetch_network

SEED = 13


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
    async with attacked() as cluster:
        victim = cluster.of_role(role)[0]
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
        if field.name == "prefix_source":
            source = submit.prefix_source
            source.transfer_id = rng.randbytes(rng.choice((0, 15, 16, 17)))
            source.peer_address = "\0" * rng.choice((0, 1, 300, 5000))
            source.num_tokens = rng.choice(numbers) % 2**32
            source.wait_s = rng.choice(reals)
        elif kind == field.TYPE_MESSAGE:
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
    async with attacked() as cluster:
        victims = [
            (unit, await RawRouter(unit.descriptor.session_address, f"router-{i}").__aenter__())
            for i, unit in enumerate(cluster.units)
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
    async with attacked() as cluster:
        decode = cluster.of_role(Role.DECODE)[0]
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
    async with attacked() as cluster:
        network = fetch_network(key=KEY)
        for number in range(count):
            unit = cluster.units[number % 2]
            stream = await network.dial(unit.descriptor.transfer_address)
            with contextlib.suppress(StreamClosed):
                await stream.send(spoiled(rng))
                await stream.send(spoiled(rng))
            stream.reset()
        await network.close()
    assert all(unit.agent.num_live == 0 for unit in cluster.units)
