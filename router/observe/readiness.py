"""What `/ready` says: whether a request gets through, and every difference from the config.

Owns the list of problems and their words. Does not know HTTP or gRPC.

    ready       a request gets through, and nothing is missing
    degraded    a request gets through, but something that is configured is missing
    not_ready   no request gets through: the cluster starts, drains, or has lost what it needs
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.session import Role
from router.workers.session import SessionState, WorkerSession

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
class View:
    """What a router sees of its cluster at one moment."""

    sessions: Sequence[WorkerSession]
    configured: Mapping[Role, int]
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
        for role in Role:
            found += self._pool(role)
        found += [
            problem for session in self.sessions if (problem := _of_session(session)) is not None
        ]
        if self.store == STORE_UNREACHABLE:
            detail = "Redis does not answer; requests are not affected"
            found.append(Problem("store_unreachable", detail))
        return found

    def _pool(self, role: Role) -> list[Problem]:
        num_configured = self.configured.get(role, 0)
        num_ready = num_usable(self.sessions, role)
        if num_ready >= num_configured:
            return []
        detail = f"{num_ready} of {num_configured} {role.value} workers are ready"
        return [Problem("pool_short" if num_ready else "pool_empty", detail)]


def num_usable(sessions: Iterable[WorkerSession], role: Role) -> int:
    """Count workers of a pool that are connected and take requests."""
    return sum(
        session.state is SessionState.LIVE and session.is_ready and session.descriptor.role is role
        for session in sessions
    )


def _of_session(session: WorkerSession) -> Problem | None:
    d = session.descriptor
    name = f"{d.role.value} worker {d.worker_id} (pid {d.pid})"
    match session.state:
        case SessionState.DIALLING:
            return Problem("worker_connecting", f"{name} is dialled")
        case SessionState.RECONNECTING:
            return Problem("worker_reconnecting", f"the session with {name} broke and is dialled")
        case SessionState.LOST:
            return Problem("worker_lost", f"{name} does not answer; it is dialled again")
        case SessionState.LIVE:
            detail = f"{name} drains or restarts its ranks"
            return None if session.is_ready else Problem("worker_paused", detail)


def state_of(problems: list[Problem], *, is_ready: bool) -> str:
    """Sum up the problems in one word."""
    if not is_ready:
        return "not_ready"
    return "degraded" if problems else "ready"


def pools_of(sessions: Sequence[WorkerSession], configured: Mapping[Role, int]) -> dict[str, Any]:
    """Count the workers of each pool: ready, known, configured."""
    return {
        role.value: {
            "ready": num_usable(sessions, role),
            "total": sum(1 for session in sessions if session.descriptor.role is role),
            "configured": configured.get(role, 0),
        }
        for role in Role
    }
