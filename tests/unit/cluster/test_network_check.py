"""What several machines would send readable, or inside Ray, is refused by name, all at once."""

import json
import os
import subprocess
import sys

import pytest

from cluster.network_check import check_network, faults_between_machines
from cluster.ray.probe import RayEndpoint, endpoint_of_environment
from cluster.secrets import secrets_of, with_cluster_keys, with_read_secrets
from core.config import load_config
from core.errors import ConfigError
from core.secret_references import read_reference

CLOSED = RayEndpoint(has_tokens=True, has_tls=True)
PLAIN = RayEndpoint(has_tokens=True, has_tls=False)
OPEN = RayEndpoint(has_tokens=False, has_tls=False)
NAMED = {"security.cluster_key": "env:CLUSTER_KEY", "seed_key": "file:/run/secrets/seed_key"}


def config(**flags):
    return load_config(
        flags={key.replace("__", "."): v for key, v in flags.items()}, environment={}
    )


def subjects(faults):
    return [fault.split()[0].rstrip(":") for fault in faults]


def test_on_one_machine_nothing_is_asked_but_a_token():
    check_network(config(), PLAIN, is_loopback=True)
    with pytest.raises(ConfigError, match=r"requires no token.*RAY_AUTH_MODE=token"):
        check_network(config(), OPEN, is_loopback=True)
    check_network(config(security__trust_network=True), OPEN, is_loopback=True)


def test_between_machines_every_plane_needs_tls_ray_s_own_too():
    named = config(security__tls_dir="x", **{k.replace(".", "__"): v for k, v in NAMED.items()})
    assert faults_between_machines(named, CLOSED) == []
    check_network(named, CLOSED, is_loopback=False)
    assert "RAY_USE_TLS=1" in faults_between_machines(named, PLAIN)[0]
    assert len(faults_between_machines(named, OPEN)) == 2
    with pytest.raises(ConfigError, match=r"RAY_USE_TLS=1.*`baton certs`.*cluster_key.*seed_key"):
        check_network(config(), PLAIN, is_loopback=False)
    trusted = config(security__trust_network=True)
    assert subjects(faults_between_machines(trusted, OPEN)) == ["security.cluster_key", "seed_key"]


@pytest.mark.parametrize(
    ("url", "faults"),
    [
        ("", []),  # several machines run without a store then
        ("rediss://h:1", ["redis.url"]),  # it would travel inside Ray, password and all
        ("redis://h:1", ["redis.url", "redis.url"]),
        ("unix:///run/redis", ["redis.url", "redis.url"]),
    ],
)
def test_redis_needs_tls_between_machines_and_its_address_a_name(url, faults):
    with_url = config(
        redis__url=url, security__tls_dir="x", **{k.replace(".", "__"): v for k, v in NAMED.items()}
    )
    assert subjects(faults_between_machines(with_url, CLOSED)) == faults


def test_a_named_address_of_redis_is_read_before_it_is_judged(tmp_path):
    named = {k.replace(".", "__"): v for k, v in NAMED.items()}
    (tmp_path / "url").write_text("redis://:secret@h:1\n")
    plain = config(redis__url=f"file:{tmp_path / 'url'}", security__tls_dir="x", **named)
    (fault,) = faults_between_machines(plain, CLOSED)
    assert "rediss://" in fault
    assert "secret" not in fault
    (tmp_path / "url").write_text("rediss://:secret@h:1\n")
    assert faults_between_machines(plain, CLOSED) == []


def test_named_secrets_are_read_where_they_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTER_KEY", "k" * 20)
    (tmp_path / "seed").write_text("s" * 20 + "\n")
    named = config(security__cluster_key="env:CLUSTER_KEY", seed_key=f"file:{tmp_path / 'seed'}")
    assert with_cluster_keys(named) == named
    read = secrets_of(with_read_secrets(named))
    assert (read["security.cluster_key"], read["seed_key"]) == ("k" * 20, "s" * 20)
    (tmp_path / "seed").write_text("s" * 65)
    with pytest.raises(ConfigError, match="seed_key has 65 bytes"):
        with_read_secrets(named)
    monkeypatch.setenv("CLUSTER_KEY", "swift")
    with pytest.raises(ConfigError, match="cluster_key has 5 characters") as caught:
        with_read_secrets(named)
    assert "swift" not in caught.value.message


def test_a_named_secret_that_is_not_there_is_told_by_setting_and_name(tmp_path):
    with pytest.raises(ConfigError, match=r"seed_key is env:NOWHERE, which is empty or not set"):
        read_reference("seed_key", "env:NOWHERE", {})
    with pytest.raises(ConfigError, match=r"redis\.url is file:/no/such, which cannot be read"):
        read_reference("redis.url", "file:/no/such")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="which is empty"):
        read_reference("seed_key", f"file:{tmp_path / 'empty'}")
    assert read_reference("seed_key", "plain value") == "plain value"


def test_the_environment_tells_what_a_ray_started_in_it_would_be():
    assert endpoint_of_environment({}) == RayEndpoint(has_tokens=False, has_tls=False)
    both = {"RAY_AUTH_MODE": "token", "RAY_USE_TLS": "1"}
    assert endpoint_of_environment(both) == CLOSED


def test_check_config_tells_what_keeps_it_from_several_machines_and_shows_no_secret(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "seed_key: 'not-to-be-seen-123'\nsecurity: {cluster_key: 'env:THE_KEY'}\n"
        "redis: {url: 'redis://:hidden-word@h:1'}\n"
    )
    command = [sys.executable, "-m", "cli.main", "check-config", "-o", "json"]
    done = subprocess.run(
        [*command, "-c", str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "THE_KEY": "a secret of sufficient length"},
    )
    assert "sufficient" not in done.stdout
    tree = json.loads(done.stdout)
    found = tree["facts"]["in_the_way_of_several_machines"]
    assert subjects(found)[-3:] == ["redis.url", "seed_key", "redis.url"]
    assert "hidden-word" not in done.stdout
    assert "not-to-be-seen" not in done.stdout
    shown = tree["config"]
    assert (shown["seed_key"], shown["redis"]["url"]) == ("***", "***")
    assert shown["security"]["cluster_key"] == "env:THE_KEY"
