"""The file of API keys: its lines, how it is read, and how it is changed.

Owns the format, the checks of the file itself and its replacement as a whole. Does not know secrets
or requests.

A line is `name salt hash tenant tier`, then `role=metrics` or `role=admin` if the key is no
tenant's, `class=gold` if its tenant counts as one of `tenant_classes`, and
`expires=2027-01-31T00:00:00Z` if it expires. `#` begins a comment. A line that cannot
be parsed opens nothing and affects no other line. The same goes for a last line without a newline:
it may be cut off, and have lost its role or expiry.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.tenant_classes import DEFAULT_CLASS, TenantClasses, is_class_name
from core.types import CANARY_TIER, DEFAULT_TIER
from router.access.identities import Identity, KeyRole

MAX_KEYS = 100_000
MAX_FILE_BYTES = 32 << 20
DIGEST_BYTES = 32
_KEY_NAME = re.compile(r"[0-9a-f]{8}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FORMAT = "`name salt hash tenant tier [role=...] [class=...] [expires=...]`"
_CUT_OFF = " [cut off]"
_ANY_BYTES: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
Stamp = tuple[int, ...]
SIZE = 1
"""Index of the file's size (bytes) in a stamp."""


@dataclass(frozen=True, slots=True)
class KeyLine:
    """One key in the file."""

    name: str
    salt: bytes
    digest: bytes
    identity: Identity
    expires_at: float = math.inf
    """Unix seconds; from then on it is not valid."""

    def text(self) -> str:
        """Return the line."""
        who = self.identity
        parts = [self.name, self.salt.hex(), self.digest.hex(), who.tenant, who.tier]
        if who.role is not KeyRole.TENANT:
            parts.append(f"role={who.role.value}")
        if who.tenant_class != DEFAULT_CLASS:
            parts.append(f"class={who.tenant_class}")
        if self.expires_at < math.inf:
            parts.append(f"expires={utc_text(self.expires_at)}")
        return " ".join(parts)


def utc_text(unix_s: float) -> str:
    """Format a time as the file and the commands write it."""
    moment = datetime.fromtimestamp(unix_s, UTC).replace(tzinfo=None)
    return f"{moment.isoformat(timespec='seconds')}Z"


def check_names(tenant: str, tier: str) -> None:
    """Refuse an invalid name of a tenant or tier.

    Raises:
        ConfigError: Names it.
    """
    for what, value in (("tenant", tenant), ("tier", tier)):
        if not _NAME.fullmatch(value):
            raise ConfigError(
                f"{what} is {value[:64]!r}; use 1 to 64 letters, digits, dots, dashes or "
                "underscores"
            )
    if tier == CANARY_TIER:
        raise ConfigError(f"tier {tier} is the router's own; choose another")


def checked_class(name: str) -> str:
    """Return the name of a tenant class.

    Raises:
        ConfigError: No class can be called this.
    """
    if not is_class_name(name):
        raise ConfigError(
            f"class is {name[:64]!r}; use 1 to 32 lower-case letters, digits, dashes or "
            "underscores, a letter first"
        )
    return name


def _lines_of(text: str) -> list[str]:
    """Split into lines; mark a last one without a newline, so that adding one does not admit it."""
    *lines, rest = text.split("\n")
    if rest:
        # A writer that died, or a full disk, leaves half a line: without its role or expiry a key
        # would open more.
        lines.append(rest if rest.startswith("#") else rest + _CUT_OFF)
    return lines


def parse_line(line: str) -> KeyLine:
    """Read one line.

    Raises:
        ConfigError: Names what is wrong with it.
    """
    if line.endswith(_CUT_OFF):
        raise ConfigError(
            "has no newline at its end, so its role or expiry may be cut off; complete the line, "
            "or remove it and make a new key"
        )
    fields = line.split()
    if len(fields) < 5 or not _KEY_NAME.fullmatch(fields[0]):
        raise ConfigError(f"expected {_FORMAT}")
    name, salt, digest, tenant, tier = fields[:5]
    check_names(tenant, tier)
    role = KeyRole.TENANT
    tenant_class = DEFAULT_CLASS
    expires_at = math.inf
    try:
        for field in fields[5:]:
            what, _, value = field.partition("=")
            if what == "role":
                role = KeyRole(value)
            elif what == "class":
                tenant_class = checked_class(value)
            elif what == "expires":
                expires_at = read_time(value)
            else:
                raise ConfigError(f"{field[:40]!r} is unknown; expected {_FORMAT}")
        made = KeyLine(
            name,
            bytes.fromhex(salt),
            bytes.fromhex(digest),
            Identity(tenant, tier, role, name, tenant_class),
            expires_at,
        )
    except ValueError as error:
        raise ConfigError(f"{error}; expected {_FORMAT}") from error
    if len(made.digest) != DIGEST_BYTES:
        raise ConfigError(f"the hash has {len(made.digest)} bytes, must have {DIGEST_BYTES}")
    return made


def read_time(text: str) -> float:
    """Return whole Unix seconds of an ISO date or time, which is UTC unless it has a zone.

    Raises:
        ValueError: It is neither, or its year in UTC is not from 1 to 9999.
    """
    moment = datetime.fromisoformat(text)
    try:
        in_utc = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError as error:
        raise ValueError(f"{text} is in no year from 1 to 9999 (UTC)") from error
    return in_utc.replace(microsecond=0).timestamp()


