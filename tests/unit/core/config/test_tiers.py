"""Tiers in a config: those that are always there, and those that cannot be meant."""

import pytest

from core.config import BatonConfig, known_keys, load_config
from core.config.tiers import MAX_TIERS, TierConfig
from core.errors import ConfigError
from core.prices import Prices


def load(tree):
    return load_config(flags=tree, environment={})


def test_a_config_that_names_no_tier_has_three_and_the_middle_one_is_for_keys_without():
    config = load({})
    delays = [(name, tier.delay_s) for name, tier in config.tiers.items()]
    assert [name for name, _ in delays] == ["interactive", "standard", "batch"]
    assert delays == sorted(delays, key=lambda pair: pair[1])
    assert config.default_tier == "standard"
    assert config.tiers["batch"].max_running_share < 1


def test_a_setting_of_one_tier_leaves_its_others_and_the_other_tiers_as_they_are():
    config = load_config(
        flags={"tiers.gold.delay_s": 1, "tiers.batch.tenant_weights": {"acme": 3}},
        environment={"BATON_TIERS__BATCH__DELAY_S": "30"},
    )
    before = load({})
    assert list(config.tiers) == ["interactive", "standard", "batch", "gold"]
    assert config.tiers["gold"] == TierConfig(delay_s=1.0)
    changed = {"delay_s": 30.0, "tenant_weights": {"acme": 3.0}}
    assert config.tiers["batch"] == before.tiers["batch"].model_copy(update=changed)
    assert config.tiers["standard"] == before.tiers["standard"]
    assert BatonConfig.model_validate_json(config.model_dump_json()) == config


def test_a_tier_has_prices_once_it_names_one_and_cached_tokens_cost_as_others_unless_it_says():
    assert TierConfig().prices is None
    assert TierConfig(output_price_per_mtok=6.0).prices == Prices(0.0, 0.0, 6.0)
    assert TierConfig(prompt_price_per_mtok=2.0).prices == Prices(2.0, 2.0, 0.0)
    free_hits = TierConfig(prompt_price_per_mtok=2.0, cached_price_per_mtok=0.0)
    assert free_hits.prices == Prices(2.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"default_tier": "gold"}, "default_tier is 'gold', must be one of interactive, standard"),
        ({"tiers.Gold": {}}, "the name 'Gold'; use 1 to 32 lower-case letters"),
        ({"tiers.canary": {}}, "the name 'canary'.*none of auto, default, canary"),
        ({"tiers.default": {}}, "the name 'default'"),
        ({"tiers": {f"t{n}": {} for n in range(MAX_TIERS)}}, "19 entries, the limit is 16"),
        ({"tiers": "batch"}, "tiers: must be a group of names"),
        ({"tiers.batch.delay_s": -1}, "tiers.batch.delay_s: must be at least 0"),
        ({"tiers.batch.delay_s": float("nan")}, "tiers.batch.delay_s"),
        ({"tiers.batch.delay_s": float("inf")}, "tiers.batch.delay_s"),
        ({"tiers.batch.max_running_share": 0}, "max_running_share: must be above 0"),
        ({"tiers.batch.max_running_share": 1.5}, "max_running_share: must be at most 1"),
        ({"tiers.batch.max_queued_tokens": 0}, "max_queued_tokens"),
        ({"tiers.batch.tenant_weights": {"a": 0}}, "tenant_weights.a: must be at least 0.001"),
        ({"tiers.batch.tenant_weights": {"a": 1e-310}}, "a: must be at least 0.001"),
        ({"tiers.batch.tenant_weights": {"a": float("nan")}}, "tenant_weights.a"),
        ({"tiers.batch.cache_weight": 0}, "cache_weight"),
        ({"tiers.batch.dely_s": 1}, "unknown key tiers.batch.dely_s; did you mean .*delay_s"),
        (
            {"tiers.batch.max_queued": 2000},
            "max_queued is 2000, which router.max_queued = 1024 lets nobody reach; lower the one",
        ),
        ({"tiers.batch.max_queued_tokens": 5_000_000}, "router.max_queued_tokens = 4194304"),
        ({"tiers.batch.queue_wait_s": 400}, "queue_wait_s is 400, which router.deadline_s = 300"),
        (
            {"tiers.batch.max_prompt_tokens": 9000, "model.max_model_len": 4096},
            "max_prompt_tokens is 9000, which model.max_model_len = 4096",
        ),
        (
            {"tiers.batch.max_prompt_tokens": 9000, "tiers.batch.max_queued_tokens": 8000},
            "max_prompt_tokens is 9000 and max_queued_tokens 8000: .*could never wait",
        ),
        ({"tiers.batch.requests_per_minute": -1}, "requests_per_minute: must be at least 0"),
        ({"tiers.batch.tokens_per_minute": 1}, "tokens_per_minute is 1, and .* may need 2"),
        (
            {"tiers.batch.tokens_per_minute": 900, "tiers.batch.max_prompt_tokens": 900},
            "tokens_per_minute is 900, and .* may need 901",
        ),
        ({"tiers.batch.tokens_at_once": 1}, "tokens_at_once is 1, and .* may need 2"),
        ({"tiers.batch.overflow_to": "gold"}, "overflow_to is 'gold', must be one of interactive"),
        (
            {"tiers.batch.overflow_to": "standard"},
            "standard, whose delay_s is 5: it must be more than 120, the delay_s of batch",
        ),
        ({"tiers.standard.overflow_to": "standard"}, "delay_s is 5: it must be more than 5"),
        (
            {"tiers.standard.overflow_to": "batch", "tiers.batch.max_prompt_tokens": 900},
            "batch, which takes prompts of 900 tokens, and standard longer ones; raise",
        ),
    ],
)
def test_a_tier_that_cannot_be_meant_is_refused_with_its_numbers(tree, message):
    with pytest.raises(ConfigError, match=message):
        load(tree)


def test_every_field_of_a_tier_says_what_it_is():
    keys = dict(known_keys(BatonConfig))
    # A group is listed by its members.
    named = {key.split(".")[2] for key in keys if key.startswith("tiers.NAME.")}
    assert named == TierConfig.model_fields.keys()
    assert all(info.description for info in TierConfig.model_fields.values())
