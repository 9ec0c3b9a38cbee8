"""A simulated worker on a node of its own.

Owns its composition from the product's components, with a hash model and memory for ranks. Does not
know routers or faults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.ids import RouterId, TransferId, WorkerId
from core.plan import StepPlan
from core.prefix_changes import StorageTier
from core.session import PoolId, Role, Submit
from decode_worker.role import DecodeRole
from engine.scheduling.block_changes import BlockChanges
from prefill_worker.role import PrefillRole
from prefix_index.publisher import Content, PrefixPublisher
from simulation.block_store import MemoryBlockStore
from simulation.hash_runner import MemoryKV
from simulation.network import SimNetwork, on_node
from simulation.ports import NodeClock
from simulation.runner import SimRunner
from simulation.shape import HASH_KEY, VOCABULARY
from simulation.traps import Place, Traps
from simulation.world import World
from worker.attempts import AttemptTable
from worker.components import TierStore, WorkerComponents
from worker.router_session import FRAME_BYTES
from worker.worker import Worker
from worker.worker import compose as compose_worker

ENVELOPE_BYTES = 1 << 10
"""Room in a message for what is around a frame."""
CALLBACKS = (
    "transfer_reserved",
    "transfer_sent",
    "transfer_starting",
    "transfer_arrived",
)
"""What an agent posts to its worker's loop while a transfer goes well."""


def _stores(world: World, node: str) -> tuple[TierStore, ...]:
    """Make the storage tiers of a worker, as far as the shape has them."""
    shape = world.shape
    bytes_per_s = world.layout.block_bytes / max(shape.copy_block_s, 1e-6)
    stores = []
    if shape.host_blocks:
        host = MemoryBlockStore(world.layout, shape.copy_block_s)
        stores.append(TierStore(StorageTier.HOST, host, shape.host_blocks, bytes_per_s))
    if shape.disk_blocks:
        disk = world.disks.setdefault(node, MemoryBlockStore(world.layout, shape.copy_block_s))
        stores.append(TierStore(StorageTier.DISK, disk, shape.disk_blocks, bytes_per_s))
    return tuple(stores)


@dataclass(frozen=True, slots=True)
class WorkerNode:
    """One worker, and what faults reach of its node."""

    worker: Worker
    runner: SimRunner
    clock: NodeClock
    publisher: PrefixPublisher | None
    """None: it caches nothing."""


def compose(
    world: World,
    node: str,
    pool: PoolId,
    slowness: float,
    on_step: Callable[[StepPlan], None],
    *,
    is_incompatible: bool,
) -> WorkerNode:
    """Compose a worker as in production; nothing of it runs yet.

    Args:
        world: What all nodes share.
        node: Its name.
        pool: Which it is in.
        slowness: How many times longer its steps take than the shape says.
        on_step: Sees each plan before it is executed.
        is_incompatible: It holds another model than it announces.
    """
    shape = world.shape
    layout = world.layout
    if is_incompatible:
        layout = dataclasses.replace(layout, model_digest="another")
    changes = BlockChanges() if shape.engine.cache_prefixes else None
    kv = MemoryKV(layout, shape.engine.num_blocks)
    clock = NodeClock()
    runner = SimRunner(
        kv,
        world.layout,
        VOCABULARY,
        world.rng,
        lambda plan: slowness * (shape.step_s + shape.token_s * plan.num_tokens),
        on_step,
        shape.spawn_s,
        shape.load_s,
    )
    components = WorkerComponents(
        role=PrefillRole if pool.role is Role.PREFILL else DecodeRole,
        runner=runner,
        kv=kv,
        layout=layout,
        engine=shape.engine,
        transfer=shape.transfer,
        max_model_len=shape.max_model_len,
        vocabulary_size=VOCABULARY,
        session_network=SimNetwork(world.hub, node, "session"),
        transfer_network=SimNetwork(world.hub, node, "fetch"),
        clock=clock,
        worker_id=WorkerId(node),
        incarnation=world.ids.incarnation(),
        model="hash",
        frame_bytes=min(FRAME_BYTES, (shape.max_message_bytes or FRAME_BYTES) - ENVELOPE_BYTES),
        hash_key=HASH_KEY,
        block_changes=changes,
        stores=_stores(world, node),
        tiers=shape.tiers,
        tier=pool.tier,
    )
    # Tasks and timers belong to the node in whose context they are made.
    worker = on_node(node).run(compose_worker, components)
    # What it announces, whatever it holds: the transfer has to find out.
    worker.descriptor = dataclasses.replace(
        worker.descriptor, content_digest=world.layout.content_digest
    )
    _trap_callbacks(worker.attempts, node, world.traps)
    _trap_submits(worker.attempts, node, world.traps)
    world.rare_choices.take_hold(node, worker.scheduler, worker.attempts.wake)
    publisher = None
    if changes is not None:
        publisher = PrefixPublisher(
            world.prefix_store,
            (components.worker_id, components.incarnation),
            {StorageTier.POOL: Content(changes, worker.pool.registered, worker.pool.num_blocks)},
            world.codec,
            clock,
        )
    return WorkerNode(worker, runner, clock, publisher)


def _trap_submits(attempts: AttemptTable, node: str, traps: Traps) -> None:
    """Let what a session reader calls raise."""
    submit_untrapped = attempts.submit

    def trapped(router_id: RouterId, submit: Submit) -> None:
        traps.step(Place.SUBMIT, node, submit.run_id)
        submit_untrapped(router_id, submit)

    attempts.submit = trapped  # type: ignore[method-assign]


def _trap_callbacks(attempts: AttemptTable, node: str, traps: Traps) -> None:
    """Let what an agent posts to the worker's loop raise."""
    for name in CALLBACKS:
        if (callback := getattr(attempts.role, name, None)) is not None:
            setattr(attempts.role, name, _trapped_callback(attempts, node, traps, name, callback))


def _trapped_callback(
    attempts: AttemptTable, node: str, traps: Traps, name: str, callback: Callable[..., None]
) -> Callable[..., None]:
    asking = traps.asking.setdefault(node, {})

    def trapped(transfer_id: TransferId, *args: Any) -> None:  # noqa: ANN401
        for key, attempt in attempts.by_run.items():
            if attempt.submit.transfer_id == transfer_id:
                traps.step(Place.CALLBACK, node, key)
                break
        if name == "transfer_starting":
            asking[transfer_id] = None
        callback(transfer_id, *args)

    return trapped
