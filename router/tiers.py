"""Which tier a request gets: its key's, or the one that it asks for and may have.

Owns the names by which clients ask, and who may ask for what. Does not know what a tier means for
a queue or a worker.

    the key's tier      auto, default, scale, or nothing said
    batch               flex
    interactive         priority
    any tier            its own name

A key may ask for a tier that goes after its own or stands level with it: it can give way, and never
take another's place. Who may operate the cluster may ask for any, and so may everybody where no
keys are configured.
"""

from __future__ import annotations

from collections.abc import Mapping

from core.config import TierConfig, default_tiers
from core.errors import InvalidRequest, PermissionDenied
from router.access.identities import Identity, Right

FIELD = "service_tier"
"""In a body or a message."""
HEADER = "x-baton-tier"
"""Asks like the field, and tells in a reply which tier served."""
KEYS_OWN = ("", "auto", "default", "scale")
OPENAI_NAMES = {"flex": "batch", "priority": "interactive"}


class Tiers:
    """The tiers of a config, and the choice among them."""

    def __init__(
        self, tiers: Mapping[str, TierConfig] | None = None, default: str = "standard"
    ) -> None:
        """Offer these, or those that every cluster has; `default` is for keys without one."""
        self.by_name = default_tiers() if tiers is None else tiers
        self.default = default

    def of_key(self, tier: str) -> str:
        """Return the tier of a key: its own, or the default one if the config has none such."""
        return tier if tier in self.by_name else self.default

    def choose(self, identity: Identity, field: str, header: str) -> str:
        """Return the tier of a request.

        Args:
            identity: Whose it is.
            field: What its body asks for; empty: nothing.
            header: What its header asks for; empty: nothing.

        Raises:
            InvalidRequest: A tier is unknown, or field and header name different ones.
            PermissionDenied: The key's own tier goes after it.
        """
        asked = self._named(FIELD, field)
        in_header = self._named(HEADER, header)
        if asked and in_header and asked != in_header:
            raise InvalidRequest(
                FIELD, f"asks for tier {asked} and header {HEADER} for {in_header}; send one"
            )
        own = self.of_key(identity.tier)
        tier = asked or in_header or own
        able = self.open_to(identity)
        if tier not in able:
            raise PermissionDenied(
                f"tier {tier} goes before {own}, which is this key's; ask for one of "
                f"{', '.join(able)}, or use a key of that tier (`baton keys add --tier {tier}`)"
            )
        return tier

    def open_to(self, identity: Identity) -> list[str]:
        """List the tiers that a caller may ask for."""
        if identity.has(Right.OPERATE):
            return list(self.by_name)
        own_s = self._delay_s(self.of_key(identity.tier))
        return [name for name in self.by_name if self._delay_s(name) >= own_s]

    def overflow_of(self, tier: str) -> list[str]:
        """List the tiers that serve what finds no room in a tier, in order."""
        names: list[str] = []
        while tier := self.by_name[tier].overflow_to:
            names.append(tier)
        return names

    def _named(self, source: str, name: str) -> str:
        """Read what a client wrote; empty: the key's own tier will do."""
        if name in self.by_name:
            return name
        if name in KEYS_OWN:
            return ""
        tier = OPENAI_NAMES.get(name)
        if tier is None:
            raise InvalidRequest(
                source, f"is {name[:40]!r}, must be one of {', '.join(self.names())}"
            )
        return tier

    def names(self) -> list[str]:
        """List every name by which a request may ask."""
        return [*self.by_name, *filter(None, KEYS_OWN), *OPENAI_NAMES]

    def _delay_s(self, tier: str) -> float:
        return self.by_name[tier].delay_s
