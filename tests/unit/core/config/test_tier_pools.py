"""Pools of a tier's own in a config: which there are, who may use them, what cannot be meant."""

import pytest

from core.config import BatonConfig, all_pools, load_config, pairs_of
from core.errors import ConfigError
from core.session import PoolId, Role


def load(tree):
    return load_config(flags=tree, environment={})


def names(config, tier):
    return [(str(p.prefill), str(p.decode)) for p in pairs_of(tier, config.tiers)]


def test_a_config_that_says_nothing_has_the_two_shared_pools_for_every_tier():
    config = load({})
    assert list(map(str, all_pools(config.pools, config.tiers, colocated=False))) == [
        "prefill",
        "decode",
    ]
    for tier in config.tiers:
        assert names(config, tier) == [("prefill", "decode")]


def test_a_tier_uses_a_shared_pool_where_it_has_none_of_its_own():
    config = load({"tiers.batch.pools.decode.replicas": 2, "tiers.gold.pools.prefill": {}})
    pools = all_pools(config.pools, config.tiers, colocated=False)
    assert list(map(str, pools)) == ["prefill", "decode", "decode-batch", "prefill-gold"]
    assert pools[PoolId(Role.DECODE, "batch")].replicas == 2
    assert names(config, "batch") == [("prefill", "decode-batch")]
    assert names(config, "gold") == [("prefill-gold", "decode")]
    assert names(config, "standard") == [("prefill", "decode")]


def test_a_request_may_use_the_pools_of_those_to_whom_its_tier_spills_and_of_nobody_after_them():
    config = load(
        {
            "tiers.interactive.pools": {"prefill": {}, "decode": {}},
            "tiers.interactive.spill_to": ["batch"],  # and back: a cycle is fine
            "tiers.batch.pools.decode": {},
            "tiers.batch.spill_to": "interactive, standard, shared",  # as a variable says it
        }
    )
    own = ("prefill-interactive", "decode-interactive")
    assert names(config, "interactive") == [own, ("prefill", "decode-batch")]
    # `standard` has no pools of its own: these are the shared ones, and named once.
    assert names(config, "batch") == [("prefill", "decode-batch"), own, ("prefill", "decode")]
    assert BatonConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("pool", [PoolId(Role.PREFILL), PoolId(Role.DECODE, "night-batch_2")])
def test_the_name_of_a_pool_says_which_it_is(pool):
    assert PoolId.parse(str(pool)) == pool


EVERYBODY = {f"tiers.{tier}.pools.decode": {} for tier in ("interactive", "standard", "batch")}
NO_SHARED = {"pools.prefill.replicas": 0, "pools.decode.replicas": 0}


def test_shared_pools_may_be_empty_when_every_tier_has_workers_elsewhere():
    assert load({**EVERYBODY, **NO_SHARED}).pools.decode.replicas == 0
    spilling = {**EVERYBODY, "tiers.batch.pools.decode": {"replicas": 0}}
    load({**spilling, **NO_SHARED, "tiers.batch.spill_to": ["interactive"]})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"tiers.batch.spill_to": ["gold"]}, "has 'gold', which is no tier; name some of shared, "),
        ({"tiers.batch.spill_to": ["batch"]}, "'batch', which is the tier itself; name some of"),
        ({"tiers.shared": {}}, "the name 'shared'"),
        (
            {"tiers.batch.pools.decode.replicas": 0},
            "raise tiers.batch.pools.decode.replicas, or add shared to tiers.batch.spill_to",
        ),
        (
            # Prefill workers that all share do not decode for who has a decode pool.
            {"tiers.batch.pools.decode.replicas": 0, "pools.decode.replicas": 0},
            "raise tiers.batch.pools.decode.replicas",
        ),
        (
            {
                "tiers.batch.pools.decode.replicas": 0,
                "tiers.gold.pools.decode.replicas": 0,
                "tiers.gold.spill_to": ["batch"],
                "tiers.batch.spill_to": ["gold"],
            },
            "tiers.batch has pools of its own in which it has no worker",
        ),
        (NO_SHARED, "both 0; start at least one worker, which tier interactive needs"),
        (
            {**NO_SHARED, "tiers.interactive.pools.decode": {}},
            "both 0; start at least one worker, which tier standard needs",
        ),
        (
            {"colocated": True, "tiers.batch.pools.prefill": {}},
            "tiers.batch.pools.prefill is set but colocated.*; set tiers.batch.pools.decode",
        ),
        (
            {"placement.path": "pd", "tiers.batch.pools.prefill.replicas": 0},
            "need workers of both kinds.*raise tiers.batch.pools.prefill.replicas",
        ),
        (
            {"tiers.batch.pools.decode.engine.block_size_tokens": 24},
            "pools.prefill.*is 16, tiers.batch.pools.decode.engine.block_size_tokens is 24",
        ),
        ({"tiers.batch.pools.decode.engin": {}}, "unknown key tiers.batch.pools.decode.engin"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_remedy(tree, message):
    with pytest.raises(ConfigError, match=message):
        load(tree)


def test_pools_that_never_serve_a_request_together_may_have_any_blocks():
    sizes = {"prefill": {"engine": {"block_size_tokens": 24}}}
    sizes["decode"] = {"engine": {"block_size_tokens": 48}}
    load({"tiers.batch.pools": sizes, "tiers.batch.spill_to": ["shared"]})
    load({"tiers.batch.pools.decode.engine.block_size_tokens": 24, "colocated": True})
