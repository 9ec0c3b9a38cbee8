"""Tenant classes: by what operators sum tenants up in metrics and traces.

Owns their names and how many there may be. Does not know which tenant is in which.

A tenant's name is no label of a metric: there may be as many tenants as keys. A class is one of a
few that the config lists, so nobody who writes a key file can add a series.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

DEFAULT_CLASS = "default"
"""Of a key that names none, or none that the config lists."""
NO_CLASS = "none"
"""Of whoever shows no valid key."""
MAX_CLASSES = 16
"""The default one among them; each is a label of several metrics."""
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


class TenantClasses:
    """The classes of a cluster."""

    def __init__(self, listed: Sequence[str] = ()) -> None:
        """Offer those that the config lists, and the default one."""
        self.names = (DEFAULT_CLASS, *listed)

    def of_key(self, name: str) -> str:
        """Return the class of a key: its own, or the default one if the config lists none such."""
        return name if name in self.names else DEFAULT_CLASS


def is_class_name(text: str) -> bool:
    """Can a class have this name?"""
    return bool(_NAME.fullmatch(text))


def check_tenant_classes(listed: Sequence[str]) -> None:
    """Refuse classes that cannot be meant.

    Raises:
        ValueError: Names what is wrong and what would fit.
    """
    if len(listed) >= MAX_CLASSES:
        raise ValueError(
            f"tenant_classes has {len(listed)} names, the limit is {MAX_CLASSES - 1}: each is a "
            "label of metrics"
        )
    for name in listed:
        if not is_class_name(name) or name in (DEFAULT_CLASS, NO_CLASS):
            raise ValueError(
                f"tenant_classes has the name {name[:40]!r}; use 1 to 32 lower-case letters, "
                "digits, dashes or underscores, a letter first, and neither "
                f"{DEFAULT_CLASS} nor {NO_CLASS}"
            )
    if len(set(listed)) < len(listed):
        raise ValueError("tenant_classes has a name twice; list each once")
