"""Booleans of the config have one grammar; the names of the last release are still read."""

import json
import logging
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cli.main import app
from core.config import BatonConfig, known_keys, load_config
from core.config.renamed import RENAMED
from core.errors import ConfigError

NAMES = [(old, f"{old.rpartition('.')[0]}.{name}") for old, name in RENAMED.items()]
FIELDS = dict(known_keys(BatonConfig))
OTHER_GRAMMARS = ("is_", "has_", "enable_", "disable_", "use_", "allow_", "no_", "trusts_")


def value_of(config, dotted):
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def as_yaml(dotted, value):
    """One setting as a line of YAML."""
    *groups, leaf = dotted.split(".")
    return "".join(f"{{{group}: " for group in groups) + f"{{{leaf}: {value}}}" + "}" * len(groups)


def test_booleans_are_adjectives_or_what_the_component_does():
    booleans = {key for key, info in FIELDS.items() if info.annotation is bool}
    assert len(booleans) >= 9 and "router.strict" in booleans
    for key in booleans:
        assert not key.rpartition(".")[2].startswith(OTHER_GRAMMARS), key
    for old, new in NAMES:
        assert new in FIELDS and old not in FIELDS


@pytest.mark.parametrize(("old", "new"), NAMES)
def test_an_old_name_is_taken_from_each_source_and_logged_with_the_new_one(
    tmp_path, caplog, old, new
):
    turned = not FIELDS[new].default
    path = tmp_path / "baton.yaml"
    path.write_text(as_yaml(old, str(turned).lower()))
    variable = "BATON_" + old.upper().replace(".", "__")
    for sources in (
        (path, {}, {}),
        (None, {old: turned}, {}),
        (None, {}, {variable: str(turned).lower()}),
    ):
        caplog.clear()
        assert value_of(load_config(*sources), new) is turned
        (record,) = [r for r in caplog.records if r.name == "baton"]
        assert (record.event, record.fields) == ("config_key_renamed", {"old": old, "new": new})
        assert record.levelno == logging.WARNING


@pytest.mark.parametrize(("old", "new"), NAMES)
def test_both_names_in_one_source_are_refused_even_when_they_agree(old, new):
    flags = {old: True, new: True}
    with pytest.raises(ConfigError, match=f"the command line has both {new} and {old}.*keep {new}"):
        load_config(None, flags, {})
    variables = {"BATON_" + name.upper().replace(".", "__"): "1" for name in flags}
    with pytest.raises(ConfigError, match=f"the environment has both {new} and {old}"):
        load_config(None, {}, variables)


def test_a_later_source_wins_whichever_name_it_uses(tmp_path):
    path = tmp_path / "baton.yaml"
    path.write_text("router: {is_strict: true, log_requests: false}")
    flags = {"router.strict": False, "router.has_request_log": True}
    router = load_config(path, flags, {}).router
    assert (router.strict, router.log_requests) == (False, True)


def test_pools_that_share_a_group_in_a_file_are_renamed_once_each(tmp_path):
    path = tmp_path / "baton.yaml"
    path.write_text(
        "pools:\n  prefill: &pool {engine: {is_prefix_cache_on: false}}\n  decode: *pool\n"
    )
    told = []
    pools = load_config(path, {}, {}, lambda old, new: told.append(new)).pools
    assert not pools.prefill.engine.cache_prefixes and not pools.decode.engine.cache_prefixes
    assert told == [f"pools.{pool}.engine.cache_prefixes" for pool in ("prefill", "decode")]


def test_a_group_that_is_no_group_and_an_unknown_name_are_errors_as_ever():
    with pytest.raises(ConfigError, match="redis: "):
        load_config(None, {"redis": "is_on"}, {})
    with pytest.raises(ConfigError, match=r"unknown key router\.is_loud"):
        load_config(None, {"router.is_loud": True}, {})


def test_check_config_and_up_warn_on_standard_error(tmp_path):
    path = tmp_path / "baton.yaml"
    path.write_text("{router: {is_strict: true}, log: {format: json}}")
    checked = CliRunner().invoke(app, ["check-config", "--config", str(path)])
    assert checked.exit_code == 0, checked.output
    assert "router.is_strict is now router.strict" in checked.stderr
    assert "strict: true" in checked.stdout
    up = [sys.executable, "-m", "cli.main", "up", "--local", "--config", str(path)]
    ran = subprocess.run([*up, "--model", "/nope"], capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    (line,) = [one for one in ran.stderr.splitlines() if "config_key_renamed" in one]
    event = json.loads(line)
    assert (event["old"], event["new"]) == ("router.is_strict", "router.strict")
