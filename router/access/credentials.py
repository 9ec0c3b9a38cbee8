"""API keys: who may call, and as whom.

Owns the comparison in constant time, the identity of a key, and which keys are valid while the file
changes under a running router. Does not know HTTP or gRPC, nor the file's format.

A key looks like `bt-<8 hex>-<32 hex>`: a name in the clear, to find its line, and a secret. The
hash in the file is SHA-256 over salt and secret, which is enough for 128 random bits. Without a
file no caller needs a key, and the servers stay on loopback.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from core import events
from core.errors import ConfigError, Unauthenticated
from core.tenant_classes import DEFAULT_CLASS, TenantClasses
from router.access.identities import ANYBODY, Identity, KeyRole
from router.access.key_file import (
    SIZE,
    KeyLine,
    Stamp,
    check_names,
    checked_class,
    read_keys,
    stamp_of,
    unknown_classes,
    unknown_tiers,
)
from router.tiers import Tiers

_KEY = re.compile(r"bt-([0-9a-f]{8})-([0-9a-f]{32})")
RELOAD_S = 1.0
LOST_FILE_GRACE_S = 5.0
"""How long keys stay valid when their file is gone or unreadable: long enough to replace it, and no
longer, since no key can be revoked meanwhile."""
INLINE_BYTES = 64 << 10
"""A longer file is read in a thread, off the event loop."""
MAX_LOGGED_FAULTS = 10
_DUMMY = KeyLine("", b"\0" * 16, b"\0" * 32, ANYBODY)


class Keyring:
    """The keys of a file, reloaded when it changes: keys come and go without a restart."""

    def __init__(
        self,
        path: str,
        now_s: Callable[[], float],
        wall_s: Callable[[], float] = time.time,  # noqa: TID251 - keys expire on a date
        tiers: Tiers | None = None,
        classes: TenantClasses | None = None,
    ) -> None:
        """Read the file, if there is one; `tiers` and `classes` are those of the config.

        Raises:
            ConfigError: It cannot be read, or every user may write to it.
        """
        self._path = Path(path).expanduser() if path else None
        self._now_s = now_s
        self._wall_s = wall_s
        self._tiers = tiers or Tiers()
        self._classes = classes or TenantClasses()
        self._keys: dict[str, KeyLine] = {}
        self._num_faults = 0
        self._stamp: Stamp = ()
        self._looked_at = now_s()
        self._seen_at = self._looked_at
        self._is_lost = False
        self._timer: asyncio.TimerHandle | None = None
        self._reader = ThreadPoolExecutor(1, "key-file")
        self._reading: Future[tuple[Stamp, dict[str, KeyLine], list[str]]] | None = None
        if self._path is not None:
            self._hold(*_read(self._path))

    @property
    def is_open(self) -> bool:
        """True if no keys are configured."""
        return self._path is None

    def identify(self, authorization: str) -> Identity:
        """Return the identity of the key in a header.

        Raises:
            Unauthenticated: There is no key, or no valid one; the message does not say which.
        """
        if self.is_open:
            return replace(ANYBODY, tier=self._tiers.default)
        self.refresh()
        # A scheme may be written in any case (RFC 9110).
        scheme, _, token = authorization.partition(" ")
        match = _KEY.fullmatch(token.strip()) if scheme.lower() == "bearer" else None
        name, secret = match.groups() if match else ("", "")
        entry = self._keys.get(name, _DUMMY)
        # The same work for every wrong key: an unknown name is compared with a dummy's hash.
        is_right = hmac.compare_digest(_digest(entry.salt, secret), entry.digest)
        is_right = is_right and entry.expires_at > self._wall_s()
        if not is_right or entry is _DUMMY:
            raise Unauthenticated("no valid API key; send `Authorization: Bearer <key>`")
        who = entry.identity
        # A tier says when a request is served, and a class as whose it counts, not whether: a key
        # keeps opening without its own.
        return replace(
            who,
            tier=self._tiers.of_key(who.tier),
            tenant_class=self._classes.of_key(who.tenant_class),
        )

    def watch(self) -> None:
        """Follow the file until `close`, even while nobody calls."""
        if self.is_open:
            return
        # Twice per period: a timer that fires a little early must not skip one.
        self._timer = asyncio.get_running_loop().call_later(RELOAD_S / 2, self.watch)
        self.refresh()

    def close(self) -> None:
        """Stop following the file."""
        if self._timer is not None:
            self._timer.cancel()

    def refresh(self) -> None:
        """Check the file, at most once a second, and read it if it has changed.

        Lines that cannot be parsed are logged and open nothing; the others stay valid. A file that
        is gone or unreadable is logged too, and after a few seconds no key is valid.
        """
        if self._path is None:
            return
        now_s = self._now_s()
        try:
            if not self._look(self._path, now_s):
                return
        except ConfigError as error:
            self._note_lost(error, now_s)
            return
        if self._is_lost:
            events.KEY_FILE_BACK.log()
        self._seen_at = now_s
        self._is_lost = False

    def _look(self, path: Path, now_s: float) -> bool:
        """Return True if the keys are now those of the file."""
        if self._reading is not None:
            if not self._reading.done():
                return False
            reading = self._reading
            self._reading = None  # before the result, which may be an error
            self._reload(*reading.result())
            return True
        if now_s - self._looked_at < RELOAD_S:
            return False
        self._looked_at = now_s
        stamp = stamp_of(path)
        if stamp == self._stamp:
            return True
        if stamp[SIZE] > INLINE_BYTES:
            # A long file takes milliseconds to parse: in a thread, while the old keys serve.
            self._reading = self._reader.submit(_read, path)
            return False
        self._reload(*_read(path))
        return True

    def num_by_state(self) -> dict[str, int]:
        """Count valid and expired keys and refused lines; `lost_file` is 1 while it is lost."""
        self.refresh()
        wall_s = self._wall_s()
        num_valid = sum(1 for key in self._keys.values() if key.expires_at > wall_s)
        return {
            "valid": num_valid,
            "expired": len(self._keys) - num_valid,
            "refused": self._num_faults,
            "lost_file": int(self._is_lost),
        }

    def _reload(self, stamp: Stamp, keys: dict[str, KeyLine], faults: list[str]) -> None:
        self._hold(stamp, keys, faults)
        events.KEYS_RELOADED.log(keys=len(keys), faults=len(faults))

    def _hold(self, stamp: Stamp, keys: dict[str, KeyLine], faults: list[str]) -> None:
        self._stamp = stamp
        self._keys = keys
        self._num_faults = len(faults)
        unknown = unknown_tiers(keys.values(), self._tiers.by_name)
        for tier, num_keys in list(unknown.items())[:MAX_LOGGED_FAULTS]:
            events.KEY_TIER_UNKNOWN.log(tier=tier, keys=num_keys, served_as=self._tiers.default)
        for name, num_keys in list(unknown_classes(keys.values(), self._classes).items())[
            :MAX_LOGGED_FAULTS
        ]:
            events.KEY_CLASS_UNKNOWN.log(tenant_class=name, keys=num_keys)
        for fault in faults[:MAX_LOGGED_FAULTS]:
            events.KEY_LINE_REFUSED.log(reason=fault)
        if len(faults) > MAX_LOGGED_FAULTS:
            events.KEY_LINE_REFUSED.log(
                reason=f"security.api_keys has {len(faults)} such lines in all"
            )

    def _note_lost(self, error: ConfigError, now_s: float) -> None:
        left_s = max(0.0, self._seen_at + LOST_FILE_GRACE_S - now_s)
        if not self._is_lost:
            events.KEY_FILE_LOST.log(reason=error.message, closes_in_s=round(left_s, 1))
        self._is_lost = True
        # Without a stamp a file that comes back is read, even if it is the same.
        if not left_s and self._stamp:
            events.KEYS_CLOSED.log(reason=error.message)
            self._keys = {}
            self._stamp = ()
            self._num_faults = 0


def _read(path: Path) -> tuple[Stamp, dict[str, KeyLine], list[str]]:
    stamp = stamp_of(path)  # before the content: the next check sees a change in between
    return stamp, *read_keys(path)


def _digest(salt: bytes, secret: str) -> bytes:
    # No slow hash: the secret has 128 random bits, which nobody can guess, and every request pays.
    return hashlib.sha256(salt + secret.encode()).digest()


def new_key(
    tenant: str,
    tier: str,
    role: KeyRole = KeyRole.TENANT,
    expires_at: float = math.inf,
    tenant_class: str = DEFAULT_CLASS,
) -> tuple[str, str]:
    """Make a key; `expires_at` is in Unix seconds.

    Returns:
        The key, to be shown once, and its line for the file.

    Raises:
        ConfigError: `tenant`, `tier` or `tenant_class` is no valid name.
    """
    check_names(tenant, tier)
    checked_class(tenant_class)
    name = secrets.token_hex(4)
    secret = secrets.token_hex(16)
    salt = secrets.token_bytes(16)
    identity = Identity(tenant, tier, role, name, tenant_class)
    line = KeyLine(name, salt, _digest(salt, secret), identity, expires_at)
    return f"bt-{name}-{secret}", line.text()
