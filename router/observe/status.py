"""The cluster as this router sees it: readiness, workers, KV routes, load.

Owns the answers to operators' questions. Does not know HTTP, nor what any request says.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from core.errors import Overloaded
from core.session import PoolId, RouteReport, WorkerDescriptor
from core.timeline import rounded_ms
from router.admission import Admission
from router.observe.readiness import (
    PROBLEMS,
    ClusterView,
    Proof,
    known_pools,
    num_usable,
    pools_of,
    state_of,
)
from router.observe.routers import RouterList
from router.workers.view import SessionState, WorkerView


class KnownWorkers(Protocol):
    """What is shown of the workers (`router.workers.sessions`)."""

    def views(self) -> Sequence[WorkerView]:
        """Every worker that this router knows."""
        ...

    async def measure(
        self, probe_bytes: int
    ) -> list[tuple[WorkerDescriptor, WorkerDescriptor, RouteReport]]:
        """Measure every route: sender, receiver and the report."""
        ...


class ClusterStatus:
    """What `baton status`, `/ready`, `/load` and the gauges show."""

    def __init__(
        self,
        model_name: str,
        workers: KnownWorkers,
        admission: Admission,
        proof: Proof,
        configured: Mapping[PoolId, int],
        read_store_state: Callable[[], str],
        routers: RouterList | None = None,
    ) -> None:
        """Show what the others know.

        Args:
            model_name: The served model.
            workers: Every worker that this router knows.
            admission: How many requests run and wait.
            proof: Decides whether the router is ready.
            configured: Workers that each pool should have.
            read_store_state: Whether the store answers; "off" without one.
            routers: Those that this one knows; None: itself alone.
        """
        self.proof = proof
        self.routers = routers or RouterList()
        self._model_name = model_name
        self._workers = workers
        self._admission = admission
        self._configured = configured
        self._read_store_state = read_store_state
        self._measuring = asyncio.Lock()

    # --- readiness --------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """True when a request can get through."""
        return self.proof.is_good and not self._admission.is_draining

    def readiness(self) -> dict[str, Any]:
        """Describe readiness per model, and every difference from the config."""
        view = self._view()
        problems = view.problems()
        took_s = self.proof.took_s
        return {
            "ready": self.is_ready,
            "state": state_of(problems, is_ready=self.is_ready),
            "problems": [problem.tree() for problem in problems],
            "store": view.store,
            "models": {
                self._model_name: {
                    **pools_of(view.workers, self._configured),
                    "canary_ms": None if took_s is None else rounded_ms(took_s),
                    "canary_error": self.proof.error,
                }
            },
        }

    def _view(self) -> ClusterView:
        return ClusterView(
            workers=self._workers.views(),
            configured=self._configured,
            store=self._read_store_state(),
            is_draining=self._admission.is_draining,
            is_starting=not self.proof.has_passed,
            canary_error=self.proof.error,
        )

    # --- gauges -----------------------------------------------------------------------------------

    def live_by_pool(self) -> dict[PoolId, int]:
        """Count usable workers of each pool that the config has."""
        workers = self._workers.views()
        return {pool: num_usable(workers, pool) for pool in known_pools(self._configured)}

    def num_by_problem(self) -> dict[str, int]:
        """Count problems by code, zeros included."""
        found = Counter(problem.code for problem in self._view().problems())
        return {code: found[code] for code in PROBLEMS}

    # --- workers and routes -----------------------------------------------------------------------

    def replicas(self) -> list[dict[str, Any]]:
        """Describe every worker, for `baton status`."""
        return [replica(worker) for worker in self._workers.views()]

    def routes(self) -> list[dict[str, Any]]:
        """Describe every KV route between workers, as last connected or measured."""
        workers = self._workers.views()
        senders = {x.descriptor.transfer_address: x.descriptor for x in workers}
        return [
            _route(senders[address], worker.descriptor, route)
            for worker in workers
            for address, route in worker.routes.items()
            if address in senders
        ]

    async def measure_routes(self, mib: int) -> list[dict[str, Any]]:
        """Move `mib` MiB over every KV route and describe it.

        Raises:
            Overloaded: Another caller is measuring: two at once would measure one another, and load
                the workers twice.
        """
        # Refused, not queued: the measurement that runs is the answer in a few seconds.
        if self._measuring.locked():
            raise Overloaded("another caller is measuring the routes; try again in some seconds", 5)
        async with self._measuring:
            return [_route(*found) for found in await self._workers.measure(mib << 20)]

    def load(self) -> dict[str, Any]:
        """Describe the load of the router and of each pool."""
        pools: dict[str, dict[str, int]] = {
            str(pool_id): {
                "replicas": 0,
                "running": 0,
                "waiting": 0,
                "waiting_tokens": 0,
                "free_blocks": 0,
            }
            for pool_id in known_pools(self._configured)
        }
        for worker in self._workers.views():
            pool = pools.get(str(worker.descriptor.pool))
            if pool is None:  # of a config with other tiers
                continue
            pool["replicas"] += worker.state is SessionState.LIVE
            pool["running"] += worker.load.num_running
            pool["waiting"] += worker.load.num_waiting
            pool["waiting_tokens"] += worker.load.waiting_tokens
            # Cached blocks are given up whenever blocks are needed, so they are free for this
            # purpose.
            pool["free_blocks"] += worker.load.free_blocks + worker.load.cached_blocks
        running = self._admission.num_running
        queued = self._admission.num_queued
        return {
            "server_load": running + queued,
            "running": running,
            "queued": queued,
            "tiers": self._tiers(),
            "pools": pools,
        }

    def _tiers(self) -> dict[str, dict[str, int]]:
        admission = self._admission
        queued = admission.queued_by_tier()
        return {
            tier: {
                "running": running,
                "queued": queued[tier],
                "refused": admission.num_refused[tier],
                "overflowed": admission.num_overflowed[tier],
            }
            for tier, running in admission.running_by_tier().items()
        }


def replica(worker: WorkerView) -> dict[str, Any]:
    """Describe one worker, for operators and for the store."""
    d = worker.descriptor
    load = worker.load
    return {
        "role": d.role.value,
        "tier": d.tier,
        "worker_id": d.worker_id,
        "pid": d.pid,
        "rank_pids": list(worker.rank_pids),
        "node": d.node,
        # Before the `@` stands the listener's nonce, which only diallers need.
        "address": d.session_address.rpartition("@")[2],
        "state": worker.state.name.lower() if worker.is_ready else "restarting",
        "load": {
            "running": load.num_running,
            "waiting": load.num_waiting,
            "waiting_tokens": load.waiting_tokens,
            "free_blocks": load.free_blocks,
            "cached_blocks": load.cached_blocks,
            "total_blocks": d.num_blocks,
        },
    }


def _route(
    sender: WorkerDescriptor, receiver: WorkerDescriptor, route: RouteReport
) -> dict[str, Any]:
    return {
        "prefill": sender.worker_id,
        "decode": receiver.worker_id,
        "transport": route.transport,
        "round_trip_ms": rounded_ms(route.round_trip_s),
        "gb_per_s": round(route.gb_per_s, 3) or None,
        "error": route.error or None,
    }
