"""Model repositories as they are published: other weights beside the model, loose JSON values."""

import fnmatch
import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.models import TINY, random_llama, random_model

from cluster.model_source import model_folder
from core.config import ModelConfig
from core.errors import ModelLoadError
from engine.checkpoint.families import Rope
from engine.checkpoint.generation_config import default_sampling
from engine.checkpoint.model_spec import read_model

SHARDED = "model-00001-of-00003.safetensors"
NORM = "model.norm.weight"


@pytest.fixture()
def whole(tmp_path):
    folder = tmp_path / "whole"
    random_llama(folder)
    return folder


@pytest.fixture()
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    random_model(folder, "llama-gqa", max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def change_json(folder, name, **changes):
    path = folder / name
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**tree, **changes}))


def add_other_weights(folder):
    """What stands beside a model and is not part of it."""
    odd = {"layers.0.attention.wq.weight": torch.zeros(2, 2), NORM: torch.ones(64)}
    save_file(odd, folder / "consolidated.safetensors")
    adapter = {"base_model.model.model.norm.lora_A.weight": torch.zeros(2, 2)}
    save_file(adapter, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_other_weights_beside_the_model_are_not_read(form, request):
    folder = request.getfixturevalue(form)
    before = read_model(folder)
    add_other_weights(folder)
    assert read_model(folder) == before


def test_a_model_in_one_file_counts_before_an_index_that_was_left(whole):
    change_json(whole, "model.safetensors.index.json", weight_map={NORM: "gone.safetensors"})
    assert set(read_model(whole).tensor_files.values()) == {"model.safetensors"}


def test_a_tensor_that_two_shards_hold_is_taken_from_where_the_index_says(sharded):
    places = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    first, *_, last = sorted(set(places.values()))
    of_first = next(tensor for tensor, file in places.items() if file == first)
    of_last = next(tensor for tensor, file in places.items() if file == last)
    for tensor, other in ((of_first, last), (of_last, first)):
        save_file({**load_file(sharded / other), tensor: torch.zeros(1)}, sharded / other)
    assert read_model(sharded).tensor_files == places


def test_a_missing_shard_and_a_tensor_that_is_not_where_it_should_be_are_named(sharded):
    index = sharded / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    shard = places[NORM]
    kept = load_file(sharded / shard)
    (sharded / shard).unlink()
    with pytest.raises(ModelLoadError, match=f"lacks {shard}, which .*index.json names"):
        read_model(sharded)
    del kept[NORM]
    save_file(kept, sharded / shard)
    with pytest.raises(ModelLoadError, match=f"{shard} lacks tensor {NORM}"):
        read_model(sharded)
    for tree, words in (
        ({"weight_map": {NORM: "../elsewhere.safetensors"}}, "elsewhere.*not the name of a"),
        ({"weight_map": {NORM: 7}}, "not the name of a safetensors file"),
        ({"weight_map": []}, "no weight_map"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps(tree))
        with pytest.raises(ModelLoadError, match=words):
            read_model(sharded)


def test_weights_under_other_names_only_are_told(whole):
    (whole / "model.safetensors").rename(whole / "consolidated.safetensors")
    with pytest.raises(ModelLoadError, match=r"no model.safetensors .*consolidated.safetensors"):
        read_model(whole)


def test_buffers_that_old_versions_stored_are_ignored_as_in_transformers(whole):
    path, before = whole / "model.safetensors", read_model(whole)
    tensors = load_file(path)
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path, metadata={"format": "pt"})
    assert replace(read_model(whole), tensor_files={}, digest="") == replace(
        before, tensor_files={}, digest=""
    )
    _, told = transformers.AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert not told["unexpected_keys"]


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_a_download_takes_the_files_that_are_read_and_no_other(
    form, request, tmp_path, monkeypatch
):
    published = request.getfixturevalue(form)
    add_other_weights(published)
    if form == "whole":
        change_json(published, "model.safetensors.index.json", weight_map={NORM: SHARDED})
    arrived, revisions = tmp_path / "0123456789abcdef", []

    def snapshot_download(hub_id, revision, allow_patterns):
        revisions.append(revision)
        arrived.mkdir(exist_ok=True)
        for path in published.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, arrived)
        return str(arrived)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folder = model_folder(ModelConfig(path="someone/small-llama", revision="main"))
    assert read_model(folder).tensor_files == read_model(published).tensor_files
    weights = {path.name for path in folder.glob("*.safetensors")}
    assert weights == set(read_model(published).tensor_files.values())
    # What `main` is may change between the two: shards come from the commit of the index.
    assert revisions == (["main"] if form == "whole" else ["main", arrived.name])


