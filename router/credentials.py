"""API keys: who may come in, and as whom.

Owns the key file and its format, the comparison in constant time, and what a credential is bound to.
Does not know HTTP or gRPC. Called by both doors for every request but liveness, and by `baton keys`.

A key looks like `bt-<8 hex>-<32 hex>`: a name in the clear, to find its line, and a secret. A line of
the file is `name salt hash tenant tier`; the hash is SHA-256 over salt and secret, which is enough for
128 random bits. Without a file everybody is nobody in particular, and the doors stay on loopback.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError, Unauthenticated
from router.admission import CANARY_TIER

_KEY = re.compile(r"bt-([0-9a-f]{8})-([0-9a-f]{32})")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
RELOAD_S = 1.0
MAX_KEYS = 100_000


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a credential stands for. The tenant scopes the prefix cache, request ids and aborts."""

    tenant: str = ""
    tier: str = "standard"


@dataclass(frozen=True, slots=True)
class _Entry:
    salt: bytes
    digest: bytes
    identity: Identity


ANYBODY = Identity()
_DUMMY = _Entry(b"\0" * 16, b"\0" * 32, ANYBODY)


class Keyring:
    """The keys of a file, read again when it changes: keys come and go without a restart."""

    def __init__(self, path: str, now_s: Callable[[], float]) -> None:
        """Read the file, if there is one.

        Raises:
            ConfigError: It cannot be read, or a line is wrong.
        """
        self._path, self._now_s = Path(path).expanduser() if path else None, now_s
        self._looked_at, self._stamp = now_s(), self._stat()
        self._entries = self._read()

    @property
    def is_open(self) -> bool:
        """True if no keys are configured."""
        return self._path is None

    def identify(self, authorization: str) -> Identity:
        """Find out whose credential a header carries.

        Raises:
            Unauthenticated: None, or not one of ours; which, is not said.
        """
        if self.is_open:
            return ANYBODY
        self._reload()
        scheme, _, token = authorization.partition(" ")
        match = _KEY.fullmatch(token.strip()) if scheme.lower() == "bearer" else None
        name, secret = match.groups() if match else ("", "")
        entry = self._entries.get(name, _DUMMY)
        # The same work for every wrong key: an unknown name is compared with a hash that nothing has.
        is_right = hmac.compare_digest(_digest(entry.salt, secret), entry.digest)
        if not is_right or entry is _DUMMY:
            raise Unauthenticated("no valid API key; send `Authorization: Bearer <key>`")
        return entry.identity

    def _stat(self) -> tuple[int, int]:
        if self._path is None:
            return (0, 0)
        try:
            facts = self._path.stat()
        except OSError as error:
            raise ConfigError(f"security.api_keys cannot be read: {error.strerror}") from error
        return facts.st_mtime_ns, facts.st_size

    def _reload(self) -> None:
        if self._now_s() - self._looked_at < RELOAD_S:
            return
        self._looked_at = self._now_s()
        try:
            stamp = self._stat()
            if stamp != self._stamp:
                self._entries, self._stamp = self._read(), stamp
        except ConfigError:
            return  # a file that is being replaced, or broken: the keys that were good stay good

    def _read(self) -> dict[str, _Entry]:
        if self._path is None:
            return {}
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "security.api_keys cannot be read; make one with `baton keys add`"
            ) from error
        entries: dict[str, _Entry] = {}
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                name, entry = _parse(line, number)
                entries[name] = entry
        if len(entries) > MAX_KEYS:
            raise ConfigError(f"security.api_keys has {len(entries)} keys, the limit is {MAX_KEYS}")
        return entries


def _digest(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode()).digest()


def _parse(line: str, number: int) -> tuple[str, _Entry]:
    try:
        name, salt, digest, tenant, tier = line.split()
        entry = _Entry(bytes.fromhex(salt), bytes.fromhex(digest), Identity(tenant, tier))
    except ValueError as error:
        raise ConfigError(
            f"security.api_keys, line {number}: expected `name salt hash tenant tier`"
        ) from error
    if tier == CANARY_TIER:
        raise ConfigError(
            f"security.api_keys, line {number}: tier {tier} is the router's own; choose another"
        )
    return name, entry


def new_key(tenant: str, tier: str) -> tuple[str, str]:
    """Make a key.

    Returns:
        The key, to be shown once, and its line for the file.

    Raises:
        ConfigError: A name that is not one.
    """
    for what, value in (("tenant", tenant), ("tier", tier)):
        if not _NAME.fullmatch(value):
            raise ConfigError(
                f"{what} is {value[:64]!r}; use 1 to 64 letters, digits, dots, dashes or underscores"
            )
    if tier == CANARY_TIER:
        raise ConfigError(f"tier {tier} is the router's own, it passes the queue; choose another")
    name, secret, salt = secrets.token_hex(4), secrets.token_hex(16), secrets.token_bytes(16)
    line = f"{name} {salt.hex()} {_digest(salt, secret).hex()} {tenant} {tier}"
    return f"bt-{name}-{secret}", line
