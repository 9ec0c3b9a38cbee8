"""Ranks as Ray actors in their worker's placement group, where each has its CPUs and GPU.

Owns one actor for each rank, and passing descriptors to it through a Unix socket. The actor only
starts `engine.ranks.rank` as its child, in the environment that Ray gave it
(`CUDA_VISIBLE_DEVICES`): plans, KV and the parent's death travel over the same pipes as without
Ray. Does not know models.

    placement group, STRICT_PACK:  bundle 0: worker's replica │ bundle 1: rank 0 │ 2: rank 1 ...
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from core.config import PoolConfig
from core.errors import ConfigError, WorkerLost

START_TIMEOUT_S = 60.0
MAX_FDS = 16
STRATEGY = "STRICT_PACK"
"""Ranks share memory with their worker, so they must be on its node."""


class RankActor:
    """Holds a bundle's resources and is the parent of one rank at a time."""

    def __init__(self) -> None:
        self._rank: subprocess.Popen[bytes] | None = None

    def spawn(self, path: str) -> int:
        """Receive descriptors from a Unix socket, start a rank with them, and return its pid."""
        self.reap()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(START_TIMEOUT_S)
            connection.connect(path)
            _, fds, _, _ = socket.recv_fds(connection, 1, MAX_FDS)
        command = [sys.executable, "-m", "engine.ranks.rank", *map(str, fds)]
        self._rank = subprocess.Popen(  # noqa: S603 - our own module
            command, pass_fds=fds, stdin=subprocess.DEVNULL
        )
        for fd in fds:
            os.close(fd)  # an open end here would hide the death of the rank or of the worker
        return self._rank.pid

    def reap(self) -> None:
        """Kill the last rank if it still runs, and reap it."""
        if self._rank is not None:
            self._rank.kill()
            self._rank.wait()
            self._rank = None


class ActorRank:
    """A rank that is another process's child: watched and killed by pid."""

    def __init__(self, pid: int, actor: Any) -> None:  # noqa: ANN401 - Ray's type
        """Watch a running rank."""
        self.pid = pid
        self._actor = actor
        # A descriptor of the process: its number may be another's by the time it is killed.
        self._pid_fd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Return None while it lives, like `Popen.poll`; else -1: only its parent has the code."""
        ready, _, _ = select.select([self._pid_fd], [], [], 0)
        return -1 if ready else None

    def kill(self) -> None:
        """End it."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._pid_fd, signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """Wait for its end once; the actor reaps it when it comes.

        Raises:
            subprocess.TimeoutExpired: It has not ended.
        """
        ready, _, _ = select.select([self._pid_fd], [], [], timeout)
        os.close(self._pid_fd)
        self._actor.reap.remote()
        if not ready:
            raise subprocess.TimeoutExpired("engine.ranks.rank", timeout)
        return -1


class ActorRanks:
    """Starts the ranks of one worker in the bundles of its placement group."""

    def __init__(self, pool: PoolConfig) -> None:
        """Make the actors; the replica runs in bundle 0 of the group."""
        group = ray.util.get_current_placement_group()
        cls = ray.remote(RankActor)
        self._actors = [
            cls.options(
                num_cpus=pool.rank_num_cpus,
                num_gpus=pool.rank_num_gpus,
                max_restarts=-1,
                max_task_retries=0,  # a socket of descriptors is gone once it was read
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=1 + rank
                ),
            ).remote()
            for rank in range(pool.engine.tensor_parallel_size)
        ]

    async def __call__(self, rank: int, fds: tuple[int, ...]) -> ActorRank:
        """Start one rank with these descriptors.

        Raises:
            WorkerLost: The actor did not fetch them.
        """
        loop = asyncio.get_running_loop()
        actor = self._actors[rank]
        with tempfile.TemporaryDirectory(prefix="baton-rank-") as folder:
            path = str(Path(folder) / "fds")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as server:
                server.bind(path)
                server.listen(1)
                try:
                    async with asyncio.timeout(START_TIMEOUT_S):
                        # Ray cannot carry descriptors; a socket on the same node can.
                        answer = actor.spawn.remote(path)
                        connection, _ = await loop.sock_accept(server)
                        with connection:
                            socket.send_fds(connection, [b"x"], list(fds))
                        return ActorRank(await answer, actor)
                except (TimeoutError, OSError, RayError) as error:
                    raise WorkerLost(
                        f"the actor of rank {rank} did not start it: {error}"
                    ) from error


def bundles(pool: PoolConfig) -> list[dict[str, float]]:
    """Return the resources of a worker: its replica, then its ranks, unless there is only one.

    A single rank is a child of the replica and shares its resources.
    """
    if pool.engine.tensor_parallel_size == 1:
        return [{"CPU": pool.num_cpus}]
    rank = {
        "CPU": pool.rank_num_cpus,
        **({"GPU": pool.rank_num_gpus} if pool.rank_num_gpus else {}),
    }
    return [{"CPU": pool.num_cpus}, *([rank] * pool.engine.tensor_parallel_size)]


def check_fit(setting: str, pool: PoolConfig, nodes: list[dict[str, Any]]) -> None:
    """Refuse a worker that no node can hold: Ray would let it wait for ever.

    Raises:
        ConfigError: Names what is needed, and what the best node has.
    """
    if pool.engine.tensor_parallel_size == 1 or not pool.replicas:
        return
    members = bundles(pool)
    needed = {key: sum(one.get(key, 0.0) for one in members) for key in ("CPU", "GPU")}
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(node.get(key, 0.0) >= amount for key, amount in needed.items()) for node in alive):
        return
    best = {key: max((node.get(key, 0.0) for node in alive), default=0.0) for key in needed}
    raise ConfigError(
        f"{setting}: a worker of {pool.engine.tensor_parallel_size} ranks needs "
        f"{needed['CPU']:g} CPUs and {needed['GPU']:g} GPUs on one node; the largest nodes have "
        f"{best['CPU']:g} and {best['GPU']:g}; lower engine.tensor_parallel_size, num_cpus, "
        "rank_num_cpus or rank_num_gpus"
    )
