"""A cluster under attack, and hostile peers at its ports inside, with its key and without.

Owns the neighbours that are asked meanwhile, a router that sends raw bytes, a dialler that sends
any metadata, and the good Submit that the attacks start from.
"""

import asyncio
import contextlib

import grpc
import grpc.aio

from core.config import EngineConfig
from core.session import Task
from protos.baton.internal.v1 import session_pb2 as pb
from support.in_process_cluster import InProcessCluster
from support.models import TINY
from transport.grpc_network import DIALLER_KEY, NONCE_KEY, GrpcNetwork

KEY = b"the key that the processes of this cluster share"
SESSION = "/baton.internal.v1.SessionService/Open"
FETCH = "/baton.internal.v1.KVTransfer/Fetch"
PROMPT = tuple(range(40, 80))
ANSWER_S = 60.0
HEARTBEAT_S = 0.5
ENGINE = EngineConfig(block_size_tokens=16, num_blocks=128, max_step_tokens=64)
NEIGHBOUR = {"max_tokens": 24, "ignore_eos": True}
PAUSE_S = 0.2
"""Between two requests of the neighbour, so that attacks have the machine most of the time."""


@contextlib.asynccontextmanager
async def attacked():
    """A cluster under attack: neighbours are asked all the while, and each is answered exactly."""
    async with InProcessCluster(TINY, engine=ENGINE, transport="grpc", key=KEY) as cluster:
        alone = await cluster.ask(PROMPT, **NEIGHBOUR)
        over, answers = asyncio.Event(), []

        async def ask_on():
            while not over.is_set() or not answers:
                answers.append(await cluster.ask(PROMPT, **NEIGHBOUR))
                await asyncio.sleep(PAUSE_S)

        asking = asyncio.create_task(ask_on())
        try:
            yield cluster
        finally:
            over.set()
            await asking
        assert all(a.ended.error is None and a.tokens == alone.tokens for a in answers)
        assert all(len(a.ended.timing.attempts) == 1 for a in answers), "no attempt was lost"
        assert all(unit.is_ready for unit in cluster.units)


async def settled(unit, run_id):
    """Wait until a worker has forgotten an attempt."""
    async with asyncio.timeout(20):
        while run_id in unit.attempts.by_run:
            await asyncio.sleep(0.01)


def where_of(address):
    """Host and port of a listener, without what only the cluster needs."""
    return address.rpartition("@")[2]


async def open_stream(address, method, metadata=None, data=None):
    """Open a stream, and perhaps send a message; returns how it ended.

    A caller that is to be refused sends none: a refusal that crosses a message may arrive as a
    broken stream.
    """
    async with grpc.aio.insecure_channel(where_of(address)) as channel:
        call = channel.stream_stream(method)(metadata=tuple((metadata or {}).items()), timeout=20)
        try:
            if data is not None:
                await call.write(data)
            await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the status says it
        return await call.code(), await call.details()


def macs(proof, nonce):
    """The metadata that a dialler sends."""
    return {NONCE_KEY: nonce, DIALLER_KEY: proof.dialler_mac}


def good_submit(request_id, task=Task.LOCAL, n=1, **fields):
    """A Submit that a worker takes."""
    sampling = pb.Sampling(
        temperature=0.0, top_p=1.0, n=n, max_tokens=4, repetition_penalty=1.0, ignore_eos=True
    )
    return pb.Submit(
        request_id=request_id,
        task=task.value,
        model="m",
        prompt=PROMPT,
        sampling=sampling,
        time_left_s=30.0,
        emitted=[pb.TokenIds()] * n,
        **{"credit": 256, **fields},
    )


class RawRouter:
    """A router with the key, whose every byte is the test's to choose."""

    def __init__(self, address, router_id="router-of-an-attacker", key=KEY):
        self.address, self.router_id = address, router_id
        self.network = GrpcNetwork(SESSION, key=key)
        self.number, self.stream = 0, None
        self._turn = asyncio.Lock()

    async def __aenter__(self):
        await self.greet()
        return self

    async def __aexit__(self, *_):
        await self.network.close()

    async def greet(self):
        """Open a stream, also where there was one."""
        self.stream, self.number = await self.network.dial(self.address), 0
        await self.say(hello=pb.Hello(router_id=self.router_id))
        assert (await self.hear()).WhichOneof("message") == "welcome"

    async def say(self, **message):
        async with self._turn:
            await self.say_bytes(pb.ToWorker(number=self.number, **message).SerializeToString())

    async def say_bytes(self, data):
        self.number += 1
        await self.stream.send(data)

    async def _heartbeat(self, over):
        while not over.is_set():
            await self.say(heartbeat=pb.RouterHeartbeat())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await over.wait()

    async def hear(self):
        async with asyncio.timeout(ANSWER_S):
            return pb.ToRouter.FromString(await self.stream.recv())

    async def end_of(self, request_id):
        """How an attempt ended, and the tokens it had brought; beats, as routers do."""
        over = asyncio.Event()
        beating = asyncio.create_task(self._heartbeat(over))
        try:
            return await self._hear_end_of(request_id)
        finally:
            over.set()  # a write that is cancelled would end the stream
            await asyncio.gather(beating, return_exceptions=True)

    async def _hear_end_of(self, request_id):
        tokens = []
        while True:
            message = await self.hear()
            if message.WhichOneof("message") != "frame":
                continue
            for delta in message.frame.deltas:
                if delta.request_id == request_id:
                    tokens += delta.token_ids
            for ended in message.frame.ended:
                if ended.request_id == request_id:
                    return ended, tokens

    async def cancel(self, request_id, epoch=0):
        await self.say(cancel=pb.Cancel(request_id=request_id, epoch=epoch))
