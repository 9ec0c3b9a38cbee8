"""Workers that meet before a request needs both: the way is open,
measured on demand, and reported."""

import asyncio

import pytest
from support.in_process_cluster import InProcessCluster
from support.models import TINY

from cli.doctor import Prompt, _measure, _Router, judge
from core.config import EngineConfig, TransferConfig
from core.ids import TransferId
from core.ports import StreamClosed
from core.session import Role
from kv_transfer import codec, frames
from transport.fetch_streams import fetch_network

ENGINE = EngineConfig(block_size_tokens=16, num_blocks=96, max_step_tokens=64)


async def met(cluster, num_routes):
    """The ways every decode worker has found."""
    async with asyncio.timeout(10):
        while True:
            links = [x for x in cluster.sessions.all() if x.descriptor.role is Role.DECODE]
            if links and all(len(x.routes.reports) == num_routes for x in links):
                return [route for x in links for route in x.routes.reports.values()]
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("transport", ["inproc", "grpc", "shm"])
async def test_workers_meet_when_they_join_and_no_request_is_first(transport):
    async with InProcessCluster(
        TINY, engine=ENGINE, transport=transport, prefill=2, decode=2
    ) as cluster:
        routes = await met(cluster, 2)
        assert {w.transport for w in routes} == {transport} and not any(w.error for w in routes)
        assert all(w.round_trip_s > 0 and w.gb_per_s == 0 for w in routes)
        late = cluster.of_role(Role.PREFILL)[0]
        await cluster._add(Role.PREFILL)
        assert len(await met(cluster, 3)) == 6, "a worker that joins later is introduced too"
        assert late.agent.num_live == 0 and late.agent.num_unknown == 0, "a probe is no transfer"


async def test_ways_are_measured_on_demand():
    async with InProcessCluster(TINY, engine=ENGINE, transport="grpc", prefill=2) as cluster:
        await met(cluster, 2)
        found = await cluster.sessions.measure(4 << 20)
        assert len(found) == 2 and {sender.worker_id for sender, _, _ in found} == {
            "prefill-0",
            "prefill-1",
        }
        assert all(route.gb_per_s > 0 and not route.error for _, _, route in found)
        assert sorted(w.gb_per_s for w in await met(cluster, 2)) == sorted(
            route.gb_per_s for _, _, route in found
        )


async def test_a_way_that_does_not_work_says_so():
    async with InProcessCluster(TINY, engine=ENGINE, transport="grpc") as cluster:
        await met(cluster, 1)
        await cluster.of_role(Role.PREFILL)[0].agent._network.close()
        [(_, _, route)] = await cluster.sessions.measure(1 << 20)
        assert route.error and route.gb_per_s == 0


async def test_a_probe_cannot_ask_for_more_than_its_bound(monkeypatch):
    monkeypatch.setattr("kv_transfer.probing.MAX_PROBE_BYTES", 1 << 20)
    async with InProcessCluster(
        TINY, engine=ENGINE, transport="grpc", transfer=TransferConfig(frame_bytes=1 << 18)
    ) as cluster:
        network = fetch_network()
        stream = await network.dial(cluster.of_role(Role.PREFILL)[0].descriptor.transfer_address)
        await stream.send(codec.encode(0, frames.Probe(1 << 62)))
        kinds = []
        with pytest.raises(StreamClosed):
            async with asyncio.timeout(10):
                while True:
                    kinds.append(type(codec.decode(await stream.recv())[1]).__name__)
        assert kinds == ["Heartbeat", *["Frame"] * 4, "Finished"]
        # A frame without parts is a probe's alone: in a transfer it ends the stream, and nothing is
        # attached.
        stream = await network.dial(cluster.of_role(Role.PREFILL)[0].descriptor.transfer_address)
        await stream.send(codec.encode(0, frames.Open(TransferId(bytes(16)), "x", 1, "y", 1, 16)))
        assert isinstance(codec.decode(await stream.recv())[1], frames.NotFound)
        await network.close()


LINK = {
    "prefill": "p",
    "decode": "d",
    "transport": "shm",
    "round_trip_ms": 1.0,
    "gb_per_s": 1.0,
    "error": None,
}


def prompts(*prefill_ms):
    return [Prompt(64 * 2**n, ms, 2_000_000 * 2**n, 0.0, "shm") for n, ms in enumerate(prefill_ms)]


@pytest.mark.parametrize(
    ("prefill_ms", "pays_from"),
    [
        ((4.0, 8.0, 16.0), 64),
        ((1.0, 8.0, 16.0), 128),
        ((4.0, 4.9, 16.0), 256),  # at 128 tokens it does not, so it pays from 256 on
        ((4.0, 8.0, 8.9), None),
        ((), None),
    ],
)
def test_the_verdict_is_the_length_from_which_moving_is_cheaper_on(prefill_ms, pays_from):
    """Moving takes 1 ms and 2 ms for every 2 MB: 3, 5 and 9 ms."""
    verdict = judge(LINK, prompts(*prefill_ms))
    assert verdict.pays_from_tokens == pays_from
    assert list(verdict.transfer_ms.values()) == [3.0, 5.0, 9.0][: len(prefill_ms)]
    assert (
        judge({**LINK, "gb_per_s": None, "error": "cut"}, prompts(*prefill_ms)).pays_from_tokens
        is None
    )


class CachingRouter(_Router):
    """A router that only remembers what it was asked, as every prefix cache does."""

    def __init__(self):
        self.beginnings = []
        self.scopes = []

    def ask(self, method, path, body=None):
        if path == "/links":
            return {"links": []}
        if path == "/v1/models":
            card = {"id": "tiny", "max_model_len": 300, "vocabulary_size": 1024}
            return {"data": [card]}
        self.beginnings.append(tuple(body["prompt"][:16]))
        self.scopes.append(body["cache_salt"])
        timing = {"prefill_ms": 1.0, "kv_bytes": 1, "exposed_transfer_ms": 1.0}
        return {"timing": {**timing, "path": "pd", "kv_transport": "shm"}}


def test_no_prompt_of_the_doctor_is_in_a_cache_nor_one_of_an_earlier_run():
    router = CachingRouter()
    for _ in range(2):
        _, prompts = _measure(router, 1, is_quiet=True)
        assert [p.tokens for p in prompts] == [64, 128, 256]
    assert len(router.scopes) == len(set(router.scopes)) == 18
    assert len(set(router.beginnings)) == 18
