"""The process of the stub workers: `python -m bench.router.stub_process LIFE_FD`.

Owns their composition: session streams over gRPC, names of cached blocks in the prefix index. The
first line of standard input brings config and plan, and is answered with who the workers are; every
line after it with the first tokens sent since the line before. Does not know what is measured.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import uvloop

from bench.router.plan import RouterPlan
from bench.router.stub_blocks import StubBlocks
from bench.router.stub_worker import StubFirstToken, StubPace, StubWorker
from cluster.child import open_stdin, report
from cluster.members import to_json
from cluster.pools import pools_of
from cluster.prefix_index import IndexTask, make_publisher
from cluster.served_model import model_of
from core import logs
from core.block_hash import hash_key, naming_of
from core.clocks import SystemClock
from core.config import BatonConfig
from core.ids import Ids
from core.prefix_changes import StorageTier
from core.session import PoolId, Role, WorkerDescriptor
from engine.checkpoint.model_spec import ModelSpec
from prefix_index.publisher import Content
from process.parent_death import exit_with_parent
from transport.session_streams import session_network
from transport.stream_proof import stream_key

NUM_BLOCKS = 1 << 15
"""Half a million tokens of KV: a model of 8B parameters on a GPU of 80 GB."""


class StubPool:
    """All stub workers, and the first tokens that they have sent."""

    def __init__(self, config: BatonConfig, plan: RouterPlan) -> None:
        """Compose; `listen` begins to serve."""
        self._config = config
        self._first_tokens: dict[int, StubFirstToken] = {}
        self._pace = StubPace(plan.first_token_ms / 1e3, plan.token_ms / 1e3)
        self._ids = Ids()
        spec = model_of(config)
        self._workers = [self._make(spec, role) for role in Role for _ in range(plan.workers)]
        self._publishing: list[IndexTask] = []

    def _make(self, spec: ModelSpec, role: Role) -> tuple[StubWorker, StubBlocks]:
        security = self._config.security
        size = pools_of(self._config)[PoolId(role)].engine.block_size_tokens
        digest = spec.layout(size).content_digest
        key = hash_key(security.cluster_key)
        blocks = StubBlocks(
            NUM_BLOCKS,
            size,
            lambda scope: naming_of(digest, scope, size, key),
        )
        worker_id = self._ids.worker(role.value)
        descriptor = WorkerDescriptor(
            worker_id,
            role,
            self._ids.incarnation(),
            session_address="",
            transfer_address=f"shm={worker_id}",
            model=spec.name,
            content_digest=digest,
            block_size_tokens=size,
            num_blocks=NUM_BLOCKS,
            max_model_len=spec.max_model_len,
            pid=os.getpid(),
            exports_kv=False,  # peers would wait for KV that is not there
        )
        worker = StubWorker(
            descriptor,
            session_network(key=stream_key(security.cluster_key)),
            self._pace,
            blocks,
            SystemClock(),
            # Decode sends it again. The client has it from whoever was first, which is decode where
            # its Submit overtook the other one.
            self._first_tokens.setdefault,
        )
        return worker, blocks

    async def listen(self) -> list[dict[str, Any]]:
        """Serve sessions and publish caches; returns the workers' descriptions."""
        for worker, blocks in self._workers:
            await worker.listen()
            d = worker.descriptor
            life = (d.worker_id, d.incarnation)
            content = {StorageTier.POOL: Content(blocks.changes, blocks.read, blocks.num_blocks)}
            self._publishing.append(IndexTask(make_publisher(self._config, life, content)))
        return [to_json(worker.descriptor) for worker, _ in self._workers]

    def take_first_tokens(self) -> dict[int, tuple[float, float]]:
        """Return what was sent since the last call: by seed, (received, sent)."""
        taken = {seed: (f.received_at, f.sent_at) for seed, f in self._first_tokens.items()}
        self._first_tokens.clear()
        return taken


async def _main() -> None:
    lines = await open_stdin()
    order = json.loads(await lines.readline())
    config = BatonConfig.model_validate(order["config"])
    pool = StubPool(config, RouterPlan(**order["plan"]))
    report({"workers": await pool.listen()})
    while await lines.readline():
        report({"first_tokens": pool.take_first_tokens()})


if __name__ == "__main__":
    logs.configure("bench")
    exit_with_parent(int(sys.argv[1]))
    uvloop.run(_main())
