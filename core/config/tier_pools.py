"""Which pools a config has, and which of them the requests of a tier may use.

Owns this order, the same for the check of a config and for placement, and what in it cannot be
meant. Does not know workers or loads.

    tier's own pools, a shared one where it has none  ->  those of each name in its `spill_to`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.config.pools import SHARED, OwnPoolsConfig, PoolConfig, PoolsConfig
from core.config.tiers import TierConfig
from core.session import PoolId, Role


@dataclass(frozen=True, slots=True)
class PoolPair:
    """The two pools that serve a request together."""

    name: str
    """Whose they are: a tier's name, or `shared`."""
    prefill: PoolId
    decode: PoolId


SHARED_PAIR = PoolPair(SHARED, PoolId(Role.PREFILL), PoolId(Role.DECODE))


def all_pools(
    shared: PoolsConfig, tiers: Mapping[str, TierConfig], *, colocated: bool
) -> dict[PoolId, PoolConfig]:
    """Return the pools of a config, which may have no replicas, the shared ones first."""
    found: dict[PoolId, PoolConfig] = {}
    groups: dict[str, PoolsConfig | OwnPoolsConfig] = {"": shared}
    groups |= {name: tier.pools for name, tier in tiers.items()}
    for tier, pools in groups.items():
        # A colocated cluster's decode workers do both phases.
        if pools.prefill is not None and not colocated:
            found[PoolId(Role.PREFILL, tier)] = pools.prefill
        if pools.decode is not None:
            found[PoolId(Role.DECODE, tier)] = pools.decode
    return found


def own_pair(name: str, tier: TierConfig) -> PoolPair:
    """Return the pools of a tier, which shares what it has not for itself."""
    prefill = PoolId(Role.PREFILL, "" if tier.pools.prefill is None else name)
    decode = PoolId(Role.DECODE, "" if tier.pools.decode is None else name)
    # It has none at all: then they go by the one name that all such tiers have in common.
    return SHARED_PAIR if not prefill.tier and not decode.tier else PoolPair(name, prefill, decode)


def pairs_of(name: str, tiers: Mapping[str, TierConfig]) -> tuple[PoolPair, ...]:
    """Return the pools that the requests of a tier may use, in order and each pair once."""
    spills = (
        SHARED_PAIR if other == SHARED else own_pair(other, tiers[other])
        for other in tiers[name].spill_to
    )
    return tuple(dict.fromkeys((own_pair(name, tiers[name]), *spills)))


def check_pools(
    pools: Mapping[PoolId, PoolConfig],
    tiers: Mapping[str, TierConfig],
    *,
    colocated: bool,
    must_cross: bool,
) -> None:
    """Refuse pools between which KV cannot go, and tiers without any worker.

    Args:
        pools: Of the config (`all_pools`).
        tiers: Of the config.
        colocated: One pool of each pair does both phases.
        must_cross: Path pd is forced.

    Raises:
        ValueError: Names the setting, its value and what would fit.
    """
    for name, tier in tiers.items():
        _check_spills(name, tier, tiers)
        if colocated and tier.pools.prefill is not None:
            raise ValueError(
                f"tiers.{name}.pools.prefill is set but colocated has decode pools only, which do "
                f"both phases; set tiers.{name}.pools.decode instead"
            )
        pairs = pairs_of(name, tiers)
        if not any(_has_workers(pair, pools, must_cross=must_cross) for pair in pairs):
            raise ValueError(_without_workers(name, pairs[0], must_cross=must_cross))
        for pair in pairs:
            if not colocated:
                _check_blocks(pair, pools)


def _check_spills(name: str, tier: TierConfig, tiers: Mapping[str, TierConfig]) -> None:
    others = [SHARED, *(other for other in tiers if other != name)]
    for other in tier.spill_to:
        if other not in others:
            fact = "is the tier itself" if other == name else "is no tier"
            raise ValueError(
                f"tiers.{name}.spill_to has {other[:40]!r}, which {fact}; name some of "
                f"{', '.join(others)}"
            )


def _has_workers(pair: PoolPair, pools: Mapping[PoolId, PoolConfig], *, must_cross: bool) -> bool:
    num_prefill, num_decode = (
        pools[pool].replicas if pool in pools else 0 for pool in (pair.prefill, pair.decode)
    )
    if must_cross:
        return num_prefill > 0 and num_decode > 0
    # Shared prefill workers may decode where nobody else does; those who have a decode pool of
    # their own do not mean them to.
    return num_decode > 0 or (num_prefill > 0 and not pair.decode.tier)


def _without_workers(name: str, pair: PoolPair, *, must_cross: bool) -> str:
    own = [pool.setting for pool in (pair.prefill, pair.decode) if pool.tier]
    if own:
        needed = "its pools need workers of both kinds" if must_cross else "it has no worker"
        return (
            f"tiers.{name} has pools of its own in which {needed}, and spills to none that would "
            f"do; raise {' or '.join(f'{key}.replicas' for key in own)}, or add {SHARED} to "
            f"tiers.{name}.spill_to"
        )
    if must_cross:
        return "placement.path is pd but a pool has 0 replicas; give both pools at least 1"
    return (
        "pools: prefill.replicas and decode.replicas are both 0; start at least one worker, "
        f"which tier {name} needs"
    )


def _check_blocks(pair: PoolPair, pools: Mapping[PoolId, PoolConfig]) -> None:
    sizes = [pools[pool].engine.block_size_tokens for pool in (pair.prefill, pair.decode)]
    if max(sizes) % min(sizes):
        raise ValueError(
            f"{pair.prefill.setting}.engine.block_size_tokens is {sizes[0]}, "
            f"{pair.decode.setting}.engine.block_size_tokens is {sizes[1]}, and KV goes only "
            "between blocks that divide one another; make one a multiple of the other"
        )
