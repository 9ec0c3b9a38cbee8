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


def test_the_deployed_config_is_valid():
    from core.config import load_config

    config = load_config(ROOT / "deploy" / "ray" / "baton.yaml", {}, {})
    assert (
        config.pools.prefill.node_label == "prefill" and config.pools.decode.node_label == "decode"
    )
