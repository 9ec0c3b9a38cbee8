"""Cluster files against Ray's own schema, and our config against ours."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("provider", ["aws", "on-premises"])
def test_ray_up_files_are_valid_for_ray_itself(provider, tmp_path, monkeypatch):
    """Ray's own schema check; node types carry the labels that the config's pools ask for."""
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    path = ROOT / "deploy" / "ray" / f"{provider}.yaml"
    tree = yaml.safe_load(path.read_text())
    validate_config(prepare_config(tree))
    text = path.read_text()
    assert "baton.role" in text and "prefill" in text and "decode" in text
    broken = yaml.safe_load(text)
    broken["surplus_key"] = 1
    with pytest.raises(Exception, match="surplus_key"):
        validate_config(prepare_config(broken))


def starts_of(provider):
    """Commands that start Ray on the head and on workers."""
    import yaml

    tree = yaml.safe_load((ROOT / "deploy" / "ray" / f"{provider}.yaml").read_text())
    commands = [tree[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert all("ray start" in command for command in commands)
    return commands


@pytest.mark.parametrize("provider", ["aws", "on-premises"])
def test_every_port_that_ray_lets_be_named_is_named_and_an_option_of_ray_start(provider):
    from ray.scripts.scripts import start

    options = {option for parameter in start.params for option in parameter.opts}
    fixed = {option for option in options if option.endswith("-port")}
    only_head = {"--port", "--dashboard-port", "--ray-client-server-port"}
    for command in starts_of(provider):
        given = {word.partition("=")[0] for word in command.split() if word.startswith("--")}
        assert given <= options
        assert fixed - only_head <= given


def test_the_deployed_config_is_valid_and_fit_for_several_machines():
    from cluster.network_check import check_network
    from cluster.ray.probe import endpoint_of_environment
    from core.config import load_config

    config = load_config(ROOT / "deploy" / "ray" / "baton.yaml", {}, {})
    for provider in ("aws", "on-premises"):
        for command in starts_of(provider):
            environment = dict(
                word.split("=") for word in command.split() if word.startswith("RAY_")
            )
            check_network(config, endpoint_of_environment(environment), is_loopback=False)
    assert (
        config.pools.prefill.node_label == "prefill" and config.pools.decode.node_label == "decode"
    )
