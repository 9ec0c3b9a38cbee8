"""Member lists on pipes and in maps.

Owns the JSON form of a `WorkerDescriptor`, and a `Membership` whose list is set from outside. Does
not know where the list comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from core.containment import contained
from core.ids import Incarnation, WorkerId
from core.session import Role, WorkerDescriptor


def to_json(d: WorkerDescriptor) -> dict[str, Any]:
    """Describe a worker in plain values."""
    return {**asdict(d), "role": d.role.value, "rank_pids": list(d.rank_pids)}


def from_json(tree: dict[str, Any]) -> WorkerDescriptor:
    """Rebuild a descriptor from `to_json`."""
    return WorkerDescriptor(
        **{
            **tree,
            "worker_id": WorkerId(tree["worker_id"]),
            "role": Role(tree["role"]),
            "incarnation": Incarnation(tree["incarnation"]),
            "rank_pids": tuple(tree["rank_pids"]),
        }
    )


class PushedMembership:
    """The `Membership` port over the list that `update` was last called with."""

    def __init__(self) -> None:
        """Start empty, with workers expected."""
        self._members: tuple[WorkerDescriptor, ...] = ()
        self._watchers: list[Callable[[], None]] = []
        self._is_starting = True

    def update(self, members: Iterable[WorkerDescriptor], *, is_starting: bool) -> None:
        """Replace the list; call the watchers if anything changed."""
        # Sorted: an equal list in another order is no change, and wakes nobody.
        fresh = tuple(sorted(members, key=lambda m: m.worker_id))
        has_changed = (fresh, is_starting) != (self._members, self._is_starting)
        self._members = fresh
        self._is_starting = is_starting
        if has_changed:
            for watcher in self._watchers:
                with contained("a watcher of the members"):
                    watcher()

    def members(self) -> tuple[WorkerDescriptor, ...]:
        """Return the list."""
        return self._members

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` after every change."""
        self._watchers.append(on_change)

    def is_starting(self) -> bool:
        """Return True while more workers are expected."""
        return self._is_starting
