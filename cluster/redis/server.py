"""The Redis server that Baton starts when the config names none.

Owns the server's process, its restarts, its private folder with the socket, and the rights of its
one user. It listens on a Unix socket that only this user of the machine can open, so it serves one
machine. Does not know what is stored, nor which programs there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from cluster.redis.binary import find_server
from core import events
from core.config import BatonConfig
from process.parent_death import hanging

STOP_TIMEOUT_S = 5.0
USER = "baton"
RIGHTS = "~baton:* resetchannels -@all +set +get +hset +hget +xadd +xread +xrange +pexpire"
"""Only what routers and workers do: no scripts, settings, modules or other keys."""
LIMITS = (
    "maxmemory 512mb",
    "maxmemory-policy allkeys-lru",
    "maxclients 256",
    "client-output-buffer-limit normal 1mb 256kb 10",
    "client-query-buffer-limit 8mb",
    "proto-max-bulk-len 8mb",
)
"""Limits of one client, logged in or not: one that never reads could take all memory."""
FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 30.0
STEADY_S = 60.0
"""A server that lived this long restarts with the first pause; otherwise the pause doubles."""
MAX_SOCKET_PATH_BYTES = 100


class RedisServer:
    """One private server; it restarts when it ends, and dies with this process."""

    def __init__(self) -> None:
        """Start it.

        Raises:
            ConfigError: No server program is installed.
        """
        self.binary = find_server()
        self._folder = _private_folder()
        socket = self._folder / "socket"
        password = secrets.token_urlsafe(24)
        self.url = f"unix://{USER}:{password}@{socket}"
        reference = self._folder / "url"
        reference.touch(mode=0o600)  # before the secret is in it
        reference.write_text(self.url)
        self.reference = f"file:{reference}"
        """How to name the address where the password must not appear."""
        # The hash, as Redis' ACL takes it: its settings then hold no password.
        digest = hashlib.sha256(password.encode()).hexdigest()
        settings = [
            # No TCP at all: only this user of this machine reaches a socket file.
            "port 0",
            f"unixsocket {socket}",
            "unixsocketperm 600",
            # Nothing on disk: what is in it lives for seconds, and workers write it anew.
            'save ""',
            "appendonly no",
            f"dir {self._folder}",
            *LIMITS,
            "user default off",
            f"user {USER} on #{digest} {RIGHTS}",
        ]
        self._settings = "".join(line + "\n" for line in settings)
        self.num_restarts = 0
        self._lock = threading.Lock()
        self._is_stopping = threading.Event()
        self._process = self._spawn()
        self._keeper = threading.Thread(target=self._keep, name="redis-keeper", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int:
        """Process id of the server that runs now."""
        return self._process.pid

    def stop(self) -> None:
        """Kill and reap it, and remove its folder, which holds nothing worth keeping."""
        # The lock keeps the keeper from starting a server between these two lines.
        with self._lock:
            self._is_stopping.set()
            self._process.kill()
        self._keeper.join(timeout=STOP_TIMEOUT_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(  # noqa: S603 - a program whose version was checked
            hanging([str(self.binary.path), "-"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for `baton up`, which ends it in order
        )
        if process.stdin is not None:  # not on a command line, which everyone can read
            with contextlib.suppress(BrokenPipeError):  # ended already: the keeper restarts it
                process.stdin.write(self._settings.encode())
                process.stdin.close()
        return process

    def _keep(self) -> None:
        """Restart the server whenever it ends; routers then write their data again."""
        pause_s = FIRST_PAUSE_S
        started_at = time.monotonic()
        reason = f"exit code {self._process.wait()}"
        while not self._is_stopping.is_set():
            lived_s = time.monotonic() - started_at
            pause_s = FIRST_PAUSE_S if lived_s >= STEADY_S else pause_s
            events.STORE_RESTARTED.log(
                reason=reason,
                lived_s=round(lived_s, 1),
                restarts=self.num_restarts + 1,
                retry_in_s=pause_s,
            )
            if self._is_stopping.wait(pause_s):
                return
            pause_s = min(pause_s * 2, MAX_PAUSE_S)
            started_at = time.monotonic()
            reason = self._run_again()

    def _run_again(self) -> str:
        """Start the server and wait; return how it ended, or why it did not start."""
        with self._lock:
            if self._is_stopping.is_set():
                return "stopped"
            self.num_restarts += 1
            try:
                self._process = self._spawn()
            except OSError as error:  # no process available: the next round tries again
                return str(error)
        return f"exit code {self._process.wait()}"


def with_redis(config: BatonConfig, url: str) -> BatonConfig:
    """Return the config with the address of the started server."""
    return config.model_copy(update={"redis": config.redis.model_copy(update={"url": url})})


def _private_folder() -> Path:
    """Make a folder for this user alone; a socket's path must be short, whatever TMPDIR says."""
    folder = Path(tempfile.mkdtemp(prefix="baton-redis-"))
    # The kernel's limit on a socket's path; TMPDIR on shared machines is often longer.
    if len(bytes(folder)) > MAX_SOCKET_PATH_BYTES - len("/socket"):
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="baton-redis-", dir="/tmp"))
    return folder
