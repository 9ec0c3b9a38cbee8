"""Config: four sources, later wins; a typo is an error with the right name."""

import json
import traceback

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from cli.main import app
from cluster.model_source import model_folder
from core.config import BatonConfig, known_keys, load_config
from core.errors import (
    ConfigError,
    InvalidRequest,
    ModelLoadError,
)
from core.types import SamplingParams
from router.http.bodies import ChatBody, CompletionBody
from router.http.body_model import parse_body
from transport.certificates import make_certificates


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
            {"pools.prefill.engine.block_size_tokens": 12},
            "engine.block_size_tokens is 12, .* is 16, .*; make one a multiple of the other",
        ),
        ({"router.max_running": 0}, "router.max_running"),
        ({"transfer.lease_s": float("nan")}, "transfer.lease_s"),
        ({"transfer.lease_s": float("inf")}, "transfer.lease_s"),
        ({"placement.path": "sideways"}, "placement.path"),
        ({"placement.path": "pd", "pools.prefill.replicas": 0}, "a pool has 0 replicas"),
        ({"router.http_port": 7, "router.grpc_port": 7}, "http_port and router.grpc_port are both"),
        (
            {"router.metrics_port": 8999, "router.replicas": 2},
            "router.grpc_port is 9000, one of the ports from 8999 to 9000",
        ),
        ({"router.metrics_port": 8000}, "router.http_port is 8000, one of the ports from 8000"),
        (
            {"router.metrics_port": 65535, "router.replicas": 2},
            "2 routers would need ports up to 65536; make it 65534 or less",
        ),
        ({"pools.prefill.replicas": 0, "pools.decode.replicas": 0}, "start at least one worker"),
    ],
)
def test_a_wrong_value_is_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, flags, {})


def test_the_ports_of_metrics_may_lie_beside_those_of_the_servers():
    flags = {"router.metrics_port": 8998, "router.replicas": 2}
    assert load_config(None, flags, {}).router.metrics_port == 8998


@pytest.mark.parametrize(("prefill", "decode"), [(32, 16), (16, 32), (16, 16), (1, 256)])
def test_block_sizes_of_which_one_divides_the_other_are_taken(prefill, decode, tmp_path):
    path = tmp_path / "baton.yaml"
    path.write_text(
        f"pools: {{prefill: {{engine: {{block_size_tokens: {prefill}}}}},"
        f" decode: {{engine: {{block_size_tokens: {decode}}}}}}}"
    )
    pools = load_config(path, {}, {}).pools
    assert pools.prefill.engine.block_size_tokens == prefill
    assert pools.decode.engine.block_size_tokens == decode


def test_with_one_pool_the_blocks_of_the_other_do_not_matter():
    flags = {"colocated": True, "pools.prefill.engine.block_size_tokens": 12}
    assert load_config(None, flags, {}).colocated


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


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("router: {http_port: 8001, http_port: 8002}", 1, "http_port"),
        ("router:\n  host: '::1'\nlog:\n  level: info\nrouter:\n  http_port: 1\n", 5, "router"),
        ("pools:\n  decode:\n    replicas: 1\n    num_cpus: 1\n    replicas: 2", 5, "replicas"),
    ],
)
def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path, text, line, key):
    path = tmp_path / "baton.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"line {line}: the key {key} stands in its group"):
        load_config(path, {}, {})


def test_equal_keys_of_different_groups_and_free_ports_are_fine(tmp_path):
    path = tmp_path / "baton.yaml"
    path.write_text(
        "pools:\n  prefill: &pool {replicas: 2}\n  decode: *pool\n"
        "router: {http_port: 0, grpc_port: 0}"
    )
    config = load_config(path, {}, {})
    assert config.pools.prefill.replicas == config.pools.decode.replicas == 2


def test_check_config_refuses_a_door_key_of_another_certificate(tmp_path):
    for name in ("one", "other"):
        make_certificates(tmp_path / name, ["localhost"])
    tree = {
        "door_certificate": str(tmp_path / "one" / "door.pem"),
        "door_key": str(tmp_path / "other" / "door.key"),
    }
    path = tmp_path / "baton.yaml"

    def checked():
        path.write_text(json.dumps({"security": tree}))
        return CliRunner().invoke(app, ["check-config", "--config", str(path)])

    wrong = checked()
    assert wrong.exit_code != 0
    assert "security.door_certificate and security.door_key cannot" in str(wrong.exception)
    tree["door_key"] = str(tmp_path / "one" / "door.key")
    assert checked().exit_code == 0


