"""What `/ready` says: whether a request gets through, and every difference from the config.

Owns what canaries have proved, the list of problems and their words. Does not know HTTP or gRPC.

    ready       a request gets through, and nothing is missing
    degraded    a request gets through, but something that is configured is missing
    not_ready   no request gets through: the cluster starts, drains, or has lost what it needs
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.change_event import ChangeEvent
from core.session import PoolId, Role
from router.workers.view import SessionState, WorkerView

STORE_UNREACHABLE = "down"
PROBLEMS = (
    "starting",
    "draining",
    "no_request_gets_through",
    "pool_empty",
    "pool_short",
    "worker_connecting",
    "worker_reconnecting",
    "worker_lost",
    "worker_paused",
    "store_unreachable",
)


class Proof:
    """What canaries have proved so far: that a request gets through, and whether it crossed."""

    def __init__(
        self,
        read_live_roles: Callable[[], Collection[Role]],
        expected_roles: Collection[Role],
        *,
        must_cross: bool,
    ) -> None:
        """Start without any proof.

        Args:
            read_live_roles: Those of workers that take requests.
            expected_roles: Those of the pools that the config asks for.
            must_cross: Path pd is forced: the router is ready only while all of them live.
        """
        self._read_live_roles = read_live_roles
        self._expected_roles = frozenset(expected_roles)
        self._must_cross = must_cross
        self._has_crossed = False
        self._error = "no canary has run yet"
        self._checks = ChangeEvent()
        self.took_s: float | None = None
        """How long the last canary took; None: it failed, or could not be sent."""
        self.has_passed = False
        """A request got through at least once."""

    @property
    def checked(self) -> asyncio.Event:
        """Set after the next canary. Take it before you read `is_good`, wait for it after."""
        return self._checks.next

    def note(self, took_s: float | None, error: str, *, crossed: bool) -> None:
        """Note how a canary ended; with an error it took None."""
        self.took_s = took_s
        self._error = error
        # Kept after later failures: a router that once worked is no longer starting.
        self.has_passed = self.has_passed or took_s is not None
        self._has_crossed = self._has_crossed or (took_s is not None and crossed)

    def note_unsent(self) -> None:
        """Note that no canary was sent, for lack of workers."""
        self.took_s = None

    def note_checked(self) -> None:
        """Wake those who wait for the next canary."""
        self._checks.note()

    def missing_roles(self) -> list[str]:
        """List roles without which there is no readiness.

        All expected ones before the first canary has crossed, or always when it must cross; later
        any one worker is enough, since requests can run local.
        """
        live = frozenset(self._read_live_roles())
        # Crossed once, the transfer works: from then on local requests are a way out.
        if self._must_cross or not self._has_crossed or not live:
            return sorted(self._expected_roles - live)
        return []

    @property
    def error(self) -> str:
        """Why the router is not ready; empty when it is."""
        missing = self.missing_roles()
        return f"no {' and no '.join(missing)} worker is live" if missing else self._error

    @property
    def is_good(self) -> bool:
        """True when the last canary got through and nobody it needs has gone since."""
        return self.took_s is not None and not self.missing_roles()


@dataclass(frozen=True, slots=True)
class Problem:
    """One difference from the config, or one reason why no request gets through."""

    code: str
    """One of `PROBLEMS`."""
    detail: str

    def tree(self) -> dict[str, str]:
        """Return it as JSON."""
        return {"code": self.code, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What a router sees of its cluster at one moment."""

    workers: Sequence[WorkerView]
    configured: Mapping[PoolId, int]
    """Workers that each pool should have."""
    store: str
    is_draining: bool
    is_starting: bool
    """No request has got through yet."""
    canary_error: str
    """Why the last canary failed; empty if it got through."""

    def problems(self) -> list[Problem]:
        """List every problem, the most important first."""
        found = []
        if self.is_draining:
            found.append(Problem("draining", "the router is shutting down and takes nothing new"))
        elif self.canary_error:
            code = "starting" if self.is_starting else "no_request_gets_through"
            found.append(Problem(code, self.canary_error))
        for pool in known_pools(self.configured):
            found += self._pool(pool)
        found += [problem for worker in self.workers if (problem := _of_worker(worker)) is not None]
        if self.store == STORE_UNREACHABLE:
            detail = "Redis does not answer; requests are not affected"
            found.append(Problem("store_unreachable", detail))
        return found

    def _pool(self, pool: PoolId) -> list[Problem]:
        num_configured = self.configured.get(pool, 0)
        # By the config, not by who is there: a worker that never came is missed as well.
        num_ready = num_usable(self.workers, pool)
        if num_ready >= num_configured:
            return []
        detail = f"{num_ready} of {num_configured} {pool} workers are ready"
        return [Problem("pool_short" if num_ready else "pool_empty", detail)]


def known_pools(configured: Mapping[PoolId, int]) -> list[PoolId]:
    """List the shared pools, which are shown even where there are none, and all that should be."""
    return list(dict.fromkeys((*map(PoolId, Role), *configured)))


def num_usable(workers: Iterable[WorkerView], pool: PoolId) -> int:
    """Count workers of a pool that are connected and take requests."""
    return sum(
        worker.state is SessionState.LIVE and worker.is_ready and worker.descriptor.pool == pool
        for worker in workers
    )


def _of_worker(worker: WorkerView) -> Problem | None:
    d = worker.descriptor
    name = f"{d.pool} worker {d.worker_id} (pid {d.pid})"
    match worker.state:
        case SessionState.DIALLING:
            return Problem("worker_connecting", f"{name} is dialled")
        case SessionState.RECONNECTING:
            return Problem("worker_reconnecting", f"the session with {name} broke and is dialled")
        case SessionState.LOST:
            return Problem("worker_lost", f"{name} does not answer; it is dialled again")
        case SessionState.LIVE:
            detail = f"{name} drains or restarts its ranks"
            return None if worker.is_ready else Problem("worker_paused", detail)


def state_of(problems: list[Problem], *, is_ready: bool) -> str:
    """Sum up the problems in one word."""
    if not is_ready:
        return "not_ready"
    return "degraded" if problems else "ready"


def pools_of(workers: Sequence[WorkerView], configured: Mapping[PoolId, int]) -> dict[str, Any]:
    """Count the workers of each pool: ready, known, configured."""
    return {
        str(pool): {
            "ready": num_usable(workers, pool),
            "total": sum(1 for worker in workers if worker.descriptor.pool == pool),
            "configured": configured.get(pool, 0),
        }
        for pool in known_pools(configured)
    }
