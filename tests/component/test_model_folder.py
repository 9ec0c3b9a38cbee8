"""A model folder that is wrong is refused by name, before a rank starts."""

import json
import shutil

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.models import random_llama

from cluster.model_source import model_folder
from cluster.served_model import model_of
from core.config import BatonConfig, ModelConfig
from core.errors import ModelLoadError
from engine.checkpoint.model_spec import read_model


@pytest.fixture()
def folder(tmp_path):
    random_llama(tmp_path)
    return tmp_path


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_good_folder_is_read(folder):
    spec = read_model(folder)
    assert spec.num_layers == 3 and spec.eos_token_ids == (2,)


def test_a_missing_tensor_is_named(folder):
    change_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        ModelLoadError, match=r"1 missing, first model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        read_model(folder)


def test_a_surplus_tensor_is_named(folder):
    change_tensors(folder, lambda t: t.update(extra=t["model.norm.weight"].clone()))
    with pytest.raises(ModelLoadError, match="1 surplus, first extra"):
        read_model(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    change_tensors(
        folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:32].clone()})
    )
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight is \[32\], must be \[64\]"):
        read_model(folder)


def test_an_unknown_architecture_is_refused_by_name(folder):
    change_config(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(
        ModelLoadError,
        match="architecture MambaForCausalLM .*not supported; supported: Gemma.*LlamaForCausalLM",
    ):
        read_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -1}, "hidden_size = -1"),
        ({"hidden_size": "big"}, "hidden_size = 'big'"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "llama3 rope scaling lacks"),
        ({"rope_parameters": "fast"}, "rope_parameters = 'fast', must be an object"),
        ({"rope_parameters": {"rope_theta": "fast"}}, "wrong kind"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None, must be a number"),
        ({"vocab_size": None}, "vocab_size = None, must be a positive integer"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads = '2', must be a positive integer"),
        ({"head_dim": 16.0}, "head_dim = 16.0, must be a positive integer"),
        ({"architectures": None}, "architectures = None, must be a list"),
        ({"eos_token_id": [2, "3"]}, "config.json has eos_token_id = '3', must be a whole number"),
        ({"eos_token_id": True}, "config.json has eos_token_id = True, must be a whole number"),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"]},
            "1 layer_types for 3 layers",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["chunked_attention"] * 3},
            "chunked_attention",
        ),
        ({"architectures": ["MixtralForCausalLM"]}, "num_local_experts"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
        ({"num_attention_heads": 3}, "3 query heads"),
    ],
)
def test_a_wrong_config_value_is_named(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ModelLoadError, match=message):
        read_model(folder)


def test_files_that_are_missing_truncated_or_garbage(folder, tmp_path):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    with pytest.raises(ModelLoadError, match="truncated"):
        read_model(folder)
    weights.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelLoadError, match="not a safetensors file"):
        read_model(folder)
    weights.unlink()
    with pytest.raises(ModelLoadError, match="holds no"):
        read_model(folder)
    (folder / "config.json").write_text("{nonsense")
    with pytest.raises(ModelLoadError, match="is not JSON"):
        read_model(folder)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_model(tmp_path / "nowhere")


def test_a_window_above_the_models_own_is_refused(folder):
    with pytest.raises(ModelLoadError, match="above the model's own 256"):
        read_model(folder, max_model_len=1000)


def test_a_hub_id_is_found_in_the_cache_and_refused_clearly_without_a_hub(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    wish = ModelConfig(path="someone/small-llama", revision="v1")
    with pytest.raises(
        ModelLoadError, match="someone/small-llama .* hub cannot be reached; set model.path"
    ):
        model_folder(wish)
    repository = tmp_path / "hub" / "models--someone--small-llama"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("c0ffee")
    shutil.copytree(
        folder, repository / "snapshots" / "c0ffee", ignore=shutil.ignore_patterns("hub")
    )
    spec = model_of(BatonConfig(model=wish))
    assert spec.name == "someone/small-llama" and spec.num_layers == 3
