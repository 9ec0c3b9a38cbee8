"""When each certificate expires: a metric of the routers, and an early warning.

Owns reading the dates and how early to warn. Does not know who uses certificates.

A router reads its own certificates as they are in use, and those of other roles in its
`security.tls_dir`; a worker on another machine warns for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from core import events
from core.config import SecurityConfig
from transport.grpc_credentials import Tls
from transport.tls import ROLES

WARN_DAYS = 30
DAY_S = 86400.0


def earliest_end(pem: bytes) -> int:
    """Return when a chain expires (Unix seconds): the earliest end of its certificates.

    Raises:
        ValueError: It has none.
    """
    from cryptography import x509  # noqa: PLC0415 - most clusters have no certificates

    chain = x509.load_pem_x509_certificates(pem)
    return min(int(one.not_valid_after_utc.timestamp()) for one in chain)


class CertificateEnds:
    """The dates of all certificates that a process knows."""

    def __init__(
        self,
        security: SecurityConfig,
        role: str,
        tls: Tls | None,
        server_chain: Callable[[], bytes] | None = None,
        wall_s: Callable[[], float] = time.time,  # noqa: TID251 - certificates end on a date
    ) -> None:
        """Prepare; `watch` starts the warnings.

        Args:
            security: That part of the config.
            role: Of this process: router, prefill or decode.
            tls: Its own certificates for internal streams, if it has any.
            server_chain: The public servers' chain (PEM) in use, if they have one.
            wall_s: Unix seconds.
        """
        self._folder = Path(security.tls_dir).expanduser() if security.tls_dir else None
        self._role = role
        self._tls = tls
        self._server_chain = server_chain
        self._wall_s = wall_s
        self._timer: asyncio.TimerHandle | None = None

    def read(self) -> dict[str, int]:
        """Return expiry dates (Unix seconds) by name: door, authority, each role with a file."""
        ends = {}
        for name, pem in self._chains().items():
            with contextlib.suppress(ValueError):  # no certificate: its user reports that
                ends[name] = earliest_end(pem)
        return ends

    def _chains(self) -> dict[str, bytes]:
        chains = {}
        if self._server_chain is not None:
            chains["door"] = self._server_chain()
        if self._tls is None or self._folder is None:
            return chains
        if self._role == "router":
            for role in ROLES:
                with contextlib.suppress(OSError):  # other machines need not have it
                    chains[role] = (self._folder / f"{role}.pem").read_bytes()
        self._tls.files.refresh()
        files = self._tls.files.content
        return {**chains, self._role: files.certificate, "authority": files.authority}

    def watch(self) -> None:
        """Warn of certificates that expire soon, now and every day, until `close`."""
        for name, ends_at in self.read().items():
            days_left = (ends_at - self._wall_s()) / DAY_S
            if days_left < WARN_DAYS:
                events.CERTIFICATE_ENDS_SOON.log(what=name, days_left=round(days_left, 1))
        # A timer, not a task: there is nothing to await, and `close` has no task to join.
        self._timer = asyncio.get_running_loop().call_later(DAY_S, self.watch)

    def close(self) -> None:
        """Stop warning."""
        if self._timer is not None:
            self._timer.cancel()