def test_sampling_defaults_are_numbers_whatever_form_they_were_written_in(whole):
    change_json(
        whole, "generation_config.json", top_k=50.0, temperature=0.7, top_p=None, min_p=0,
        repetition_penalty=1, do_sample=True,
    )  # fmt: skip
    found = read_model(whole).default_sampling
    assert found == {"top_k": 50, "temperature": 0.7, "repetition_penalty": 1.0}
    assert isinstance(found["top_k"], int)


def test_a_top_k_above_the_vocabulary_is_all_of_it():
    assert default_sampling({"top_k": 5000}, 96) == {"top_k": 96}
    assert default_sampling({"top_k": -1}, 96) == default_sampling({"top_k": 0}, 96) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": "50"}, "generation_config.json has top_k = '50', must be a whole number"),
        ({"top_k": 50.5}, "top_k = 50.5, must be a whole number"),
        ({"top_k": True}, "top_k = True, must be a whole number"),
        ({"temperature": "hot"}, "generation_config.json has temperature = 'hot', must be a numb"),
        ({"temperature": [1]}, r"temperature = \[1\], must be a number"),
        ({"temperature": 10**400}, "temperature = 10+"),
        ({"temperature": -1}, "generation_config.json: temperature is -1.0, must be from 0"),
        ({"top_p": 1.5}, "generation_config.json: top_p is 1.5"),
        ({"min_p": True}, "min_p = True, must be a number"),
        ({"repetition_penalty": 1000}, "generation_config.json: repetition_penalty is 1000.0"),
        ({"eos_token_id": [2, "3"]}, "generation_config.json has eos_token_id = '3'"),
        ({"eos_token_id": -1}, "eos_token_id = -1, must be a whole number of at least 0"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id = {'a': 1}"),
    ],
)
def test_a_wrong_value_of_the_generation_config_is_named(whole, changes, words):
    change_json(whole, "generation_config.json", **changes)
    with pytest.raises(ModelLoadError, match=words):
        read_model(whole)


@pytest.fixture()
def named(tmp_path):
    """The tiny model: its tokenizer ends with token 257 by name."""
    folder = tmp_path / "named"
    shutil.copytree(TINY, folder)
    return folder


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (257, 257, (257,)),
        (None, 262, (262, 257)),
        (262, 261, (262, 261, 257)),
        ([262, 257.0], None, (262, 257)),
        (None, [], (257,)),
    ],
)
def test_an_output_ends_with_what_any_of_the_three_files_names(named, generation, config, ends):
    change_json(named, "generation_config.json", eos_token_id=generation)
    change_json(named, "config.json", eos_token_id=config)
    assert read_model(named).eos_token_ids == ends


def test_the_tokenizers_end_is_found_wherever_it_is_named(named):
    for name in ("generation_config.json", "config.json"):
        change_json(named, name, eos_token_id=None)
    path = named / "tokenizer.json"
    plain = json.loads(path.read_text())
    for token, ends in ((None, ()), ("<|nowhere|>", ()), ("a", (97,)), ("<|user|>", None)):
        change_json(named, "tokenizer_config.json", eos_token=token)
        added = {one["content"]: one["id"] for one in plain["added_tokens"]}
        assert read_model(named).eos_token_ids == (ends if ends is not None else (added[token],))
    older = {"eos_token": {"content": "<|end|>", "lstrip": False}}
    (named / "special_tokens_map.json").write_text(json.dumps(older))
    assert read_model(named).eos_token_ids == (257,)
    pieces = [[f"<{i}>", -1.0] for i in range(9)]  # a Unigram vocabulary is a list of pairs
    path.write_text(json.dumps({"added_tokens": [], "model": {"vocab": pieces}}))
    change_json(named, "special_tokens_map.json", eos_token="<7>")
    assert read_model(named).eos_token_ids == (7,)
    path.write_text(json.dumps({"added_tokens": [{}], "model": {"vocab": {}}}))
    with pytest.raises(ModelLoadError, match=r"named/tokenizer.json is malformed"):
        read_model(named)


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        ({"rope_type": None, "type": "linear", "factor": 4.0}, Rope(10_000.0, "linear", 4.0)),
        ({"rope_type": None, "factor": None}, Rope(10_000.0)),
        ({"rope_type": "default", "rope_theta": None}, Rope(10_000.0)),
    ],
)
def test_nulls_in_the_rope_settings_are_as_if_not_there(whole, scaling, rope):
    tree = json.loads((whole / "config.json").read_text())
    tree.pop("rope_parameters")
    (whole / "config.json").write_text(json.dumps({**tree, "rope_scaling": scaling}))
    assert read_model(whole).traits.ropes == (rope,)


def test_a_folder_of_the_names_is_not_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(ModelLoadError, match=f"{Path(tmp_path).name} holds no model.safetensors"):
        read_model(tmp_path)