def test_messages_say_no_more_than_is_wrong():
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"transfer.transports": ["nvlink"]}, {})
    assert "nvlink" in str(caught.value) and "at least 1" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"router.http_port": 7, "router.grpc_port": 7}, {})
    assert str(caught.value).startswith("config is not valid: router.http_port and")
    with pytest.raises(ModelLoadError, match="model.path is /nope, which is neither a folder"):
        model_folder(load_config(None, {"model.path": "/nope"}, {}).model)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stop", ("x",) * 17, "stop has 17 entries, the limit is 16"),
        ("stop", ("x" * 257,), "stop has a string of 257 bytes, must be from 1 to 256"),
        ("bad_words", ((),), "bad_words has a word of 0 tokens, must be from 1 to 2048"),
        ("max_tokens", 0, "max_tokens is 0, must be from 1 to 2147483648"),
        ("stop_token_ids", (99,), "stop_token_ids has token id 99, must be from 0 to 63"),
        ("temperature", 200.0, "temperature is 200.0, must be from 0 to 100"),
    ],
)
def test_a_wrong_sampling_field_says_what_is_wrong(field, value, message):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value}).validate(64)
    assert caught.value.message == message


def test_a_wrong_prompt_hears_what_a_prompt_may_be():
    with pytest.raises(InvalidRequest, match="prompt must be text, token ids, or a list of"):
        parse_body(CompletionBody, {"prompt": [1.5]})


SECRET = "correct horse battery staple"


def as_logged(said):
    """An error with all that caused it, as a traceback in a log has it."""
    with pytest.raises((ConfigError, InvalidRequest, ValidationError)) as caught:
        said()
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"security": {"cluster_key": [SECRET]}}, "security.cluster_key"),
        ({"seed_key": {"is": SECRET}}, "seed_key"),
        ({"redis": {"url": 4, "host": SECRET}}, "redis.url"),
        ({"redis": SECRET}, "redis"),
        ({"security": [{"cluster_key": SECRET}]}, "security"),
    ],
)
def test_no_error_about_a_config_has_its_secrets(tmp_path, tree, key):
    path = tmp_path / "baton.yaml"
    path.write_text(json.dumps(tree))
    read = as_logged(lambda: load_config(path, {}, {}))
    handed_on = as_logged(lambda: BatonConfig.model_validate_json(json.dumps(tree)))
    assert f"{key}: " in read and f"\n{key}\n" in handed_on
    assert SECRET not in read + handed_on
    cut = as_logged(lambda: BatonConfig.model_validate_json(json.dumps(tree)[:-1]))
    assert "Invalid JSON" in cut and SECRET not in cut
    path.write_text(f"seed_key: {SECRET}: {SECRET}\n")
    broken = as_logged(lambda: load_config(path, {}, {}))
    assert "line 1" in broken and SECRET not in broken


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (CompletionBody, {"prompt": {"text": SECRET}}, "prompt"),
        (CompletionBody, {"prompt": "x", "seed": SECRET}, "seed"),
        (CompletionBody, {"prompt": "x", "stream_options": SECRET}, "stream_options"),
        (ChatBody, {"messages": [{"content": SECRET}]}, "messages[0].role"),
        (ChatBody, {"messages": [{"role": "user", "content": [SECRET]}]}, "messages[0].content"),
    ],
)
def test_no_error_about_a_body_has_what_its_client_wrote(kind, body, field):
    said = as_logged(lambda: parse_body(kind, body))
    assert f"InvalidRequest: {field}" in said and SECRET not in said


def test_a_group_that_is_given_as_a_value_is_named():
    with pytest.raises(ConfigError, match="router"):
        load_config(None, {}, {"BATON_ROUTER": "3", "BATON_ROUTER__HTTP_PORT": "1"})


def test_files_that_are_empty_lists_or_not_text(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("")
    assert load_config(path, {}, {}) == load_config(None, {}, {})
    for content, words in ((b"[1]", "list"), (b"\xff\xfe\x00", "read"), (b"a: [", "YAML")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            load_config(path, {}, {})


WRONG = ("x", "", -1, 10**30, 0.5, True, None, [], ["x"], [1], {}, {"x": 1}, float("nan"))


def test_no_words_of_the_validator_reach_who_wrote_the_config():
    """Each setting and group with each kind of wrong value, where it is wrong."""
    found = []
    for key in {k for name, _ in known_keys(BatonConfig) for k in (name, name.rpartition(".")[0])}:
        for value in WRONG if key else ():
            try:
                load_config(None, {key: value}, {})
            except ConfigError as error:
                found.append(error.message)
    assert len(found) > 500
    for foreign in ("Input", "input_", "pydantic", "type=", "Field required", "valid "):
        assert not [text for text in found if foreign in text.removeprefix("config is not valid")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"router.max_running": 0}, "router.max_running: must be at least 1 (got 0)"),
        ({"router.max_running": "many"}, "router.max_running: must be a whole number (got 'many')"),
        ({"router.strict": "perhaps"}, "router.strict: must be true or false (got 'perhaps')"),
        ({"router": "x"}, "router: must be a group of names and values"),
        ({"placement.path": "up"}, "placement.path: must be 'auto', 'pd' or 'local' (got 'up')"),
    ],
)
def test_a_wrong_value_is_told_of_in_plain_words(flags, words):
    with pytest.raises(ConfigError) as caught:
        load_config(None, flags, {})
    assert caught.value.message == f"config is not valid: {words}"
