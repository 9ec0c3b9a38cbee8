"""What a Hugging Face folder holds, read without torch.

Owns the parsing of `config.json`, the list of tensors a model must have, and the strict comparison
with the safetensors headers, in both directions. Does not know how families differ
(`engine.checkpoint.families`) and loads no weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ModelLoadError
from core.kv_layout import KVLayout
from engine.checkpoint.families import ALWAYS_TIED, Traits, number, positive, read_traits
from engine.checkpoint.generation_config import GENERATION_CONFIG, default_sampling, end_tokens
from engine.checkpoint.json_file import read_json, read_json_if_there
from engine.checkpoint.safetensors_files import tensor_headers, weights_digest

TIED_COPY = "lm_head.weight"
"""Stored beside the embedding that it is a copy of."""
OLD_BUFFER = "rotary_emb.inv_freq"
"""Written by old versions of transformers and ignored by new ones: it follows from the config."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and switches of one decoder-only transformer."""

    folder: Path
    name: str
    architecture: str
    digest: str
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_norm_eps: float
    traits: Traits
    max_model_len: int
    is_tied: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    tensor_files: dict[str, str]
    tokenizer_digest: str
    """Two workers with other tokens for the same text must not exchange KV."""
    default_sampling: dict[str, float]
    """What `generation_config.json` sets, by our own names."""

    def layout(self, block_size_tokens: int, num_shards: int = 1) -> KVLayout:
        """KV layout of a worker of `num_shards` ranks."""
        return KVLayout(
            model_digest=self.digest,
            dtype=self.dtype,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            block_size_tokens=block_size_tokens,
            num_shards=num_shards,
            tokenizer_digest=self.tokenizer_digest,
        )

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the folder must hold, no more and no fewer."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.is_tied:
            shapes["lm_head.weight"] = (self.vocabulary_size, self.hidden_size)
        for index in range(self.num_layers):
            layer = {
                **self._attention_tensors(),
                **self._norm_tensors(),
                **self._mlp_tensors(index),
            }
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes

    def _attention_tensors(self) -> dict[str, tuple[int, ...]]:
        t = self.traits
        q = self.num_heads * self.head_size
        kv = self.num_kv_heads * self.head_size
        rows = (
            {"qkv_proj": q + 2 * kv}
            if t.has_fused_projections
            else {"q_proj": q, "k_proj": kv, "v_proj": kv}
        )
        shapes: dict[str, tuple[int, ...]] = {
            f"self_attn.{n}.weight": (size, self.hidden_size) for n, size in rows.items()
        }
        shapes["self_attn.o_proj.weight"] = (self.hidden_size, q)
        if t.has_qkv_bias:
            shapes |= {f"self_attn.{n}.bias": (size,) for n, size in rows.items()}
        if t.has_o_bias:
            shapes["self_attn.o_proj.bias"] = (self.hidden_size,)
        if t.has_qk_norm:
            shapes |= {f"self_attn.{n}.weight": (self.head_size,) for n in ("q_norm", "k_norm")}
        return shapes

    def _norm_tensors(self) -> dict[str, tuple[int, ...]]:
        names = ["input_layernorm", "post_attention_layernorm"]
        if self.traits.has_post_norms:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        return {f"{name}.weight": (self.hidden_size,) for name in names}

    def _mlp_tensors(self, index: int) -> dict[str, tuple[int, ...]]:
        t, e = self.traits, self.traits.experts
        if e is not None and t.layers[index].is_sparse:
            shapes: dict[str, tuple[int, ...]] = {
                f"{e.prefix}.gate.weight": (e.num, self.hidden_size)
            }
            for expert in range(e.num):
                name = f"{e.prefix}.experts.{expert}"
                shapes |= {
                    f"{name}.{n}.weight": (e.intermediate_size, self.hidden_size)
                    for n in (e.gate, e.up)
                }
                shapes[f"{name}.{e.down}.weight"] = (self.hidden_size, e.intermediate_size)
            return shapes
        rows = (
            {"gate_up_proj": 2 * self.intermediate_size}
            if t.has_fused_projections
            else {"gate_proj": self.intermediate_size, "up_proj": self.intermediate_size}
        )
        shapes = {f"mlp.{n}.weight": (size, self.hidden_size) for n, size in rows.items()}
        shapes["mlp.down_proj.weight"] = (self.hidden_size, self.intermediate_size)
        if t.has_mlp_bias:
            shapes |= {
                f"mlp.{n}.bias": (size,)
                for n, size in {**rows, "down_proj": self.hidden_size}.items()
            }
        return shapes


