"""`baton keys`: add, list, rotate and revoke API keys.

Owns arguments and messages. Does not know the file's format, nor how keys are checked. Running
routers apply every change within a second.
"""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, Output
from core.errors import ConfigError
from core.tenant_classes import DEFAULT_CLASS
from core.types import DEFAULT_TIER

if TYPE_CHECKING:
    from router.access.identities import Identity
    from router.tiers import Tiers

keys = typer.Typer(help="API keys.", no_args_is_help=True)
KeyFile = Annotated[Path, typer.Option(help="key file, as in security.api_keys")]
Expires = Annotated[
    str, typer.Option(help="end of the key: 90d, 12h, 30m, 20s, or a date like 2027-01-31 (UTC)")
]
Name = Annotated[str, typer.Argument(help="name of a key as in `baton keys list`, or the key")]
_AGE = re.compile(r"(\d{1,6})([dhms])")
LIMITS = ("requests_per_minute", "tokens_per_minute")
"""Of the tier of a key."""
_UNIT_S = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_KEY = re.compile(r"(?:bt-)?([0-9a-f]{8})(?:-[0-9a-f]{32})?")


@keys.command("add")
def add(
    file: KeyFile,
    tenant: Annotated[str, typer.Option(help="whose key it is; tenants share no cache")],
    tier: Annotated[
        str, typer.Option(help="tier of its requests; default: the config's default_tier")
    ] = DEFAULT_TIER,
    role: Annotated[
        str,
        typer.Option(
            help="tenant: requests; metrics: only /metrics, /load, /replicas and /links, to be "
            "read; admin: everything"
        ),
    ] = "tenant",
    expires: Expires = "",
    tenant_class: Annotated[
        str,
        typer.Option("--class", help="as what it counts in metrics, one of the tenant_classes"),
    ] = DEFAULT_CLASS,
) -> None:
    """Make a key: shown once, its hash goes to the file."""
    from router.access.identities import Identity, KeyRole  # noqa: PLC0415
    from router.access.key_file import change_keys, check_names, checked_class  # noqa: PLC0415

    roles = [r.value for r in KeyRole]
    if role not in roles:
        raise typer.BadParameter(f"{role} is none of {', '.join(roles)}", param_hint="--role")
    check_names(tenant, tier)
    who = Identity(tenant, tier, KeyRole(role), tenant_class=checked_class(tenant_class))
    ends_at = _end_of(expires)
    made: list[str] = []

    def edit(lines: list[str]) -> list[str]:
        key, line = _new_key(lines, who, ends_at)
        made[:] = [key]
        return [*lines, line]

    change_keys(file.expanduser(), edit, is_made=True)
    typer.echo(made[0])


@keys.command("list")
def list_keys(
    file: KeyFile,
    config: Config = None,
    output: Output = "table",
) -> None:
    """Show every key's name, tenant, tier, class, role and end; exit 1 if a line opens nothing.

    With the config, which has the tiers, it shows the limits of each key, too.
    """
    from router.access.key_file import read_keys, utc_text  # noqa: PLC0415

    found, faults = read_keys(file.expanduser())
    tiers = None if config is None else _tiers_of(config)
    now_s = _now_s()
    rows = [
        {
            "name": key.name,
            "tenant": key.identity.tenant,
            "tier": key.identity.tier,
            "class": key.identity.tenant_class,
            "role": key.identity.role.value,
            "expires": utc_text(key.expires_at) if key.expires_at < math.inf else "",
            "state": "valid" if key.expires_at > now_s else "expired",
            **_limits(key.identity.tier, tiers),
        }
        for key in found.values()
    ]
    if output == "json":
        typer.echo(json.dumps({"keys": rows, "refused": faults}, indent=2))
    else:
        _show(rows)
        for fault in faults:
            typer.echo(f"baton: {fault}", err=True)
    raise typer.Exit(1 if faults else 0)


