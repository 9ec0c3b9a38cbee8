"""Which clusters run here: a small file each, written by `baton up`, read by `baton down`.

Owns the files and the proof that a pid is still the process that wrote one. Does not know clusters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from core.errors import ConfigError

STOP_TIMEOUT_S = 40.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Instance:
    """One `baton up`."""

    pid: int
    start_ticks: int
    http_port: int
    grpc_port: int
    kind: str
    model: str = ""
    config: str = ""
    """The config file; empty: it was started without one."""

    def __str__(self) -> str:
        """Name it for a person: what it serves, where, and how it was started."""
        where = f"HTTP port {self.http_port}" if self.http_port else "still starting"
        config = f", config {self.config}" if self.config else ""
        return f"{self.model or 'a cluster'} ({where}{config}, {self.kind}, pid {self.pid})"

    @property
    def is_alive(self) -> bool:
        """True while the very process that wrote the file runs."""
        return _start_ticks(self.pid) == self.start_ticks


def _start_ticks(pid: int) -> int:
    """Return when a process started (clock ticks since boot), which with the pid identifies it.

    0 means that it is gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    # A zombie has ended, though its parent has not looked yet.
    return 0 if fields[0] == "Z" else int(fields[19])


def _folder() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR") or str(Path("~/.cache").expanduser())
    return Path(base) / "baton"


@contextlib.contextmanager
def announced(
    kind: str, model: str = "", config: Path | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Let `baton down` find this process for the length of the block.

    Args:
        kind: How its processes run: local or ray.
        model: The name it serves.
        config: Its file.

    Yields a function to call with the ports (HTTP, gRPC) when they are known; 0 means unknown.
    """
    pid = os.getpid()
    path = _folder() / f"up-{pid}.json"

    def publish(http_port: int, grpc_port: int) -> None:
        running = Instance(
            pid,
            _start_ticks(pid),
            http_port,
            grpc_port,
            kind,
            model,
            str(config.absolute()) if config is not None else "",
        )
        new = path.with_suffix(".new")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new.write_text(json.dumps(asdict(running)))
            new.replace(path)  # a reader sees either the old file or the new one
        except OSError as error:  # a read-only home must not keep a cluster from serving
            logger.warning("`baton down` will not find this cluster: %s", error)

    try:
        yield publish
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def find_running() -> list[Instance]:
    """List clusters of this user on this machine; remove the files of dead ones."""
    found = []
    for path in sorted(_folder().glob("up-*.json")):
        try:
            running = Instance(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if running.is_alive:
            found.append(running)
        else:
            path.unlink(missing_ok=True)
    return found


def stop(http_port: int = 0) -> Instance:
    """End one cluster and wait until its process is gone.

    Args:
        http_port: Which one; 0: the only one.

    Raises:
        ConfigError: None runs, several run, or it did not end in time.
    """
    found = [r for r in find_running() if http_port in (0, r.http_port)]
    if not found:
        where = f" with HTTP port {http_port}" if http_port else ""
        raise ConfigError(f"no `baton up`{where} of this user runs on this machine")
    if len(found) > 1:
        clusters = "; ".join(map(str, found))
        raise ConfigError(
            f"{len(found)} clusters run: {clusters}; choose one with --http-port, or end the "
            "process of one that is still starting"
        )
    (running,) = found
    try:
        pidfd = os.pidfd_open(running.pid)
    except ProcessLookupError:
        return running
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not select.select([pidfd], [], [], STOP_TIMEOUT_S)[0]:
            raise ConfigError(
                f"the cluster of pid {running.pid} did not end within {STOP_TIMEOUT_S:g} s"
            )
    finally:
        os.close(pidfd)
    return running