def read_model(
    folder: Path, dtype: str = "auto", max_model_len: int = 0, name: str = ""
) -> ModelSpec:
    """Read a folder's description and check that its tensors are exactly those expected.

    Args:
        folder: Hugging Face folder.
        dtype: `auto` keeps the stored one.
        max_model_len: Longest prompt plus output (tokens); 0: the model's own.
        name: Name in the API; empty: the folder's.

    Raises:
        ModelLoadError: Names the file, key or tensor at fault, and what was expected.
    """
    config = read_json(folder / "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ModelLoadError(f"config.json has architectures = {architectures!r}, must be a list")
    architecture = str(architectures[0])
    num_layers = positive(config, "num_hidden_layers")
    num_heads = positive(config, "num_attention_heads")
    # Newer families choose it freely; hidden size over heads is only the default.
    head_size = positive(config, "head_dim", absent=positive(config, "hidden_size") // num_heads)
    try:
        traits = read_traits(architecture, config, num_layers, head_size)
    # Families read dozens of keys: whatever a value is, the operator gets one line.
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelLoadError(
            f"config.json of {folder.name} has a value of the wrong kind: {error}"
        ) from error
    generation = read_json_if_there(folder / GENERATION_CONFIG)
    vocabulary_size = positive(config, "vocab_size")
    own_len = positive(config, "max_position_embeddings")
    if max_model_len > own_len:
        raise ModelLoadError(
            f"model.max_model_len {max_model_len} is above the model's own {own_len}"
        )
    headers = tensor_headers(folder)
    spec = ModelSpec(
        folder=folder,
        name=name or folder.name,
        architecture=architecture,
        # Folders of one name may hold other weights, and KV of the two must never mix.
        digest=weights_digest(folder, sorted({file for file, _ in headers.values()})),
        vocabulary_size=vocabulary_size,
        hidden_size=positive(config, "hidden_size"),
        intermediate_size=positive(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=positive(config, "num_key_value_heads", absent=num_heads),
        head_size=head_size,
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
        traits=traits,
        max_model_len=max_model_len or own_len,
        # Gemma's configs leave it out.
        is_tied=bool(config.get("tie_word_embeddings", architecture in ALWAYS_TIED)),
        dtype=_dtype(config, dtype),
        eos_token_ids=end_tokens(generation, config, folder),
        tensor_files={tensor: file for tensor, (file, _) in headers.items()},
        tokenizer_digest=_tokenizer_digest(folder / "tokenizer.json"),
        default_sampling=default_sampling(generation, vocabulary_size),
    )
    if spec.num_heads % spec.num_kv_heads:
        raise ModelLoadError(
            f"{spec.num_heads} query heads cannot be shared by {spec.num_kv_heads} KV heads"
        )
    _compare(
        spec.expected_tensors(),
        {tensor: shape for tensor, (_, shape) in headers.items()},
        is_tied=spec.is_tied,
    )
    return spec


def _tokenizer_digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() if path.exists() else ""


def _dtype(config: dict[str, Any], asked: str) -> str:
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix(
        "torch."
    )
    chosen = stored if asked == "auto" else asked
    if chosen not in ("float32", "bfloat16", "float16"):
        raise ModelLoadError(
            f"weights of dtype {chosen} are not supported; set model.dtype to float32 or bfloat16"
        )
    return chosen


def _compare(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], *, is_tied: bool
) -> None:
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(
        name
        for name in found.keys() - expected.keys()
        if OLD_BUFFER not in name and not (is_tied and name == TIED_COPY)
    )
    wrong = [
        f"{n} is {list(found[n])}, must be {list(s)}"
        for n, s in expected.items()
        if n in found and found[n] != s
    ]
    problems = [
        f"{len(names)} {what}, first {names[0]}"
        for what, names in (
            ("missing", missing),
            ("surplus", surplus),
            ("misshapen", sorted(wrong)),
        )
        if names
    ]
    if problems:
        raise ModelLoadError("tensors do not match config.json: " + "; ".join(problems))
