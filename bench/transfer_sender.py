"""The sending process of `baton bench transfer`: `python -m bench.transfer_sender LIFE_FD`.

Owns a transfer agent that publishes whole pools of blocks, and a bare stream of messages of the
same size. Does not know what is measured. Standard input brings the plan, then one job a line; each
answer is one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np

from bench.transfer_plan import BARE, LAYOUT, RECEIVER, TransferPlan, make_network, make_pool
from core.config import TransferConfig
from core.errors import ServingError
from core.ids import TransferId
from core.ports import MessageStream, StreamClosed
from core.types import Logprob
from engine.ranks.shared_kv import SharedKV
from kv_transfer.copying import warm
from kv_transfer.send_agent import SendAgent
from kv_transfer.sender import Blocks, Offer
from process.parent_death import exit_with_parent
from transport.fetch_streams import FETCH_CHANNELS
from transport.grpc_network import GrpcNetwork


class _SendCallbacks:
    """Publishes everything as soon as the receiver has room."""

    def __init__(self, plan: TransferPlan, kv: SharedKV) -> None:
        self.tables: dict[TransferId, tuple[int, ...]] = {}
        self.agent = SendAgent(
            make_network(plan.transport, kv),
            self,
            kv,
            LAYOUT,
            TransferConfig(frame_bytes=plan.frame_bytes),
        )

    def transfer_reserved(self, transfer_id: TransferId, have_blocks: int) -> None:
        """Publish every layer at once, in the order of a prompt's computation."""
        table = self.tables[transfer_id]
        for layer in range(LAYOUT.num_layers):
            self.agent.publish(
                transfer_id, 0, Blocks(layer, 0, table, len(table) * LAYOUT.block_size_tokens)
            )
        self.agent.commit(transfer_id, 0, {0: Logprob(1, 0.0)}, frozenset())

    def transfer_sent(self, transfer_id: TransferId) -> None:
        """Nothing to free."""

    def transfer_lost(self, transfer_id: TransferId, error: ServingError) -> None:
        """Nothing to do: the receiver reports it."""

    def transfer_drained(self, transfer_id: TransferId, sub_attempt: int) -> None:
        """Nothing to free."""


async def _send(lines: asyncio.StreamReader) -> None:
    plan = TransferPlan(**json.loads(await lines.readline()))
    kv = make_pool(plan.num_blocks * plan.streams)
    rng = np.random.default_rng(1)
    for segment in kv.segments():
        words = np.frombuffer(segment, np.uint64)
        # Random, because pages of zeros may be one page to the kernel.
        words[:] = rng.integers(0, 2**63, len(words), dtype=np.uint64)
    callbacks = _SendCallbacks(plan, kv)
    agent = callbacks.agent
    warm()
    bare = GrpcNetwork(BARE, num_channels=FETCH_CHANNELS)
    address = await agent.listen()
    bare_address = await bare.listen(lambda stream: _send_bare(stream, plan))
    _report({"address": address, "bare_address": bare_address})
    while line := await lines.readline():
        job = json.loads(line)
        if "offer" in job:
            transfer_id = TransferId(bytes.fromhex(job["offer"]))
            slot = job["slot"]
            callbacks.tables[transfer_id] = tuple(
                range(slot * plan.num_blocks, (slot + 1) * plan.num_blocks)
            )
            agent.offer(Offer(transfer_id, *RECEIVER))
            agent.start(transfer_id, plan.num_blocks * LAYOUT.block_size_tokens)
        else:
            _report({"cpu_s": time.process_time()})
    await agent.stop()
    await bare.close()


async def _send_bare(stream: MessageStream, plan: TransferPlan) -> None:
    message = bytes(plan.frame_bytes)
    try:
        while await stream.recv():
            for _ in range(-(-plan.transfer_bytes // plan.frame_bytes)):
                await stream.send(message)
    except StreamClosed:
        pass  # the parent has measured enough


def _report(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def _main() -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    await _send(lines)


if __name__ == "__main__":
    exit_with_parent(int(sys.argv[1]))
    asyncio.run(_main())
