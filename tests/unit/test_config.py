"""Config: four sources, later wins; a typo is an error with the right name."""

import pytest

from core.config import BatonConfig, known_keys, load_config
from core.errors import ConfigError


def test_defaults_then_file_then_environment_then_flags(tmp_path):
    path = tmp_path / "baton.yaml"
    path.write_text("router: {http_port: 1, grpc_port: 2, max_queued: 3}")
    config = load_config(
        path,
        {"router.grpc_port": 5},
        {"BATON_ROUTER__HTTP_PORT": "4", "BATON_ROUTER__GRPC_PORT": "4", "HOME": "/"},
    )
    assert (config.router.http_port, config.router.grpc_port, config.router.max_queued) == (4, 5, 3)
    assert config.router.max_running == 256


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"router.http_prt": 1}, "unknown key router.http_prt; did you mean router.http_port"),
        ({"poolz": {}}, "did you mean pools"),
        (
            {"pools.prefill.engine.block_size_tokens": 8},
            "block_size_tokens is 8, pools.decode's is 16",
        ),
        ({"router.max_running": 0}, "router.max_running"),
        ({"transfer.lease_s": float("nan")}, "transfer.lease_s"),
        ({"transfer.lease_s": float("inf")}, "transfer.lease_s"),
        ({"placement.path": "sideways"}, "placement.path"),
        ({"placement.path": "pd", "pools.prefill.replicas": 0}, "a pool has 0 replicas"),
        ({"pools.prefill.replicas": 0, "pools.decode.replicas": 0}, "start at least one worker"),
    ],
)
def test_a_wrong_value_is_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, flags, {})


def test_every_field_says_what_it_is():
    def walk(node):
        for name, info in node.model_fields.items():
            assert info.description, f"{node.__name__}.{name} has no description"
            kind = info.annotation
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                walk(kind)

    walk(BatonConfig)
    assert "router.http_port" in dict(known_keys(BatonConfig))


def test_config_is_frozen_and_survives_json():
    config = load_config(None, {}, {})
    with pytest.raises(ValueError, match="frozen"):
        config.router.http_port = 3
    assert BatonConfig.model_validate_json(config.model_dump_json()) == config


def test_a_list_may_be_one_string_as_the_environment_has_it():
    config = load_config(None, {}, environment={"BATON_TRANSFER__TRANSPORTS": "gloo, grpc"})
    assert config.transfer.transports == ("gloo", "grpc")
    with pytest.raises(ConfigError, match=r"transfer.transports"):
        load_config(None, {}, environment={"BATON_TRANSFER__TRANSPORTS": "gloo,carrier-pigeon"})
