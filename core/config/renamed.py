"""Settings that had another name in the last release, and are still read by it.

Owns the table of old and new names. Does not know values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core import events
from core.errors import ConfigError

RENAMED = {
    "pools.prefill.engine.is_prefix_cache_on": "cache_prefixes",
    "pools.decode.engine.is_prefix_cache_on": "cache_prefixes",
    "redis.is_on": "enabled",
    "router.has_request_log": "log_requests",
    "router.is_strict": "strict",
    "security.trusts_network": "trust_network",
}
"""From 0.2.0 on; each goes with the release after the one that renamed it."""

OnRenamed = Callable[[str, str], None]


def log_renamed(old: str, new: str) -> None:
    """Log that a setting was given by its old name."""
    events.CONFIG_KEY_RENAMED.log(old=old, new=new)


def with_new_names(tree: dict[str, Any], source: str, on_renamed: OnRenamed) -> dict[str, Any]:
    """Return one source's tree with today's names, and call `on_renamed` for each old one.

    Raises:
        ConfigError: The source gives a setting by both its names.
    """
    tree = _copy(tree)
    for old, name in RENAMED.items():
        *groups, leaf = old.split(".")
        group: Any = tree
        for part in groups:
            group = group.get(part) if isinstance(group, dict) else None
        # A group that is no mapping is refused later, in the words for that.
        if not isinstance(group, dict) or leaf not in group:
            continue
        new = ".".join((*groups, name))
        if name in group:
            raise ConfigError(
                f"{source} has both {new} and {old}, which is its old name; keep {new} alone"
            )
        group[name] = group.pop(leaf)
        on_renamed(old, new)
    return tree


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    """Copy the groups; a YAML alias would else be one group in two places."""
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in tree.items()}
