"""What a config names on this machine is checked by `check-config`, and by `up` as it starts."""

import json

import pytest
from support.models import TINY
from typer.testing import CliRunner

from cli.main import app
from core.errors import ConfigError
from engine.checkpoint.model_spec import read_model

BLOCK_BYTES = read_model(TINY).layout(16, 1).block_bytes


def run(command, tree, tmp_path):
    path = tmp_path / "baton.yaml"
    path.write_text(json.dumps(tree))
    return CliRunner().invoke(app, [*command.split(), "--config", str(path)])


def refused(tmp_path):
    """Each group of settings that a start refuses on this machine, and what is said of it."""
    public = {
        "object": {"a": 1},
        "many": ["x"] * 65,
        "number": ["one", 2],
        "large": "x" * (1 << 20),
    }
    for name, content in public.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "text").write_text("You are kind.")
    (tmp_path / "empty").write_text("")
    told = "router.public_prompts: "
    remedy = "it must be a JSON list of at most 64 texts in 1048576 bytes"
    for name, fact in {
        "missing": "cannot be read: No such file or directory",
        "text": "is not JSON: Expecting value",
        "object": "holds a dict, no list",
        "many": "holds 65 prompts",
        "number": "has as prompt 2 an empty text, or no text",
        "large": "has more than 1048576 bytes",
    }.items():
        path = str(tmp_path / name)
        yield {"router": {"public_prompts": path}}, (f"{told}{path} {fact}", remedy)
    yield (
        {"prefix_cache": {"host_bytes": BLOCK_BYTES - 1}},
        (f"prefix_cache.host_bytes is {BLOCK_BYTES - 1}", f"takes {BLOCK_BYTES} bytes", "raise it"),
    )
    yield (
        {"prefix_cache": {"disk_bytes": BLOCK_BYTES, "disk_folder": str(tmp_path)}},
        (f"prefix_cache.disk_bytes is {BLOCK_BYTES}", "bytes there", "or set it to 0"),
    )
    for folder in (f"{tmp_path}/text/kv", "/proc/kv"):
        yield (
            {"prefix_cache": {"disk_bytes": 1 << 20, "disk_folder": folder}},
            (f"prefix_cache.disk_folder is {folder}, which cannot be written", "name a folder"),
        )
    for secret in ("env:A_KEY_THAT_IS_NOT_SET", f"file:{tmp_path}/empty"):
        for key in ("security.cluster_key", "seed_key", "redis.url"):
            group, _, leaf = key.rpartition(".")
            tree = {group: {leaf: secret}} if group else {leaf: secret}
            yield tree, (f"{key} is {secret}", "empty or not set on this machine")


@pytest.mark.parametrize("command", ["check-config", "up --local"])
def test_what_a_start_would_refuse_is_refused_before_it(command, tmp_path, monkeypatch):
    """Nothing is started: that would be an error of another kind."""
    monkeypatch.setattr("cluster.local.LocalCluster", None)
    for tree, words in refused(tmp_path):
        done = run(command, tree, tmp_path)
        assert isinstance(done.exception, ConfigError), (tree, done)
        assert all(word in done.exception.message for word in words), (tree, done.exception)


def test_a_public_prompt_that_the_template_refuses_is_refused(tmp_path):
    """The tiny model with a template that knows no system prompts."""
    model = tmp_path / "model"
    model.mkdir()
    for file in TINY.iterdir():
        (model / file.name).symlink_to(file)
    (model / "tokenizer_config.json").unlink()
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('no system prompts') }}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "public.json").write_text('["Be brief."]')
    tree = {
        "model": {"path": str(model)},
        "router": {"public_prompts": str(tmp_path / "public.json")},
    }
    done = run("check-config", tree, tmp_path)
    assert isinstance(done.exception, ConfigError)
    assert "prompt 1 cannot begin a conversation" in done.exception.message
    tree["model"]["path"] = str(TINY)
    assert run("check-config", tree, tmp_path).exit_code == 0


def test_what_fits_is_accepted_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "a secret of sufficient length")
    folder = tmp_path / "not yet" / "kv"
    cache = {"host_bytes": BLOCK_BYTES, "disk_bytes": 1 << 20, "disk_folder": str(folder)}
    security = {"cluster_key": "env:THE_KEY"}
    done = run("check-config", {"prefix_cache": cache, "security": security}, tmp_path)
    assert done.exit_code == 0, done.exception
    assert [path.name for path in tmp_path.iterdir()] == ["baton.yaml"]
    # Nobody keeps anything there.
    off = {pool: {"engine": {"cache_prefixes": False}} for pool in ("prefill", "decode")}
    small = {"prefix_cache": {"host_bytes": 1}, "pools": off}
    assert run("check-config", small, tmp_path).exit_code == 0
