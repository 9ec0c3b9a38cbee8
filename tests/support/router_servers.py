"""Both servers over a real service whose workers never come: what is refused, and what waits.

Owns the composition and the keys of two tenants, a scraper and an operator.
"""

import asyncio
import contextlib
import json
import logging

import grpc.aio
import httpx
import pytest

from core import events
from core.clocks import SystemClock
from core.config import BatonConfig
from core.ids import Ids
from core.logs import JsonFormat
from core.tenant_classes import TenantClasses
from protos.baton.v1 import generation_pb2 as pb
from router.access.credentials import Keyring, new_key
from router.access.identities import KeyRole
from router.compose import RouterComponents, ServiceComponents, compose_service
from router.grpc.server import GrpcServer
from router.http.app import make_app
from router.http.body_reading import BodyReader
from router.request_params import ServedModel
from router.text.detokenizing import TextModel
from router.tiers import Tiers
from simulation.ports import StaticMembership
from support.byte_tokenizer import ByteTokenizer
from support.process_cluster import ROOT

ROLES = {
    "acme": KeyRole.TENANT,
    "bulk": KeyRole.TENANT,
    "scraper": KeyRole.METRICS,
    "operator": KeyRole.ADMIN,
}


class RouterServers:
    """A service without a live worker, and both its servers."""

    def __init__(
        self,
        folder,
        is_open=False,
        certificate=None,
        parts=None,
        tier="batch",
        tiers=None,
        keys=None,
        classes=(),
        **router,
    ):
        """`parts` are those of the service, `tier` that of the keys, the rest of the config.

        `keys` are those that another one has made; each is of the class with its name, of which
        `classes` are listed.
        """
        self.made = made = keys or {
            n: new_key(n, tier, role, tenant_class=n) for n, role in ROLES.items()
        }
        self.keys = {name: key for name, (key, _) in made.items()}
        file = folder / "keys"
        file.write_text("".join(line + "\n" for _, line in made.values()))
        file.chmod(0o600)
        config = BatonConfig.model_validate(
            {"router": {"grpc_port": 0, **router}, "tiers": tiers or {}}
        )
        offered = Tiers(config.tiers)
        listed = TenantClasses(classes)
        clock = SystemClock()
        self.members = StaticMembership()
        text = TextModel(ROOT / "models" / "baton-tiny")
        composed = compose_service(
            RouterComponents(
                membership=self.members,
                session_network=None,
                config=config.router,
                placement=config.placement,
                clock=clock,
                ids=Ids(),
                new_decoder=lambda r: text.decoder(r.token_ids, skips_special=True),
                tiers=offered,
            ),
            ServiceComponents(
                model=ServedModel("tiny", 256, 2048, (), "float32"),
                tokenizer=ByteTokenizer(),
                text=text,
                seed_key=b"a key of these tests",
                keyring=Keyring(
                    "" if is_open else str(file), clock.now_s, tiers=offered, classes=listed
                ),
                tenant_classes=listed,
                expected_roles=frozenset(),
                **(parts or {}),
            ),
        )
        self.sessions = composed.core.sessions
        self.attempts = composed.core.attempts
        self.orchestrator = composed.core.orchestrator
        self.mirror = composed.mirror
        self.service = composed.service
        self.app = make_app(self.service, 0, BodyReader(config.router.max_body_bytes, 5.0, 30.0))
        self.grpc = GrpcServer(self.service, config.security, certificate)
        self.channel = None

    @contextlib.asynccontextmanager
    async def opened(self):
        await self.grpc.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc.port}") as self.channel:
                yield self
        finally:
            await self.grpc.stop(0)
            await self.service.stop(0)

    def web(self, name=None, address="127.0.0.1"):
        """An HTTP client with a key, and an address it seems to come from."""
        transport = httpx.ASGITransport(
            self.app, client=(address, 4000), raise_app_exceptions=False
        )
        headers = {"authorization": f"Bearer {self.keys[name]}"} if name else {}
        return httpx.AsyncClient(transport=transport, base_url="http://router", headers=headers)

    def call(self, method, message, name=None, answers=None, **metadata):
        """A gRPC call with a key; streams are read to their end by the caller."""
        fields = [(k.replace("_", "-"), v) for k, v in metadata.items()]
        if name:
            fields.append(("authorization", f"Bearer {self.keys[name]}"))
        path = f"/baton.v1.Generation/{method}"
        if method in ("GenerateStream", "Chat"):
            return self.channel.unary_stream(path)(message.SerializeToString(), metadata=fields)
        answers = answers or getattr(pb, f"{method}Response")
        kind = self.channel.unary_unary(path, response_deserializer=answers.FromString)
        return kind(message.SerializeToString(), metadata=fields)

    def wait_for_workers(self):
        """From now on requests wait for a worker that never comes."""
        self.members.starting = 1


@contextlib.contextmanager
def log_lines():
    """Events of requests and refusals, as JSON has them; complete when the block ends."""
    found = []
    formatter = JsonFormat("router")

    class Taker(logging.Handler):
        def emit(self, record):
            if record.event in (events.REQUEST.name, events.REFUSAL.name):
                found.append(json.loads(formatter.format(record)))

    taker, level = Taker(), events.LOGGER.level
    events.LOGGER.setLevel(logging.INFO)
    events.LOGGER.addHandler(taker)
    try:
        yield found
    finally:
        events.LOGGER.setLevel(level)
        events.LOGGER.removeHandler(taker)


async def refusal_of(call):
    """Status of a gRPC call that fails, whole or stream."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "read"):
            await call.read()
        else:
            await call
    return caught.value.code().name


async def answer_of(call):
    """A call as a coroutine, of which a task can be made."""
    return await call


async def until(is_so):
    """The server's task may end after its client has the answer."""
    async with asyncio.timeout(5):
        while not is_so():
            await asyncio.sleep(0.01)


def counted(servers, family, **labels):
    """Sum of the series of the exposition that have these labels, 0 without any."""
    wanted = {f'{k}="{v}"' for k, v in labels.items()}
    total = 0.0
    for line in servers.service.telemetry.text().decode().splitlines():
        name, _, rest = line.partition("{")
        if name == family and set(rest.partition("}")[0].split(",")) >= wanted:
            total += float(line.rpartition(" ")[2])
    return total