@keys.command("revoke")
def revoke(
    file: KeyFile,
    names: Annotated[list[str], typer.Argument(help="names as in `baton keys list`, or keys")],
) -> None:
    """Take keys back: their lines go, whatever the other lines are like."""
    from router.access.key_file import change_keys  # noqa: PLC0415

    wanted = [_name_of(name) for name in names]

    def edit(lines: list[str]) -> list[str]:
        held = {_first(line) for line in lines}
        missing = [name for name in wanted if name not in held]
        if missing:
            raise ConfigError(f"no key is named {missing[0]}; nothing was changed")
        return [line for line in lines if _first(line) not in wanted]

    change_keys(file.expanduser(), edit)


@keys.command("rotate")
def rotate(
    file: KeyFile,
    name: Name,
    overlap: Annotated[str, typer.Option(help="how long the old key still opens")] = "24h",
    expires: Expires = "",
) -> None:
    """Make a key with another's tenant, tier and role, which replaces it; the old one expires."""
    from router.access.key_file import change_keys, parse_line, with_expiry  # noqa: PLC0415

    wanted = _name_of(name)
    ends_at = _end_of(overlap)
    made: list[str] = []

    def edit(lines: list[str]) -> list[str]:
        places = [i for i, line in enumerate(lines) if _first(line) == wanted]
        if len(places) != 1:
            raise ConfigError(f"{len(places)} keys are named {wanted}; nothing was changed")
        old = parse_line(lines[places[0]])
        key, line = _new_key(lines, old.identity, _end_of(expires))
        made[:] = [key]
        lines[places[0]] = with_expiry(old, ends_at).text()
        return [*lines, line]

    change_keys(file.expanduser(), edit)
    typer.echo(made[0])


def _tiers_of(path: Path) -> Tiers:
    from core.config import load_config  # noqa: PLC0415
    from router.tiers import Tiers  # noqa: PLC0415

    config = load_config(path)
    return Tiers(config.tiers, config.default_tier)


def _limits(tier: str, tiers: Tiers | None) -> dict[str, int | None]:
    """Return the limits of a key of this tier: 0 is none, and nothing is not known."""
    if tiers is None:
        return dict.fromkeys(LIMITS)
    own = tiers.by_name[tiers.of_key(tier)]
    return {name: getattr(own, name) for name in LIMITS}


def _show(rows: list[dict[str, Any]]) -> None:
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    columns = ["name", "tenant", "tier", "class", "role", "expires", "state"]
    if any(row[name] is not None for row in rows for name in LIMITS):
        columns += LIMITS
    table = Table(*(column.replace("_per_minute", "/min") for column in columns), box=box.SIMPLE)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


def _new_key(lines: list[str], who: Identity, expires_at: float) -> tuple[str, str]:
    """Make a key and its line, with a unique name: of two with one name neither is valid."""
    from router.access.credentials import new_key  # noqa: PLC0415

    held = {_first(line) for line in lines}
    while True:
        key, line = new_key(who.tenant, who.tier, who.role, expires_at, who.tenant_class)
        if _first(line) not in held:
            return key, line


def _first(line: str) -> str:
    return line.split(maxsplit=1)[0] if line.strip() else ""


def _name_of(text: str) -> str:
    found = _KEY.fullmatch(text)
    if found is None:
        raise typer.BadParameter("a key's name has 8 digits or letters from a to f")
    return found[1]


def _end_of(text: str) -> float:
    """Return Unix seconds; infinity for an empty text."""
    from router.access.key_file import read_time  # noqa: PLC0415

    if not text:
        return math.inf
    if age := _AGE.fullmatch(text):
        return _now_s() + int(age[1]) * _UNIT_S[age[2]]
    try:
        return read_time(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text} is neither an age like 90d nor a date from year 1 to 9999 (UTC)"
        ) from error


def _now_s() -> float:
    return time.time()  # noqa: TID251 - keys expire on a date