def parse_keys(text: str) -> tuple[dict[str, KeyLine], list[str]]:
    """Read every line.

    Returns:
        The keys by name, and what is wrong with the other lines. Of lines with equal names none is
        valid: which one was meant is unknown.
    """
    keys: dict[str, KeyLine] = {}
    first_lines: dict[str, int] = {}
    faults: list[str] = []
    for number, line in enumerate(_lines_of(text), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            key = parse_line(line)
        except ConfigError as error:
            faults.append(f"security.api_keys, line {number}: {error.message}")
            continue
        if key.name in first_lines:
            # Valid lines of one name would let the order in the file decide who calls.
            keys.pop(key.name, None)
            faults.append(
                f"security.api_keys, line {number}: has the name {key.name} of line "
                f"{first_lines[key.name]}, so neither is valid; remove one"
            )
            continue
        first_lines[key.name] = number
        keys[key.name] = key
    return keys, faults


def stamp_of(path: Path) -> Stamp:
    """Return a value that changes whenever the file or its permissions do.

    Raises:
        ConfigError: There is no such file, or it may not be read.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise _unreadable(error) from error
    # Not the time alone: a file replaced within one tick of the clock has another inode.
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def read_keys(path: Path) -> tuple[dict[str, KeyLine], list[str]]:
    """Read and parse the file, as `parse_keys` does.

    Raises:
        ConfigError: It cannot be read, or every user of this machine may write to it.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            facts = os.fstat(file.fileno())
            _check_facts(facts)
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _unreadable(error) from error
    keys, faults = parse_keys(content.decode("utf-8", "replace"))
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"security.api_keys has {len(keys)} keys, the limit is {MAX_KEYS}")
    return keys, faults


def unknown_tiers(keys: Collection[KeyLine], tiers: Collection[str]) -> dict[str, int]:
    """Count the keys of each tier that the config has not."""
    named = Counter(key.identity.tier for key in keys)
    return {tier: n for tier, n in named.items() if tier not in tiers and tier != DEFAULT_TIER}


def unknown_classes(keys: Collection[KeyLine], classes: TenantClasses) -> dict[str, int]:
    """Count the keys of each class that the config does not list."""
    named = Counter(key.identity.tenant_class for key in keys)
    return {name: num for name, num in named.items() if name not in classes.names}


def check_keys(path: str, tiers: Collection[str], classes: TenantClasses) -> None:
    """Refuse a file with any fault, before anything is started.

    Raises:
        ConfigError: The first fault.
    """
    if path:
        keys, faults = read_keys(Path(path).expanduser())
        faults += [
            f"security.api_keys: {num_keys} keys are of tier {tier}, and tiers has "
            f"{', '.join(tiers)}; add it there, or make them anew with `baton keys add --tier`"
            for tier, num_keys in unknown_tiers(keys.values(), tiers).items()
        ]
        faults += [
            f"security.api_keys: {num_keys} keys are of class {name}, and tenant_classes has "
            f"{', '.join(classes.names[1:]) or 'none'}; list it there, or make them anew with "
            "`baton keys add --class`"
            for name, num_keys in unknown_classes(keys.values(), classes).items()
        ]
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise ConfigError(faults[0] + more)


def change_keys(
    path: Path, edit: Callable[[list[str]], list[str]], *, is_made: bool = False
) -> None:
    """Replace all lines of the file at once, even if some of them are invalid.

    Writers take turns, and a reader sees either the old lines or the new ones. A symbolic link is
    followed: others may read the file by its other name.

    Args:
        path: The file.
        edit: Turns the lines into the new ones.
        is_made: Create the file if there is none, readable by its owner alone.

    Raises:
        ConfigError: It cannot be read or written, or every user may write to it; it is unchanged.
    """
    path = path.resolve()
    try:
        with _locked(path, os.O_CREAT if is_made else 0) as descriptor:
            facts = os.fstat(descriptor)
            _check_facts(facts)
            with open(descriptor, **_ANY_BYTES, closefd=False) as file:
                lines = _lines_of(file.read())
            _replace(path, "".join(line + "\n" for line in edit(lines)), facts)
    except OSError as error:
        raise ConfigError(f"the key file cannot be changed: {error}") from error


def _replace(path: Path, text: str, facts: os.stat_result) -> None:
    """Replace the file by a new one with its owner and permissions."""
    # Beside it, so that the replacement is one rename on one file system.
    made, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(made, "w", **_ANY_BYTES) as out:
            os.fchmod(made, stat.S_IMODE(facts.st_mode))
            # Only root may give a file away; for others it is theirs already.
            if os.geteuid() == 0:
                os.fchown(made, facts.st_uid, facts.st_gid)
            out.write(text)
            out.flush()
            # On disk before it has the name: a crash must not leave an empty key file.
            os.fsync(made)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def with_expiry(line: KeyLine, expires_at: float) -> KeyLine:
    """Return the same key, expiring at `expires_at` unless it expires before."""
    return replace(line, expires_at=min(line.expires_at, expires_at))


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    """Lock the file that has this name now: another writer may replace it while we wait."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                # Another writer may have replaced the file while this one waited for the lock on
                # the old one.
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    yield descriptor
                    return
        finally:
            os.close(descriptor)


def _open_without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)  # opening a pipe would wait for a writer


def _check_facts(facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise ConfigError("security.api_keys is no regular file; make one with `baton keys add`")
    # Whoever can write to it can give himself a key; who may read it is the operator's affair.
    if facts.st_mode & stat.S_IWOTH:
        raise ConfigError(
            "security.api_keys may be written by every user of this machine; chmod o-w it, and "
            "look whether its keys are yours (`baton keys list`)"
        )
    if facts.st_size > MAX_FILE_BYTES:
        raise ConfigError(
            f"security.api_keys has {facts.st_size} bytes, the limit is {MAX_FILE_BYTES}"
        )


def _unreadable(error: OSError) -> ConfigError:
    return ConfigError(
        f"security.api_keys cannot be read ({error.strerror}); make one with `baton keys add`"
    )
